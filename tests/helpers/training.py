"""Small runs of `Trainer` and TRL, and how their losses and weights compare."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.texts import encode


TEXTS = [
    "A byte is a small number.",
    "Patches are long where the next byte is easy to guess, and short where it is not.",
    "naïve café",
    "x",
    "def f(x):\n    return x + 1\n",
    "The quick brown fox jumps over the lazy dog.",
    "速い狐",
    "0, 1, 1, 2, 3, 5, 8, 13, 21",
]


def text_dataset(repeat: int = 2) -> Dataset:
    rows = [encode(text, eos=True) for text in TEXTS] * repeat
    return Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


def pad_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda row, value: value * (width - len(row["input_ids"]))
    batch = {
        "input_ids": [row["input_ids"] + fill(row, [0]) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) + fill(row, [0]) for row in rows],
        "labels": [row["input_ids"] + fill(row, [-100]) for row in rows],
    }
    if "patch_lengths" in rows[0]:
        patches = max(len(row["patch_lengths"]) for row in rows)
        batch["patch_lengths"] = [row["patch_lengths"] + [0] * (patches - len(row["patch_lengths"])) for row in rows]
    return {name: torch.tensor(values) for name, values in batch.items()}


def make_trainer(model, folder, data=None, collator=pad_collator, eval_dataset=None, **arguments) -> Trainer:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **arguments})
    data = text_dataset() if data is None else data
    return Trainer(model, arguments, train_dataset=data, eval_dataset=eval_dataset, data_collator=collator)


def train(*args, **kwargs) -> tuple[list[float], torch.nn.Module]:
    """Losses of the steps, and the trained model."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return step_losses(trainer), trainer.model


def step_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_losses(actual, expected, tolerance: float = 1e-4):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=tolerance, rtol=tolerance)


def assert_same_weights(actual, expected, tolerance: float = 1e-4):
    expected = dict(expected.named_parameters())
    for name, weight in actual.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


WORDS = ["hi", "yes", "no", "bee", "cat", "dog", "byte", "patch"]


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in WORDS
]


# Of TRL's configurations.
ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "learning_rate": 1e-2,
}
