"""`trl` from the shell, in processes that know this package by the code beside the weights alone.

tests/integrations/test_trl.py does the same from Python, and `trl sft` from the shell, in the default run.
"""

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.clients import ANSWERS, chatter_folder, conversation, run_client


QUESTIONS = list(ANSWERS) * 4
ROWS = {
    "sft": [{"messages": conversation(question)} for question in QUESTIONS],
    "dpo": [
        {
            "prompt": conversation(question)[:1],
            "chosen": conversation(question)[1:],
            "rejected": [{"role": "assistant", "content": "never"}],
        }
        for question in QUESTIONS
    ],
    "kto": [
        {"prompt": conversation(question)[:1], "completion": conversation(question)[1:], "label": number % 2 == 0}
        for number, question in enumerate(QUESTIONS)
    ],
    "reward": [
        {
            "chosen": conversation(question),
            "rejected": [*conversation(question)[:1], {"role": "assistant", "content": "never"}],
        }
        for question in QUESTIONS
    ],
    "grpo": [{"prompt": conversation(question)[:1]} for question in QUESTIONS],
}
REWARD = """
def letters(completions, **kwargs):
    return [float(sum(map(str.isalpha, completion[0]["content"]))) for completion in completions]
"""
RUNS = {
    "sft_packing": ["sft", "--packing", "--max_length", "128"],
    "sft_padding_free": ["sft", "--padding_free", "--max_length", "None"],
    "dpo": ["dpo"],
    "kto": ["kto"],
    "reward": ["reward"],
    "grpo": [
        "grpo",
        "--reward_funcs",
        "my_rewards.letters",
        "--num_generations",
        "4",
        "--max_completion_length",
        "12",
    ],
}


@pytest.mark.slow  # six processes that each import TRL; the default run has `trl sft`
@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_trl(command, tmp_path: Path):
    """Two steps: losses are numbers, our class has saved the result, everything moved but the entropy model."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS[command[0]])))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    arguments = {
        "model_name_or_path": chatter_folder(),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
    }
    options = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    result = run_client(["trl", *command, "--trust_remote_code", "--use_cpu", *options], tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?(-?[\d.e-]+|nan)", result.stdout)]
    assert losses and all(map(math.isfinite, losses)), result.stdout[-2000:]
    assert "transformers/models/blt" not in result.stderr, "the in-tree class has warned"
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (chatter_folder(), tmp_path / "out"))
    body = [name for name in before if name.startswith("model.")]
    moved = {name for name in body if not before[name].equal(after[name])}
    assert not [name for name in moved if "patcher" in name]
    assert moved >= {name for name in body if "patcher" not in name and name.endswith("q_proj.weight")}
    assert (tmp_path / "out" / "modeling_blt.py").exists()
