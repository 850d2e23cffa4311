"""Patches as data: which bytes a model takes together, and the entropies that say so."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.chunk_blt import ByteChunk, DocumentRules, make_chunk
from ..model.patching_blt import (
    BOS_TOKEN_ID,
    BYTE_OFFSET,
    VOCAB_SIZE,
    PatchingRule,
    find_patch_ends,
    patch_lengths_from_ends,
)
from ..rules import describe_rule
from ..tokenizer.encoding import SPECIAL_NAMES, byte_ids, bytes_of
from .display import patches_html


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Sets evaluation mode without gradients; restores the module's mode afterwards."""
    was_training = module is not None and module.training
    if was_training:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            module.train()


@dataclass
class PatchFinder:
    """Finds patches as a model does, without the rest of the model.

    Attributes:
        patcher: the entropy model; None: the rule needs none.
        rule: where patches start.
        documents: where documents end for the entropy model.
    """

    patcher: nn.Module | None
    rule: PatchingRule
    documents: DocumentRules

    @classmethod
    def of(cls, model: nn.Module) -> "PatchFinder":
        """Makes the finder of a BLT (also in PEFT's wrappers), or of a [`BltPatcher`] with the plain entropy rule.

        Raises:
            ValueError: `model` is neither, or has lost its entropy model and needs one.
        """
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind == "blt_patcher":
            return cls(model, PatchingRule(), DocumentRules.of(config))
        if kind != "blt":
            raise ValueError(f"`model` must be a BLT or a BltPatcher; got {type(model).__name__}.")
        patcher = getattr(model, "model", model).patcher if config.uses_patcher else None
        if config.uses_patcher and patcher is None:
            raise ValueError(
                "`model` was built with `patch_in_forward=False`; give it an entropy model: `set_patcher`."
            )
        return cls(patcher, PatchingRule.from_config(config), DocumentRules.of(config))

    def entropies(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Computes nats of the byte after each byte, fp32 `(B, S)`, 0 at padding; arguments as in the model's forward."""
        chunk = self._chunk(input_ids, attention_mask, position_ids)
        return chunk.unpack(self._entropies(chunk))

    def patches(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes patch lengths int64 `(B, P)` as the model's forward does, and `entropies` (None without)."""
        chunk = self._chunk(input_ids, attention_mask, position_ids)
        entropies = self._entropies(chunk) if self.patcher is not None else None
        ends = find_patch_ends(self.rule, chunk.input_ids, entropies, chunk.text_positions)
        lengths = patch_lengths_from_ends(ends, chunk.num_bytes)
        return lengths, None if entropies is None else chunk.unpack(entropies)

    def _chunk(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> ByteChunk:
        shape, device = tuple(input_ids.shape), input_ids.device
        return make_chunk(input_ids, attention_mask, position_ids, None, shape, device, self.documents)

    def _entropies(self, chunk: ByteChunk) -> Tensor:
        with evaluating(self.patcher):
            return self.patcher.entropies(self.patcher.known_ids(chunk.input_ids), chunk, None)


@dataclass(frozen=True)
class BltPatch:
    """One patch of a row.

    Attributes:
        start, stop: positions in the row.
        input_ids: its ids.
        entropy: nats before its first byte, which decided that it starts there; None: nothing was computed.
    """

    start: int
    stop: int
    input_ids: list[int]
    entropy: float | None

    @property
    def bytes(self) -> bytes:
        """Its bytes; special tokens have none."""
        return bytes_of(self.input_ids)

    @property
    def text(self) -> str:
        """Its bytes as text. A byte of a character that lies in two patches is written as `\\xc3`."""
        return _as_text(self.input_ids, "backslashreplace")


@dataclass
class BltPatches:
    """The patches of one text. Made by `model.get_patches`; a notebook shows it as a picture.

    It is a sequence of [`BltPatch`]: `len(patches)`, `patches[0].text`, `for patch in patches`.

    Attributes:
        input_ids: ids of the row, without padding.
        patch_lengths: ids in each patch; they sum to `len(input_ids)`.
        entropies: nats of the byte after each byte, as in the output of a forward; None: the rule reads none.
        is_last_complete: the last patch has ended; any next byte starts another.
        rule: the [`PatchingRule`] that was applied.
    """

    input_ids: list[int]
    patch_lengths: list[int]
    entropies: list[float] | None
    is_last_complete: bool
    rule: PatchingRule

    @property
    def boundaries(self) -> list[int]:
        """Position at which each patch starts; the first is 0."""
        starts, position = [], 0
        for length in self.patch_lengths:
            starts.append(position)
            position += length
        return starts

    @property
    def entropies_before(self) -> list[float | None]:
        """Nats *before* each id, how hard it was to guess; None for the first, and without an entropy model."""
        if self.entropies is None:
            return [None] * len(self.input_ids)
        return [None, *self.entropies[:-1]]

    @property
    def limits(self) -> list[float | None]:
        """The value that the entropy before each id must exceed for a patch to start; None where it does not count.

        The threshold itself by the global rule; by the rules on rises, the entropy one byte earlier and the rise.
        """
        rule, before = self.rule, self.entropies_before
        if self.entropies is None or rule.mode != "entropy":
            return [None] * len(self.input_ids)
        limits: list[float | None] = [None, None][: len(before)]
        for position in range(2, len(before)):
            earlier = before[position - 1]
            if rule.monotonicity:
                limits.append(earlier + rule.threshold)
            elif rule.threshold_add is not None:
                limits.append(max(rule.threshold, earlier + rule.threshold_add))
            else:
                limits.append(rule.threshold)
        return limits

    @property
    def texts(self) -> list[str]:
        """The text of each patch, see [`BltPatch.text`]."""
        return [patch.text for patch in self]

    @property
    def text(self) -> str:
        """The whole text; special tokens by their names, bytes that are no UTF-8 as `\\xff`."""
        return _as_text(self.input_ids, "backslashreplace")

    @property
    def num_bytes(self) -> int:
        """Bytes of the text; special tokens are none."""
        return sum(map(_is_byte, self.input_ids))

    @property
    def num_patches(self) -> int:
        """Patches that start at a byte: the one that holds the BOS is not counted."""
        return sum(_is_byte(self.input_ids[start]) for start in self.boundaries)

    @property
    def bytes_per_patch(self) -> float:
        """`num_bytes / num_patches`; 0 for a text without bytes."""
        return self.num_bytes / self.num_patches if self.num_patches else 0.0

    @property
    def summary(self) -> str:
        """One line for a reader."""
        noun, patches = ("byte" if self.num_bytes == 1 else "bytes"), ("patch" if self.num_patches == 1 else "patches")
        line = f"{self.num_bytes} {noun} in {self.num_patches} {patches}, {self.bytes_per_patch:.2f} bytes a patch"
        return f"{line}; a patch starts {describe_rule(self.rule)}"

    def __len__(self) -> int:
        return len(self.patch_lengths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self.boundaries[index]
        stop = start + self.patch_lengths[index]
        return BltPatch(start, stop, self.input_ids[start:stop], self.entropies_before[start])

    def __iter__(self) -> Iterator[BltPatch]:
        before = self.entropies_before
        for start, length in zip(self.boundaries, self.patch_lengths):
            yield BltPatch(start, start + length, self.input_ids[start : start + length], before[start])

    def recut(self, rule: PatchingRule | None = None, **changes) -> "BltPatches":
        """Cuts the text by another rule, without the model: `patches.recut(threshold=2.0)`.

        Args:
            rule: the other rule; None: this one's.
            changes: fields of [`PatchingRule`] that differ from it.
        Raises:
            ValueError: a field that there is none of, or an entropy rule without entropies.
        """
        names = {field.name for field in dataclasses.fields(PatchingRule)}
        if unknown := sorted(set(changes) - names):
            raise ValueError(f"`recut` got {', '.join(map(repr, unknown))}; fields of a rule are {sorted(names)}.")
        rule = dataclasses.replace(self.rule if rule is None else rule, **changes)
        if rule.mode not in ("entropy", "space", "static", "byte"):
            raise ValueError(f"`mode` must be 'entropy', 'space', 'static' or 'byte'; got {rule.mode!r}.")
        if rule.mode == "entropy" and self.entropies is None:
            raise ValueError("the rule 'entropy' needs entropies, and these patches were found without; see `rule`.")
        ids = torch.tensor([self.input_ids])
        entropies = None if self.entropies is None else torch.tensor([self.entropies], dtype=torch.float32)
        positions = torch.arange(ids.shape[1])[None]
        ends = find_patch_ends(rule, ids, entropies, positions)
        return _from_lengths(self.input_ids, patch_lengths_from_ends(ends)[0].tolist(), self.entropies, rule)

    def to_dict(self) -> dict:
        """Returns all data in JSON's types; bytes of a patch as hexadecimal digits."""
        return {
            "text": self.text,
            "num_bytes": self.num_bytes,
            "num_patches": self.num_patches,
            "bytes_per_patch": self.bytes_per_patch,
            "is_last_complete": self.is_last_complete,
            "rule": dataclasses.asdict(self.rule),
            "input_ids": list(self.input_ids),
            "boundaries": self.boundaries,
            "patch_lengths": list(self.patch_lengths),
            "entropies": None if self.entropies is None else list(self.entropies),
            "patches": [
                {
                    "start": patch.start,
                    "stop": patch.stop,
                    "text": patch.text,
                    "bytes": patch.bytes.hex(),
                    "entropy": patch.entropy,
                }
                for patch in self
            ],
        }

    def __repr__(self) -> str:
        return f"BltPatches({self.summary}: {' '.join(map(repr, self.texts))})"

    def _repr_html_(self) -> str:
        return patches_html(self)


class BltPatchesList(list):
    """The [`BltPatches`] of several texts, in their order; a notebook shows them below each other."""

    @property
    def bytes_per_patch(self) -> float:
        """Over all texts; 0 without bytes."""
        patches = sum(row.num_patches for row in self)
        return sum(row.num_bytes for row in self) / patches if patches else 0.0

    def to_dict(self) -> list[dict]:
        return [row.to_dict() for row in self]

    def _repr_html_(self) -> str:
        return "".join(patches_html(row, with_style=index == 0) for index, row in enumerate(self))


def get_patches(
    model: nn.Module,
    inputs=None,
    attention_mask: Tensor | Sequence | None = None,
    *,
    input_ids: Tensor | Sequence | None = None,
    rule: PatchingRule | None = None,
    batch_size: int = 8,
) -> BltPatches | BltPatchesList:
    """Finds patches, entropies and boundaries of texts, as data: `model.get_patches(inputs, ...)`.

    Only the entropy model runs, if the rule needs it.

    Args:
        model: a BLT or a [`BltPatcher`].
        inputs: a text (str, or bytes of any kind; a BOS is put before it, and nothing in it is a special token),
            ids (a list or a tensor), a batch of either, or the result of a tokenizer or of `generate`.
        attention_mask: of ids; 0 is padding. It may end where a prompt ended: the ids after it, which were generated,
            are text up to the padding behind them. Without a mask, the config's `pad_token_id` (0 if it has none) at
            the ends of a row is padding, as `generate` reads it.
        input_ids: another name of `inputs`, for `get_patches(**tokenizer(texts, return_tensors="pt"))`.
        rule: patches by another [`PatchingRule`] than the config's. A [`BltPatcher`] has none of its own: without
            one it cuts at the threshold of the released models.
        batch_size: rows at a time.
    Returns:
        `BltPatches` of one text or one row of ids, `BltPatchesList` of a batch.
    Raises:
        ValueError: neither texts nor ids, ids outside the vocabulary, or a rule that reads entropies without an
            entropy model.

    Example: `model.get_patches("to be or not").texts` may be `['<s>', 't', 'o ', 'be ', 'or ', 'not']`.
    """
    if (inputs is None) == (input_ids is None):
        raise ValueError("`get_patches` needs either `inputs` or `input_ids`; got both or neither.")
    inputs = input_ids if inputs is None else inputs
    finder = PatchFinder.of(model)
    if rule is not None:
        finder = dataclasses.replace(finder, rule=rule)
    if finder.rule.mode == "entropy" and finder.patcher is None:
        raise ValueError(
            "`rule` reads entropies, and this model has no entropy model: give it one with `set_patcher`."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    config = model.config
    pad_token_id = getattr(config, "pad_token_id", None)
    rows, is_single = _read_rows(inputs, attention_mask, 0 if pad_token_id is None else pad_token_id)
    for row in rows:
        if wrong := [i for i in row if not 0 <= i < config.vocab_size]:
            raise ValueError(f"`inputs` holds the id {wrong[0]}; ids of 0 to {config.vocab_size - 1} are accepted.")
    found = BltPatchesList()
    for first in range(0, len(rows), batch_size):
        found += _find(finder, rows[first : first + batch_size], _input_device(model))
    return found[0] if is_single else found


def _input_device(model) -> torch.device:
    """Finds the device of inputs; for an offloaded model, whose weights are on `meta`, in the hooks of accelerate."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def _find(finder: PatchFinder, rows: list[list[int]], device: torch.device) -> Iterator[BltPatches]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    lengths, entropies = finder.patches(ids, mask)
    for index, row in enumerate(rows):
        nats = None if entropies is None else entropies[index, : len(row)].tolist()
        yield _from_lengths(row, [n for n in lengths[index].tolist() if n], nats, finder.rule)


def _from_lengths(
    input_ids: list[int], patch_lengths: list[int], entropies: list[float] | None, rule: PatchingRule
) -> BltPatches:
    """Makes patches of a model's lengths, which count the next byte."""
    is_last_complete = patch_lengths[-1] == 1
    lengths = patch_lengths[:-1] if is_last_complete else [*patch_lengths[:-1], patch_lengths[-1] - 1]
    return BltPatches(list(input_ids), lengths, entropies, is_last_complete, rule)


def _read_rows(inputs, attention_mask, pad_token_id: int) -> tuple[list[list[int]], bool]:
    """Returns rows of ids without padding, and whether one text came instead of a batch."""
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        inputs = inputs["input_ids"]
    inputs = getattr(inputs, "sequences", inputs)  # of `generate` with `return_dict_in_generate`
    if isinstance(inputs, (str, bytes, bytearray)):
        inputs, is_single = [inputs], True
    else:
        inputs = inputs.tolist() if hasattr(inputs, "tolist") else inputs
        if not isinstance(inputs, (list, tuple)):
            raise ValueError(
                "`inputs` must be a text (str or bytes), ids, a batch of either, or what a tokenizer or `generate` "
                f"returns; got {type(inputs).__name__}."
            )
        is_single = len(inputs) > 0 and isinstance(inputs[0], int)
        inputs = [inputs] if is_single else list(inputs)
    masks = [None] * len(inputs)
    if attention_mask is not None:
        masks = attention_mask.tolist() if hasattr(attention_mask, "tolist") else list(attention_mask)
        masks = [masks] if masks and isinstance(masks[0], int) else masks
        if len(masks) != len(inputs):
            raise ValueError(f"`attention_mask` has {len(masks)} rows and `inputs` {len(inputs)}; both need the same.")
    return [_read_row(row, mask, pad_token_id) for row, mask in zip(inputs, masks)], is_single


def _read_row(row, mask: list[int] | None, pad_token_id: int) -> list[int]:
    if isinstance(row, (str, bytes, bytearray)):
        if mask is not None:
            raise ValueError("`attention_mask` is for ids; a text has no padding.")
        return [BOS_TOKEN_ID, *byte_ids(row)]
    ids = row.tolist() if hasattr(row, "tolist") else list(row)
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"`inputs` must hold texts or rows of ids; got a row with {ids[:3]!r}.")
    known = 0 if mask is None else len(mask)
    if known > len(ids):
        raise ValueError(f"`attention_mask` has {known} columns, `inputs` {len(ids)}; at most as many are accepted.")
    kept = [i for i, is_text in zip(ids, mask or ()) if is_text]
    rest = ids[known:]
    while rest and rest[-1] == pad_token_id:
        rest.pop()
    while mask is None and rest and rest[0] == pad_token_id:
        rest.pop(0)
    if not kept and not rest:
        raise ValueError("`inputs` holds a row without ids; each row needs one or more.")
    return kept + rest


def _is_byte(token_id: int) -> bool:
    return BYTE_OFFSET <= token_id < VOCAB_SIZE


def _as_text(input_ids: Sequence[int], errors: str) -> str:
    data = bytearray()
    for i in input_ids:
        if _is_byte(i):
            data.append(i - BYTE_OFFSET)
        else:
            data += (SPECIAL_NAMES[i] if i < BYTE_OFFSET else f"<{i}>").encode()
    return data.decode("utf-8", errors)


__all__ = ["BltPatch", "BltPatches", "BltPatchesList", "PatchFinder", "evaluating", "get_patches"]
