"""Batches of texts with about as many patches each: `Trainer` groups by a column, and that column may count patches."""

import pytest
import torch
from datasets import Dataset

from blt_hf.training.data import BltDataCollator, PrecomputePatches
from helpers.models import make_model, tiny_config
from helpers.texts import encode
from helpers.training import make_trainer, step_losses


WORDS = ["a", "of", "byte", "patches", "transformer", "entropies-of-bytes", "\n\n", "速い狐", "0, 1, 1, 2, 3"]


def rows_of_equal_bytes(model) -> Dataset:
    """64 bytes each, so that only patches tell them apart; `length` is their number."""
    texts = [f"{first} {second} " * 64 for first in WORDS for second in WORDS]
    data = Dataset.from_dict({"input_ids": [encode(text, eos=True)[:64] for text in texts]}).shuffle(seed=0)
    data = data.map(PrecomputePatches(model), batched=True, batch_size=16)
    return data.map(lambda row: {"length": len(row["patch_lengths"])})


def patches_of_batches(trainer) -> list[list[int]]:
    return [(batch["patch_lengths"] > 0).sum(dim=1).tolist() for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("rule", [{}, {"patching_mode": "space"}], ids=str)
def test_batches_hold_rows_of_about_as_many_patches(rule, tmp_path):
    model = make_model(tiny_config(**rule))
    data = rows_of_equal_bytes(model)
    assert min(data["length"]) < 0.7 * max(data["length"])
    # `Trainer` drops the columns that the model does not take before it looks for the one with the lengths.
    arguments = {"data": data, "collator": BltDataCollator(), "max_steps": 4, "remove_unused_columns": False}
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(
            model, tmp_path, train_sampling_strategy=strategy, length_column_name="length", **arguments
        )
        batches = patches_of_batches(trainer)
        assert sorted(sum(batches, [])) == sorted(data["length"])
        padding[strategy] = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    assert padding["group_by_length"] < 0.5 * padding["random"]
    assert max(batches[0]) == max(data["length"])  # the largest batch first, where memory would run out
    trainer.train()
    assert torch.tensor(step_losses(trainer)).isfinite().all()
