"""Precomputed patches give the losses of live ones, however rows are batched; texts come out of files as they are."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from blt_hf import BltForCausalLM
from blt_hf.model.patching_blt import PatchingRule
from blt_hf.training.data import BltDataCollator, PrecomputePatches, byte_ids, read_texts, without_next_byte
from helpers.models import make_model, tiny_config


TEXTS = [
    "A byte is a small number.",
    "Patches are long where the next byte is\neasy to guess, and short where it is not.",
    "naïve café",
    "x",
    "def f(x):\n    return x + 1\n",
    "速い狐",
]
CONFIGS = {
    "entropy": {},
    "monotonic": {"monotonicity": True},
    "newline": {"patching_newline_reset": True},
    "documents": {"mask_documents": True},
    "space": {"patching_mode": "space"},
    "longest": {"max_patch_length": 3},
}
COLLATORS = {
    "right": BltDataCollator(),
    "left": BltDataCollator(padding_side="left"),
    "multiple": BltDataCollator(pad_to_multiple_of=16),
    "padding free": BltDataCollator(padding_free=True),
}


def dataset() -> Dataset:
    rows = [[1, *byte_ids(text), 2] for text in TEXTS]
    rows[4] = [*rows[4], *rows[2][1:]]  # an eos inside
    return Dataset.from_dict({"input_ids": rows})


def with_patches(model, data: Dataset, **options) -> Dataset:
    return data.map(PrecomputePatches(model, **options), batched=True, batch_size=4)


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_losses_are_those_of_live_patches(overrides, collator):
    model = make_model(tiny_config(**overrides))
    data = dataset()
    live, ready = collator(list(data)), collator(list(with_patches(model, data)))
    assert "patch_lengths" in ready and "patch_lengths" not in live
    model.train()
    losses, gradients = [], []
    for batch in (live, ready):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.global_transformer.layers[0].mlp.up_proj.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_padding_free_rows_have_the_loss_of_padded_ones():
    model = make_model()
    rows = list(with_patches(model, dataset()))
    losses = [model(**BltDataCollator(padding_free=joined)(rows)).loss.item() for joined in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_wrong_patches_would_be_seen():
    """The comparison above can fail: other patches give another loss."""
    model = make_model()
    data = dataset()
    ready = BltDataCollator()(list(with_patches(model, data)))
    other = BltDataCollator()(list(with_patches(model, data, rule=PatchingRule("byte"))))
    assert abs(model(**ready).loss.item() - model(**other).loss.item()) > 1e-4


def test_trainer_uses_the_column(tmp_path):
    model = make_model()
    data = with_patches(model, dataset())

    def losses(rows, patcher_runs: bool) -> list[float]:
        model = make_model()
        calls = []
        find_entropies = model.model.patcher.entropies
        model.model.patcher.entropies = lambda *arguments: calls.append(1) or find_entropies(*arguments)
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=3, max_steps=3, learning_rate=1e-2, seed=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=BltDataCollator())
        trainer.train()
        assert bool(calls) == patcher_runs
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    live, ready = losses(dataset(), patcher_runs=True), losses(data, patcher_runs=False)
    assert len(live) == 3
    assert live == pytest.approx(ready, abs=1e-5)


def test_entropies_and_single_rows():
    model = make_model()
    data = dataset()
    batched = with_patches(model, data, add_entropies=True)
    single = data.map(PrecomputePatches(model, add_entropies=True))
    for row, alone in zip(batched, single):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            output = model(ids, output_patches=True)
        torch.testing.assert_close(torch.tensor(row["entropies"]), output.entropies[0])
        assert row["patch_lengths"] == alone["patch_lengths"] == output.patch_lengths[0].tolist()
        assert sum(row["patch_lengths"]) == len(row["input_ids"]) + 1


def test_padded_and_packed_rows():
    model = make_model()
    rows = [[1, *byte_ids(text)] for text in TEXTS[:3]]
    precompute = PrecomputePatches(model)
    alone = precompute({"input_ids": rows})["patch_lengths"]
    width = max(map(len, rows))
    padded = {
        "input_ids": [[0] * (width - len(row)) + row for row in rows],
        "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
    }
    assert precompute(padded)["patch_lengths"] == alone
    packed = {"input_ids": sum(rows, []), "position_ids": [i for row in rows for i in range(len(row))]}
    joined = [*alone[0], *alone[1][1:], *alone[2][1:]]
    assert precompute(packed)["patch_lengths"] == joined


def test_map_is_cached_by_patcher_and_rule():
    from datasets.fingerprint import Hasher

    first, second = make_model(), make_model()
    assert Hasher.hash(PrecomputePatches(first)) == Hasher.hash(PrecomputePatches(second))
    second.config.patching_threshold += 1
    assert Hasher.hash(PrecomputePatches(first)) != Hasher.hash(PrecomputePatches(second))
    assert Hasher.hash(PrecomputePatches(first)) != Hasher.hash(PrecomputePatches(make_model(seed=1)))


def test_what_cannot_be_precomputed_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="has no rule of its own"):
        PrecomputePatches(model.model.patcher)
    with pytest.raises(ValueError, match="no entropy model"):
        PrecomputePatches(make_model(tiny_config(patching_mode="space")), add_entropies=True)
    with pytest.raises(ValueError, match="`set_patcher`"):
        PrecomputePatches(BltForCausalLM(tiny_config(patch_in_forward=False)))


def test_collator_pads_and_masks():
    rows = [{"input_ids": [1, 70, 71], "patch_lengths": [1, 3]}, {"input_ids": [1, 70], "patch_lengths": [1, 1, 1]}]
    batch = BltDataCollator(padding_side="left")(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 70, 71], [0, 1, 70]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "labels": [[1, 70, 71], [-100, 1, 70]],
        "patch_lengths": [[1, 3, 0], [1, 1, 1]],
    }
    joined = BltDataCollator(padding_free=True)(rows)
    assert {name: values.tolist() for name, values in joined.items()} == {
        "input_ids": [[1, 70, 71, 1, 70]],
        "labels": [[-100, 70, 71, -100, 70]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "patch_lengths": [[1, 3, 1, 1]],
    }
    labelled = BltDataCollator()([{"input_ids": [1, 70, 71], "labels": [-100, -100, 71], "length": 3}])
    assert labelled["labels"].tolist() == [[-100, -100, 71]] and "length" not in labelled


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"input_ids": [1], "patch_lengths": [1, 1]}, {"input_ids": [1]}], {}, "1 of 2 rows"),
        ([{"input_ids": [1, 5], "patch_lengths": [1, 1]}], {"padding_free": True}, "sum to 2; joining texts needs 3"),
        ([{"input_ids": [0, 5], "attention_mask": [0, 1]}], {"padding_free": True}, "has zeros"),
        ([], {"padding_side": "up"}, "'left' or 'right'; got 'up'"),
        ([], {"padding_free": True, "pad_to_multiple_of": 8}, "choose one"),
    ],
)
def test_collator_refuses(rows, options, message):
    with pytest.raises(ValueError, match=message):
        BltDataCollator(**options)(rows)


def test_next_byte_is_taken_off():
    lengths = torch.tensor([[1, 2, 2], [1, 3, 1], [1, 1, 0], [0, 0, 0]])
    assert without_next_byte(lengths).tolist() == [[1, 2, 1], [1, 3, 0], [1, 0, 0], [0, 0, 0]]


def test_texts_come_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xffraw\r\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("no")
    lines = [{"text": "é"}, {"text": "two\nlines", "other": 1}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read_texts([tmp_path]) == ["é".encode(), b"two\nlines", b"\xffraw\r\n"]
    assert read_texts([tmp_path / "b.txt"]) == [b"\xffraw\r\n"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}')
    with pytest.raises(ValueError, match="bad.jsonl, line 2: no JSON object with a field 'text'"):
        read_texts([tmp_path / "bad.jsonl"])
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_texts([tmp_path / "none"])
    with pytest.raises(ValueError, match="no text in"):
        read_texts([tmp_path / "empty.txt"])
