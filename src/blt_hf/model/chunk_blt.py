"""The bytes of one forward: padding taken out, texts and documents found, patches numbered.

A full forward is a chunk on an empty cache, a decoding step a chunk of one byte; everything after this file sees rows
that begin with their first new byte and knows nothing of padding. Dimension letters as in `patching_blt.py`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_blt import AttentionSpan, SlotSpan
from .cache_blt import BltCache, RowState, SlotIndex, Slots, round_up_patches
from .checks_blt import check_attention_mask, check_position_ids
from .configuration_blt import BltConfig, BltPatcherConfig
from .layers_blt import OutputCollector, wants_weights
from .names_blt import is_compiling, is_exporting, kept_arange, largest_count, running_max, take_columns
from .patching_blt import EOS_TOKEN_ID, NEWLINE_ID, RowLayout, open_patch_bytes, shift_right


# Traced code has columns for at least so many patches; nothing reads the values of those that do not exist. With this
# lower bound the symbolic size takes none of the branches for few patches.
_LEAST_SYMBOLIC_PATCHES = 16


def _is_any_of(ids: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token_id in token_ids:
        found = found | (ids == token_id)
    return found


def _running_max(values: Tensor, carried: Tensor) -> Tensor:
    return running_max(torch.maximum(values, carried[:, None]), carried)


@dataclass(frozen=True)
class DocumentRules:
    """Says where documents end inside a row, besides `position_ids` that restart.

    Attributes:
        mask_documents: a document ends at each of `eos_token_ids`.
        newline_reset: the entropy model forgets the bytes before each newline.
    """

    mask_documents: bool = False
    newline_reset: bool = False
    eos_token_ids: tuple[int, ...] = (EOS_TOKEN_ID,)

    @classmethod
    def of(cls, config: BltConfig | BltPatcherConfig) -> "DocumentRules":
        """Reads the rules of a [`BltConfig`] or a [`BltPatcherConfig`]."""
        eos = config.eos_token_id
        ids = (EOS_TOKEN_ID,) if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return cls(bool(config.mask_documents), bool(getattr(config, "patching_newline_reset", False)), ids)


@dataclass
class ByteChunk:
    """Holds the new bytes of each row, from its first column on.

    Attributes:
        input_ids: int64 `(B, S)`; ids after a row's bytes are arbitrary. None with `inputs_embeds`.
        num_bytes: int64 `(B,)`, bytes of each row in this chunk; None: every column is text.
        row_positions: int64 `(B, S)`, index of each byte in its row.
        text_positions: int64 `(B, S)`, index of each byte in its text.
        previous: state of each row before the chunk; views of the cache, which hold until it counts the chunk.
        past_entropies: fp32 `(B, E)`, nats after the last bytes before the chunk, as many as the patching rule may ask.
        history: int64 `(B, H)`, ids before the chunk, as many as the hashes and the patching rule may ask; 0 before the
            text. None: there are none.
        cached_bytes: int64 `(B,)`, bytes of each row before the chunk; None: there are none.
        row_bytes: bytes of each row, on the host. Host-side fields are None in a decoding step, whose caller counts, and
            while traced, as values are unknown.
        num_croppable: on the host, columns at the chunk's end that are text in every row.
        is_small: the chunk is written to the slots of the cache first, and reads them then (see `cache_blt.py`).
        is_symbolic: a whole forward is traced, for texts of any length and number of patches.
        layout: where the bytes stood; None: at the beginning of their rows.
        text_starts: bool `(B, S)`, bytes at which `position_ids` begin a new text; None: only at the row's first byte.
        document_start, context_start: int64 `(B, S)`, row index of the first byte that each byte may see, in the
            encoder and decoder, and in the entropy model. None: all bytes before it.
        packed: a [`PackedStacks`] whose stacks run in the place of modules. None: all modules run.
        spans: of a small chunk, the spans made so far, by their settings.
    """

    input_ids: Tensor | None
    num_bytes: Tensor | None
    row_positions: Tensor
    text_positions: Tensor
    previous: RowState
    past_entropies: Tensor
    history: Tensor | None
    cached_bytes: Tensor | None
    row_bytes: list[int] | None = None
    num_croppable: int | None = None
    is_small: bool = False
    is_symbolic: bool = False
    layout: RowLayout | None = None
    text_starts: Tensor | None = None
    document_start: Tensor | None = None
    context_start: Tensor | None = None
    packed: object | None = None
    spans: dict = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.row_positions.device

    @property
    def num_columns(self) -> int:
        return self.row_positions.shape[1]

    @property
    def is_text(self) -> Tensor | None:
        """bool `(B, S)`: columns that hold a byte; None: all."""
        if self.num_bytes is None:
            return None
        return torch.arange(self.num_columns, device=self.device) < self.num_bytes[:, None]

    @property
    def lengths(self) -> Tensor:
        """int64 `(B,)`: `num_bytes`, also where every column is text."""
        return torch.full_like(self.previous.num_bytes, self.num_columns) if self.num_bytes is None else self.num_bytes

    def pack(self, values: Tensor) -> Tensor:
        return values if self.layout is None else self.layout.pack(values)

    def unpack(self, values: Tensor) -> Tensor:
        """Moves values from this chunk's columns to those of the caller; 0 at padding."""
        return values if self.layout is None else self.layout.unpack(values)

    def unpack_weights(self, weights: Tensor) -> Tensor:
        """Moves attention weights `(B, H, S, T)`, whose last `S` keys are this chunk's bytes, to the caller's columns."""
        if self.layout is None:
            return weights
        past = weights.shape[-1] - self.num_columns
        chunk = self.layout.unpack(weights[..., past:].permute(0, 3, 2, 1))
        weights = torch.cat([weights[..., :past], chunk.permute(0, 3, 2, 1)], dim=-1)
        return self.layout.unpack(weights.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)

    def slot_index(self, slots: Slots, num_past: int) -> SlotIndex:
        """Finds the slots of the bytes of this chunk; a large chunk also reads `num_past` bytes before it."""
        if self.is_small:
            return SlotIndex(index=slots.find(self.row_positions).flatten(), seen=slots.seen)
        before, past = self.previous.num_bytes, None
        if num_past:
            past = slots.find(before[:, None] + torch.arange(-num_past, 0, device=before.device))
        # A slot ends with the newest byte that falls on it. Byte `before + i` is column `i` of the chunk, so for older
        # bytes, which the slot keeps, the difference is negative.
        return SlotIndex(source=slots.held(before + self.lengths) - before[:, None], past=past)

    def span(
        self, cache: BltCache | None, window: int | None, implementation: str,
        collector: OutputCollector | None = None, of_patcher: bool = False,
    ) -> AttentionSpan:  # fmt: skip
        """Says which keys each byte sees in encoder and decoder, or in the entropy model.

        Args:
            cache: where keys are kept; None: nowhere.
            window: bytes that a byte sees, itself included; None: no limit.
            implementation: name in transformers' attention interface.
            collector: may keep attention weights; None: there is none.
        """
        start, slots = self.context_start if of_patcher else self.document_start, None
        if cache is not None:
            slots = cache.patcher_slots if of_patcher else cache.local_slots
        if self.is_small:
            # Stacks of equal windows share a mask. torch 2.11 does not compile `id(None)`.
            key = slots.size, window, None if start is None else id(start), implementation
            if key not in self.spans:
                num_slots, slot_index = slots.seen or slots.size, self.slot_index(slots, 0)
                self.spans[key] = SlotSpan(num_slots, self.row_positions, window, start, implementation, slot_index)
            return self.spans[key]
        num_past, slot_index, first_key = 0, None, None
        if cache is not None:
            longest = max(cache.row_bytes)
            num_past = longest if window is None else min(longest, window - 1)
            slot_index = self.slot_index(slots, num_past)
        if start is not None or (num_past and num_past > min(cache.row_bytes)):  # rows shorter than the past hide keys
            offset = num_past if self.cached_bytes is None else num_past - self.cached_bytes[:, None]
            first_key = (offset.expand(-1, self.num_columns) if start is None else start + offset).clamp_min(0)
        elif is_exporting():  # a span is one for all lengths there, so it always goes block by block
            first_key = torch.zeros_like(self.row_positions)
        in_one_piece = wants_weights(collector)
        return AttentionSpan(num_past, self.num_columns, window, first_key, implementation, in_one_piece, slot_index)


def make_chunk(
    input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, cache: BltCache | None,
    shape: tuple[int, int], device: torch.device, rules: DocumentRules, in_order: bool = False,
) -> ByteChunk:  # fmt: skip
    """Makes a chunk of a caller's arguments.

    Args:
        input_ids: int64 `(B, S)`; None with `inputs_embeds`.
        attention_mask: `(B, S)` or `(B, past + S)`; zeros may stand on either side, or between texts.
        position_ids: `(B or 1, S)`; only where they begin anew matters, as the positions of this model are relative.
        cache: holds the bytes before; None: there are none, and nothing is kept.
        shape: `(B, S)`.
        in_order: treat few bytes as a large chunk, too: its keys are in order, so attention weights can be returned.
    Raises:
        ValueError: a shape does not fit.
    """
    rows, columns = shape
    if torch.jit.is_tracing():
        raise ValueError(
            "`torch.jit.trace` would keep the numbers of bytes and patches of its example; use `torch.export`, or "
            "`torch.onnx.export` with `dynamo=True`."
        )
    is_empty = cache is None or cache.is_empty
    if not is_empty and len(cache.row_bytes) != rows:
        raise ValueError(
            f"`past_key_values` holds {len(cache.row_bytes)} rows and the input has {rows}; "
            "they must be the same rows, in the same order."
        )
    is_symbolic = cache is None and is_compiling()
    layout, row_bytes, num_croppable = _find_text(
        attention_mask, shape, 0 if is_empty else cache.seq_length, is_symbolic
    )
    if layout is not None and input_ids is not None:
        input_ids = layout.pack(input_ids)
    num_bytes = None if layout is None else layout.num_bytes
    chunk = _continue_rows(input_ids, num_bytes, shape, device, None if is_empty else cache)
    chunk.row_bytes, chunk.num_croppable, chunk.layout = row_bytes, num_croppable, layout
    chunk.is_symbolic = is_symbolic
    chunk.is_small = not in_order and not is_empty and cache.is_small(columns)
    _find_texts(chunk, position_ids)
    _find_documents(chunk, not is_empty and cache.has_documents, rules)
    return chunk


def next_bytes(input_ids: Tensor, lengths: Tensor | None, cache: BltCache, rules: DocumentRules) -> ByteChunk:
    """Makes a small chunk of the next bytes `(B, S)` of each row, without padding or texts to look for.

    Args:
        lengths: int64 `(B,)`, how many of them count in each row; None: all.
        cache: holds at least one byte of some row.
    """
    chunk = _continue_rows(input_ids, lengths, input_ids.shape, input_ids.device, cache)
    chunk.is_small = True
    _find_documents(chunk, cache.has_documents, rules)
    return chunk


def _continue_rows(
    input_ids: Tensor | None, num_bytes: Tensor | None, shape: tuple[int, int], device: torch.device,
    cache: BltCache | None,
) -> ByteChunk:  # fmt: skip
    """Makes a chunk behind the bytes of `cache` (None: of empty rows), whose columns are text."""
    rows, columns = shape
    index = None if columns == 1 and cache is not None else kept_arange(0, columns, device)
    if cache is None:
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        previous, entropies, history = RowState(*[zeros] * len(RowState._fields)), zeros.float()[:, None], None
        positions = text_positions = index.expand(rows, -1)
    else:
        # Nothing of the cache that the host counts is read here: a compiled step would depend on it.
        previous, entropies, history = cache.history.state, cache.history.last_entropies, cache.history.last_ids
        positions = text_positions = previous.num_bytes[:, None]
        if index is not None:
            positions = text_positions = positions + index
        if cache.has_documents:  # a text may have begun behind the first byte of a row
            text_positions = previous.text_bytes[:, None] if index is None else previous.text_bytes[:, None] + index
    cached_bytes = None if cache is None else previous.num_bytes
    return ByteChunk(input_ids, num_bytes, positions, text_positions, previous, entropies, history, cached_bytes)


def _find_text(
    attention_mask: Tensor | None, shape: tuple[int, int], past_columns: int, is_symbolic: bool
) -> tuple[RowLayout | None, list[int] | None, int | None]:
    """Reads a mask: where the text stands (None: in every column), bytes of each row, columns at the end that are text."""
    rows, columns = shape
    if attention_mask is None:
        return (None, None, None) if is_symbolic else (None, [columns] * rows, columns)
    attention_mask = check_attention_mask(attention_mask, rows, columns, past_columns)
    if is_symbolic:
        return RowLayout.from_mask(attention_mask), None, None
    is_text = attention_mask != 0
    text_at_end = is_text.flip(1).long().cumprod(dim=1).sum(dim=1)
    # In one transfer.
    row_bytes, at_end = torch.stack([is_text.sum(dim=1), text_at_end]).tolist()
    if past_columns == 0 and not any(row_bytes):
        raise ValueError("`attention_mask` leaves no text in any row; it must be 1 (text) somewhere.")
    layout = RowLayout.from_mask(attention_mask) if min(row_bytes) < columns else None
    return layout, row_bytes, min(at_end)


def _find_texts(chunk: ByteChunk, position_ids: Tensor | None) -> None:
    """Sets `text_starts` and `text_positions`, if `position_ids` begin another text inside a row."""
    if position_ids is None:
        return
    rows, columns = chunk.row_positions.shape
    position_ids = chunk.pack(check_position_ids(position_ids, rows, columns))
    chunk.text_starts = _find_text_starts(chunk, position_ids)
    if chunk.text_starts is not None:
        index = torch.arange(columns, device=position_ids.device)
        before = -chunk.previous.text_bytes  # a text that goes on began so many columns before the chunk
        chunk.text_positions = index - running_max(torch.where(chunk.text_starts, index, before[:, None]), before)


def _find_text_starts(chunk: ByteChunk, position_ids: Tensor) -> Tensor | None:
    """Finds where `position_ids` `(B, S)`, packed as the chunk, begin another text inside a row, bool `(B, S)`.

    Returns:
        None: nowhere. Never None while traced, as values are unknown then; there is no cache either.
    Raises:
        ValueError: positions neither rise by 1 nor begin anew at 0. (In the first column any position may stand.)
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    is_text = index < chunk.lengths[:, None]
    if chunk.is_symbolic:
        before = shift_right(position_ids, position_ids[:, 0])
        return (position_ids != before + 1) & (index > 0) & is_text
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1  # transformers' own rule for packed rows
    begins = torch.zeros_like(position_ids[:, :1], dtype=torch.bool)
    if chunk.cached_bytes is not None:
        begins = (position_ids[:, :1] == 0) & (chunk.cached_bytes[:, None] > 0)
    starts = torch.cat([begins, breaks], dim=1) & is_text
    wrong = starts & (position_ids != 0)
    # Both in one transfer.
    has_starts, has_wrong = torch.stack([starts.any(), wrong.any()]).tolist()
    if has_wrong:
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of `position_ids` goes from {int(position_ids[row, column - 1])} to "
            f"{int(position_ids[row, column])} (padding not counted); accepted are positions that rise by 1 from byte "
            "to byte, and begin anew at 0 where another text begins."
        )
    return starts if has_starts else None


def _find_documents(chunk: ByteChunk, holds_documents: bool, rules: DocumentRules) -> None:
    """Sets `document_start` and `context_start`, if some row may hold more than one document."""
    may_hold_documents = chunk.text_starts is not None or holds_documents
    if not (may_hold_documents or rules.mask_documents or rules.newline_reset):
        return
    if chunk.input_ids is None and (rules.mask_documents or rules.newline_reset):
        raise ValueError(
            "document boundaries are read from `input_ids`; with `inputs_embeds` set them by `position_ids`."
        )
    positions = chunk.row_positions
    begins = torch.zeros_like(positions, dtype=torch.bool) if chunk.text_starts is None else chunk.text_starts
    previous_ids = None if chunk.input_ids is None else shift_right(chunk.input_ids, chunk.previous.input_id)
    if rules.mask_documents:
        begins = begins | (_is_any_of(previous_ids, rules.eos_token_ids) & (positions > 0))
    if may_hold_documents or rules.mask_documents:
        chunk.document_start = _running_max(positions * begins, chunk.previous.document_start)
    if rules.newline_reset:
        begins = begins | ((previous_ids == NEWLINE_ID) & (positions > 0))
    chunk.context_start = _running_max(positions * begins, chunk.previous.context_start)


@dataclass
class PatchAssignment:
    """Says which patch holds each byte, and which one it reads.

    Attributes:
        ends: bool `(B, S)`, bytes that end a patch by the rule.
        closes: bool `(B, S)`, `ends`, and the last byte of each text that is followed by another in the row. Closing
            there keeps a patch from spanning two texts; nobody reads the latent of that patch.
        entries: int64 `(B, S, F)`, the chunk's entries for the history: a [`RowState`] after each byte.
        read_patch: int64 `(B, S)`, index in its row of the patch that each byte reads; -1: none yet.
        for_host: int64 `(B, 4)`, from which [`HostPatchCounts`] are made.
    """

    ends: Tensor
    closes: Tensor
    entries: Tensor
    read_patch: Tensor
    for_host: Tensor

    def field(self, name: str) -> Tensor:
        """Takes a field of the entries, int64 `(B, S)`."""
        return self.entries[..., RowState._fields.index(name)]

    @property
    def num_new(self) -> Tensor:
        """int64 `(B,)`, patches closed in this chunk."""
        return self.for_host[:, 1] - self.for_host[:, 0]


@dataclass
class HostPatchCounts:
    """Holds on the host the counts of a chunk's patches.

    Attributes:
        old, new: patches closed before the chunk and in it, of each row; `max_new`: the most new ones.
        seen: slots of the global transformer's cache to read, so that all of a row's patches are among them.
        max_open_bytes: bytes of the longest open patch after any byte.
        last_ids: id in the last column of each row.
    """

    old: list[int]
    new: list[int]
    max_new: int
    seen: int
    max_open_bytes: int
    last_ids: list[int]

    @classmethod
    def symbolic(cls, patches: PatchAssignment) -> "HostPatchCounts":
        """Makes `max_new` a symbolic size, in traced code; only caches need the other counts."""
        return cls([], [], largest_count(patches.num_new, _LEAST_SYMBOLIC_PATCHES), 0, 0, [])

    @classmethod
    def of(cls, patches: PatchAssignment) -> "HostPatchCounts":
        """Asks the device for the counts and the last bytes: the one place where a forward waits for the device."""
        rows = patches.for_host.tolist()
        if len(rows) == 1:
            old, after, open_bytes, last_id = rows[0]
            return cls([old], [after - old], after - old, round_up_patches(after), open_bytes, [last_id])
        old, after, open_bytes, last_ids = map(list, zip(*rows))
        new = [a - o for a, o in zip(after, old)]
        max_new = max(new)
        return cls(old, new, max_new, round_up_patches(max(old) + max_new), max(open_bytes), last_ids)


class ClosingInputs(NamedTuple):
    """Lists the bytes that the patches closed by a chunk are made of, and the slots that these patches see.

    Attributes:
        new_patches: int64 `0 .. P - 1`, for up to `P` patches of a row.
        seen_slots: int64 `0, 1, ...`, slots of the global transformer's cache to read; empty: these patches are the first.
        byte_offsets: int64 `(T,)`, in a small chunk: offsets of the last `T` bytes from the chunk's first byte; all bytes
            of the new patches are among them.
        rows: int64 `(R,)`, rows that close a patch. None: every row runs; results of rows that close none are not read.
        sees_all: there is one new patch of one row, which may see all `seen_slots`.
        words: result of [`BltLexicon.read`] for the patches; None: they are not read through a lexicon.
    """

    new_patches: Tensor
    seen_slots: Tensor
    byte_offsets: Tensor | None = None
    rows: Tensor | None = None
    sees_all: bool = False
    words: tuple[Tensor, Tensor] | None = None


def assign_patches(chunk: ByteChunk, ends: Tensor, rules: DocumentRules) -> PatchAssignment:
    """Numbers the patches that `ends` `(B, S)` closes, without waiting for the device."""
    previous, is_text, is_one = chunk.previous, chunk.is_text, chunk.num_columns == 1 and chunk.is_small
    if is_text is not None:
        ends = ends & is_text
    closes, unread, previous_open = ends, None, previous.open_bytes
    if chunk.text_starts is not None:
        none = torch.zeros_like(ends[:, :1])
        unread = take_columns(torch.cat([chunk.text_starts, none], dim=1), 1, ends.shape[1] + 1) & ~ends
        closes = ends | unread
        # A patch that was open when another text begins is never closed.
        previous_open = torch.where(chunk.text_starts[:, 0], torch.zeros_like(previous_open), previous_open)
    num_patches = previous.num_patches[:, None] + (closes if is_one else closes.cumsum(dim=1, dtype=torch.int64))
    read_patch = num_patches - 1 if unread is None else num_patches - 1 - unread.long()
    byte_patch = previous.num_patches[:, None] if is_one else num_patches - closes.long()
    open_bytes = open_patch_bytes(closes, previous_open)
    if is_text is not None:
        open_bytes = open_bytes.masked_fill(~is_text, 0)
    text_bytes = chunk.text_positions + 1
    num_bytes = text_bytes if chunk.text_positions is chunk.row_positions else chunk.row_positions + 1
    document_start = context_start = of_patch = of_later = zeros = previous.document_start[:, None].expand_as(
        read_patch
    )
    if chunk.document_start is not None:
        document_start = chunk.document_start
        of_patch, of_later = _patch_document_starts(chunk, closes, byte_patch, previous_open, rules)
    if chunk.context_start is not None:
        context_start = chunk.context_start
    fields = RowState(
        input_id=zeros if chunk.input_ids is None else chunk.input_ids,
        num_bytes=num_bytes,
        num_patches=num_patches,
        text_bytes=text_bytes,
        open_bytes=open_bytes,
        byte_patch=byte_patch,
        document_start=document_start,
        context_start=context_start,
        patch_document_start=of_patch,
        next_patch_document_start=of_later,
    )
    if is_one:
        for_host = torch.cat([byte_patch, num_patches, open_bytes, fields.input_id], dim=1)
    else:
        longest = open_bytes.amax(dim=1)
        for_host = torch.stack([previous.num_patches, num_patches[:, -1], longest, fields.input_id[:, -1]], dim=1)
    return PatchAssignment(ends, closes, torch.stack(fields, dim=-1), read_patch, for_host)


def first_visible_patches(patches: PatchAssignment, new: Tensor) -> Tensor:
    """Finds the first patch of its row that each of the `new` patches `0 .. P - 1` may see, int64 `(B, P)`."""
    num_new = new.shape[0]
    column = torch.where(patches.closes, patches.closes.long().cumsum(dim=1) - 1, num_new).clamp_max(num_new)
    first = torch.zeros(column.shape[0], num_new + 1, dtype=torch.int64, device=column.device)
    return take_columns(first.scatter(1, column, patches.field("patch_document_start")), 0, num_new)


def _patch_document_starts(chunk, closes, byte_patch, previous_open, rules: DocumentRules) -> tuple[Tensor, Tensor]:
    """Finds the first patch that the patch of each byte may see, and that later patches may see; both int64 `(B, S)`.

    A text that `position_ids` begin starts with a patch of its own. An `eos` in the middle of a patch leaves that
    patch wholly in the earlier document (recorded behaviour of Meta's reference).
    """
    starts = chunk.text_starts
    begins = torch.zeros_like(byte_patch) if starts is None else byte_patch * starts
    of_later = begins
    if rules.mask_documents:
        of_later = torch.maximum(of_later, (byte_patch + 1) * _is_any_of(chunk.input_ids, rules.eos_token_ids))
    of_later = _running_max(of_later, chunk.previous.next_patch_document_start)
    starts_patch = shift_right(closes, previous_open == 0)
    before = shift_right(of_later, chunk.previous.next_patch_document_start)
    of_patch = torch.where(starts_patch, torch.maximum(before, begins), 0)
    return _running_max(of_patch, chunk.previous.patch_document_start), of_later
