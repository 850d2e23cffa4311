"""Data sets of bytes: texts from files, patches computed once before training, and batches with these patches."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.patching_blt import BOE_TOKEN_ID, BOS_TOKEN_ID, IGNORED_LABEL, PatchingRule
from ..patches.data import PatchFinder, evaluating
from ..tokenizer.encoding import byte_ids, to_bytes


def read_texts(paths: Iterable[str | os.PathLike], column: str = "text") -> list[bytes]:
    """Reads the texts of files.

    Args:
        paths: files or folders (all files below them, in the order of their names, hidden ones left out). `.jsonl`
            files hold a text in `column` of each line, any other file is one text.
        column: which field of a `.jsonl` line is the text.
    Returns:
        the bytes of each text that is not empty.
    Raises:
        ValueError: nothing is there, or a line has no such text.
    """
    texts = list(stream_texts(paths, column))
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}.")
    return texts


def stream_texts(paths: Iterable[str | os.PathLike], column: str = "text") -> Iterator[bytes]:
    """Yields the texts of [`read_texts`] one by one, for files that are larger than memory. No text is no error."""
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"`paths` must be a list of files and folders; got one {type(paths).__name__}: {paths}.")
    for path in find_files(paths):
        texts = _lines(path, column) if path.suffix == ".jsonl" else iter([path.read_bytes()])
        yield from (text for text in texts if text)


def _lines(path: Path, column: str) -> Iterator[bytes]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)[column] if line.strip() else ""
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with a field {column!r}.") from error
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: {column!r} is {type(text).__name__}; expected a text.")
            yield to_bytes(text)


def find_files(paths: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """Yields files, and the files in folders in the order of their names, without hidden ones.

    Raises:
        ValueError: nothing is there.
    """
    for path in map(Path, paths):
        if path.is_dir():
            inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
            yield from (path / file for file in inside if not any(part.startswith(".") for part in file.parts))
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} is neither a file nor a folder.")


def check_texts(texts: Iterable) -> None:
    """Refuses one text instead of a list; otherwise each of its characters would become a text.

    Raises:
        ValueError: `texts` is a str or bytes.
    """
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"`texts` must be a list of texts (or another iterable); got one {type(texts).__name__}.")


def pad_rows(
    rows: Sequence[Sequence], value: float, side: str = "right", multiple: int | None = None, dtype=torch.int64
) -> Tensor:
    """Makes a tensor `(B, longest row)` of rows of different lengths, padded with `value` on `side`.

    The width is at least 1 and, if given, a multiple of `multiple`.
    """
    width = max([1, *map(len, rows)])
    if multiple:
        width = -(-width // multiple) * multiple
    padded = torch.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        padded[index, columns] = torch.as_tensor(row, dtype=dtype)
    return padded


def without_next_byte(patch_lengths: Tensor) -> Tensor:
    """Takes the next byte out of patch lengths. It is not known yet, but the model counts it in the last patch.

    Args:
        patch_lengths: int64 `(B, P)`, rows that sum to their bytes plus 1, as the model gives them.
    Returns:
        int64 `(B, P)`, `[[1, 2, 2], [1, 3, 1]] -> [[1, 2, 1], [1, 3, 0]]`.
    """
    num_patches = (patch_lengths > 0).sum(dim=1, keepdim=True)
    last = (num_patches - 1).clamp_min(0)
    return patch_lengths.scatter_add(1, last, -(num_patches > 0).long())


class PrecomputePatches:
    """Adds a column `patch_lengths` to a data set of ids, so that training does not run the entropy model.

    A function for `datasets.Dataset.map`:

        dataset = dataset.map(PrecomputePatches(model), batched=True, batch_size=16)

    Rows hold `input_ids`, cut to their length in training, and may hold `attention_mask` and `position_ids` for the
    forward. Patch lengths cover the text of a row and the byte after it, as the forward expects. Only the entropy model
    and the rule are kept, not the model.

    Args:
        model: a BLT, or a [`BltPatcher`] together with `rule`.
        rule: another rule than the model's.
        add_entropies: also add a column `entropies` (nats of the byte after each byte), for instance to calibrate. The
            model does not read it.
        device: device of the entropy model; None: it stays where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: PatchingRule | None = None,
        add_entropies: bool = False,
        device: str | torch.device | None = None,
    ):
        self.finder = PatchFinder.of(model)
        if rule is not None:
            self.finder.rule = rule
        elif getattr(model.config, "model_type", None) == "blt_patcher":
            raise ValueError("a BltPatcher has no rule of its own; pass `rule=PatchingRule(threshold=...)` with it.")
        if self.finder.patcher is None and (add_entropies or self.finder.rule.uses_entropies):
            raise ValueError("this model has no entropy model, so it gives no entropies.")
        self.add_entropies = add_entropies
        self.device = device

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Returns the new columns of a batch of `map(batched=True)`, or of one row."""
        is_row = isinstance(batch["input_ids"][0], int)
        names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
        columns = {name: [batch[name]] if is_row else batch[name] for name in names}
        sizes = [len(row) for row in columns["input_ids"]]
        mask = columns.get("attention_mask") or [[1] * size for size in sizes]
        device = self.device
        if self.finder.patcher is not None:
            if device is not None:
                self.finder.patcher.to(device)
            device = self.finder.patcher.device
        positions = None
        if "position_ids" in columns:
            positions = pad_rows(columns["position_ids"], 0).to(device)
        lengths, entropies = self.finder.patches(
            pad_rows(columns["input_ids"], 0).to(device), pad_rows(mask, 0).to(device), positions
        )
        added = {"patch_lengths": [[n for n in row if n] for row in lengths.tolist()]}
        if self.add_entropies:
            added["entropies"] = [row[:size] for row, size in zip(entropies.tolist(), sizes)]
        return {name: rows[0] for name, rows in added.items()} if is_row else added


@dataclass
class BltDataCollator:
    """Makes a batch of rows of ids: `input_ids`, `attention_mask`, `labels`, and `patch_lengths` if the rows have them.

    Attributes:
        padding_free: join the texts to one row, whose `position_ids` restart at each text, instead of padding them.
        padding_side: "right" or "left".
        pad_to_multiple_of: the width of the batch is a multiple of this (not with `padding_free`).
        pad_token_id: id of padding; the model does not read it.

    Rows without `labels` are trained on all of their ids; `labels` are -100 at padding.
    """

    padding_free: bool = False
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    pad_token_id: int = BOE_TOKEN_ID

    def __post_init__(self):
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right'; got {self.padding_side!r}.")
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError("`pad_to_multiple_of` pads, and `padding_free=True` does not; choose one of them.")

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        rows = [{name: torch.as_tensor(row[name]).tolist() for name in row if name in _COLLATED} for row in rows]
        with_patches = sum("patch_lengths" in row for row in rows)
        if with_patches not in (0, len(rows)):
            raise ValueError(f"{with_patches} of {len(rows)} rows have `patch_lengths`; all or none must have them.")
        for row in rows:
            row.setdefault("labels", row["input_ids"])
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        return self._join(rows, with_patches > 0) if self.padding_free else self._pad(rows, with_patches > 0)

    def _pad(self, rows: list[dict], with_patches: bool) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        batch = {
            name: pad_rows([row[name] for row in rows], value, self.padding_side, self.pad_to_multiple_of)
            for name, value in fills.items()
        }
        if with_patches:  # counted from the first byte of the text, with padding on either side
            batch["patch_lengths"] = pad_rows([row["patch_lengths"] for row in rows], 0)
        return batch

    def _join(self, rows: list[dict], with_patches: bool) -> dict[str, Tensor]:
        if any(0 in row["attention_mask"] for row in rows):
            raise ValueError("`padding_free=True` joins rows without padding; `attention_mask` has zeros.")
        ids, labels, positions, lengths = [], [], [], []
        for row in rows:
            ids += row["input_ids"]
            labels += [IGNORED_LABEL, *row["labels"][1:]]  # no text predicts the first byte of the next
            positions += range(len(row["input_ids"]))
            if with_patches:
                if sum(row["patch_lengths"]) != len(row["input_ids"]) + 1:
                    raise ValueError(
                        f"`patch_lengths` of a row sum to {sum(row['patch_lengths'])}; joining texts needs "
                        f"{len(row['input_ids']) + 1}, the bytes of the row and the next one."
                    )
                # The next byte of one text is the first byte, and the first patch, of the text after it.
                lengths += row["patch_lengths"][1:] if lengths else row["patch_lengths"]
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        if with_patches:
            batch["patch_lengths"] = lengths
        return {name: torch.tensor([values]) for name, values in batch.items()}


_COLLATED = ("input_ids", "attention_mask", "labels", "patch_lengths")

__all__ = [
    "BOS_TOKEN_ID",
    "BltDataCollator",
    "PatchFinder",
    "PrecomputePatches",
    "byte_ids",
    "evaluating",
    "find_files",
    "read_texts",
    "stream_texts",
]
