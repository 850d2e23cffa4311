"""`accelerate launch` with DeepSpeed on CPUs: ZeRO-2 and ZeRO-3 train as one process does."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from clients_common import ANSWERS, chatter_folder, conversation, run_client
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


STEPS, ROWS = 3, 4
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: 'no'
num_machines: 1
num_processes: {num_processes}
use_cpu: true
"""
ZERO = """
deepspeed_config:
  zero_stage: {stage}
  zero3_init_flag: false
  zero3_save_16bit_model: true
  offload_optimizer_device: none
  offload_param_device: none
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
"""


def train(folder: str) -> None:
    """The user's script; nothing here knows of DeepSpeed."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = AutoModelForCausalLM.from_pretrained(chatter := sys.argv[2], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(chatter, trust_remote_code=True)
    texts = [tokenizer.apply_chat_template(conversation(question), tokenize=False) for question in ANSWERS] * 8
    ids = [tokenizer(text, add_special_tokens=False).input_ids[:40] for text in texts]
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS // processes,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.train()
    trainer.save_model(f"{folder}/model")
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kind = trainer.accelerator.distributed_type.value
        Path(folder, "result.json").write_text(json.dumps({"losses": losses, "kind": kind}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(folder: Path, stage: int | None) -> tuple[dict, dict[str, torch.Tensor]]:
    config = CONFIG.format(kind="NO" if stage is None else "DEEPSPEED", num_processes=1 if stage is None else 2)
    (folder / "config.yaml").write_text(config + ("" if stage is None else ZERO.format(stage=stage)))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = ["accelerate", "launch", "--config_file", folder / "config.yaml", "--main_process_port", port, __file__]
    run_client([*command, folder, chatter_folder()], folder, timeout=800, has_package=True)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), None)


@pytest.mark.timeout(900)
@pytest.mark.slow  # DeepSpeed builds its communication for CPUs when it is first used
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed has no wheels: `pip install deepspeed`"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, one_process, tmp_path):
    expected, weights = one_process
    result, saved = launch(tmp_path, stage)
    assert result["kind"] == "DEEPSPEED"
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    before = load_file(f"{chatter_folder()}/model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, atol=1e-4, rtol=0)
        assert "patcher" not in name or torch.equal(saved[name], before[name])
    assert any(not torch.equal(saved[name], before[name]) for name in saved)


if __name__ == "__main__":
    train(sys.argv[1])
