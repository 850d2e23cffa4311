"""Processes that are killed while they write: nothing half written is taken for a whole result."""

import json
from pathlib import Path

import pytest
import torch

from blt_hf import BltForCausalLM, BltTokenizer
from helpers.fault_workers import Children, convert, model_with, save, train
from helpers.meta_checkpoints import write_meta


# Kills in the default run, and in the slow one
KILLS = [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
TRAINER_KILLS = [2, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


def tensors_of(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights that a user gets from a folder; None where loading says that something is wrong."""
    try:
        model, report = BltForCausalLM.from_pretrained(folder, output_loading_info=True)
        BltTokenizer.from_pretrained(folder)
    except Exception:
        return None
    assert not any(report.values()), f"a model with parts missing was loaded without an error: {report}"
    return model.state_dict()


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("before", ["nothing", "another model"])
def test_save_pretrained(children, tmp_path, kills, before):
    code, duration = children.run(save, tmp_path / "whole", 1)
    assert code == 0
    old, new = model_with(0).state_dict(), model_with(1).state_dict()
    assert equal(tensors_of(tmp_path / "whole"), new)
    outcomes = []
    for number, moment in enumerate(children.moments(duration, kills)):
        folder = tmp_path / str(number)
        if before == "another model":
            model_with(0).save_pretrained(folder)
        code, _ = children.run(save, folder, 1, kill_after=moment)
        found = tensors_of(folder)
        whole = [new, old] if before == "another model" else [new]
        assert found is None or any(equal(found, tensors) for tensors in whole), f"killed after {moment:.4f} s"
        outcomes.append((code, found is not None))
    assert len(outcomes) == kills


@pytest.mark.parametrize("kills", KILLS)
def test_convert(children, tmp_path, kills):
    """The result has its name only when it is whole, and what it replaces is not lost."""
    old = write_meta(tmp_path / "old", encoder_hash_byte_group_vocab=5003)
    new = write_meta(tmp_path / "new", encoder_hash_byte_group_vocab=5003, dtype=torch.float16)
    for name in ("old", "new"):
        code, duration = children.run(convert, tmp_path / name, tmp_path / f"whole-{name}")
        assert code == 0
    whole = [tensors_of(tmp_path / f"whole-{name}") for name in ("old", "new")]
    assert not equal(*whole)
    for number, moment in enumerate(children.moments(duration, kills)):
        parent = tmp_path / str(number)
        target = parent / "out"
        if number % 2:
            assert children.run(convert, old, target)[0] == 0
        parent.mkdir(exist_ok=True)
        children.run(convert, new, target, kill_after=moment)
        kept = [target] if target.exists() else [*parent.glob(".out.*.old")] if number % 2 else []
        assert len(kept) == (1 if number % 2 or target.exists() else 0)
        for folder in kept:
            found = tensors_of(folder)
            assert found is not None and any(equal(found, tensors) for tensors in whole)


@pytest.mark.parametrize("kills", TRAINER_KILLS)
def test_trainer(children, tmp_path, kills):
    """A run that was killed again and again has the losses of one that was left alone."""
    code, duration = children.run(train, tmp_path / "alone", tmp_path / "alone.json")
    assert code == 0
    expected = json.loads((tmp_path / "alone.json").read_text())
    assert len(expected) == 8 and len(set(expected.values())) > 4
    (tmp_path / "alone.json").unlink()  # as if killed between the last checkpoint and the report
    assert children.run(train, tmp_path / "alone", tmp_path / "alone.json")[0] == 0
    assert json.loads((tmp_path / "alone.json").read_text()) == expected
    left, number = kills, 0
    while left:
        folder, report = tmp_path / str(number), tmp_path / f"{number}.json"
        for moment in children.moments(duration, min(left, 4)):
            left -= 1
            children.run(train, folder, report, kill_after=moment)
            if report.exists():
                break
        else:
            assert children.run(train, folder, report)[0] == 0
        assert json.loads(report.read_text()) == expected
        number += 1
