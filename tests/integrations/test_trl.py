"""TRL on a BLT and its tokenizer: conversations, preferences and rewards, from Python and from the shell."""

import json
import os
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers.adapters import check_patcher_untouched
from helpers.models import make_model
from helpers.processes import run
from helpers.training import ARGUMENTS, CONVERSATIONS, step_losses


SFT = {
    "assistant_only": {"assistant_only_loss": True},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 128},
    "packing_wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    "no_checkpointing": {"gradient_checkpointing": False},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    BltTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.mark.parametrize("options", SFT.values(), ids=SFT)
@pytest.mark.parametrize("use_lora", [False, True])
def test_sft(model, options, use_lora, tmp_path):
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **ARGUMENTS, **options),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=BltTokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights="gaussian")
        if use_lora
        else None,
    )
    trainer.train()
    losses = step_losses(trainer)
    assert losses[-1] < losses[0]
    check_patcher_untouched(trainer.model)


def test_assistant_only_loss(model, tmp_path):
    """What is learned is the answer and the end of it."""
    tokenizer = BltTokenizer()
    data = Dataset.from_list(CONVERSATIONS[:1])
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **ARGUMENTS, assistant_only_loss=True),
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learned) == "hi" + tokenizer.eos_token


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_are_separate_texts(model, strategy, tmp_path):
    """The loss of a packed row is that of its texts one by one."""
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **ARGUMENTS, packing=True, packing_strategy=strategy, max_length=128),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=BltTokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    starts = [*torch.nonzero(batch["position_ids"][0] == 0)[:, 0].tolist(), batch["position_ids"].shape[1]]
    assert len(starts) > 2
    with torch.no_grad():
        packed = trainer.model.eval()(**batch).logits[0]
        for start, end in zip(starts, starts[1:]):
            alone = trainer.model(batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(packed[start:end], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_lora", [False, True])
def test_dpo(model, use_lora, tmp_path):
    data = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": "never"}],
        }
        for row in CONVERSATIONS
    ]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=BltTokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM") if use_lora else None,
    )
    trainer.train()
    assert step_losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference begin alike
    assert step_losses(trainer)[-1] < 0.69
    check_patcher_untouched(trainer.model)


def test_grpo(model, tmp_path):
    def reward(completions, **kwargs):
        return [float(sum(char.isalpha() for char in completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **{**ARGUMENTS, "max_steps": 2}, num_generations=4, max_completion_length=12),
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:1]} for row in CONVERSATIONS]),
        processing_class=BltTokenizer(),
    )
    use_cache = model.config.use_cache
    trainer.train()
    assert all("reward" in entry for entry in trainer.state.log_history[:2])
    assert model.training and model.config.use_cache == use_cache
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())  # TRL's default
    check_patcher_untouched(trainer.model)


@pytest.mark.parametrize("use_lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sft_from_the_shell(model_folder, use_lora, tmp_path):
    """`trl sft` in a process that has never heard of this package but for the code beside the weights."""
    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) for row in CONVERSATIONS]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    result = run(
        [sys.executable, "-m", "trl.cli.main", "sft", "--model_name_or_path", model_folder, "--trust_remote_code"]
        + ["--dataset_name", str(tmp_path / "data"), "--assistant_only_loss", "--output_dir", str(tmp_path / "out")]
        + ["--max_steps", "2", "--use_cpu", "--bf16", "False", "--report_to", "none", "--logging_steps", "1"]
        + (["--use_peft", "--lora_target_modules", "all-linear"] if use_lora else []),
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert "'loss'" in result.stdout
    assert "transformers/models/blt" not in result.stderr  # no warning of the in-tree class
    if use_lora:
        with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as adapter:
            assert not any("patcher" in name for name in adapter.keys())  # noqa: SIM118
    else:
        before, after = (load_file(f"{folder}/model.safetensors") for folder in (model_folder, tmp_path / "out"))
        for name, weight in before.items():
            assert torch.equal(weight, after[name]) == ("patcher" in name), name
        assert (tmp_path / "out" / "modeling_blt.py").exists()  # our class has saved it
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
