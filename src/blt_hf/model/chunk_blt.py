"""The bytes of one forward: padding taken out, texts and documents found, patches numbered.

A full forward is a chunk on an empty cache, a decoding step a chunk of one byte; everything after this file sees rows
that begin with their first new byte and knows nothing of padding. Dimension letters as in `patching_blt.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_blt import AttentionSpan, SlotSpan
from .cache_blt import BltCache, ByteLog, SlotAccess, Slots, log_field, round_up_columns
from .checks_blt import check_attention_mask, check_position_ids, find_text_starts
from .patching_blt import EOS_TOKEN_ID, NEWLINE_ID, RowLayout, open_patch_bytes, shift_right
from .tracing_blt import is_compiling, is_exporting, largest_count, running_max, take_columns


# Traced code has columns for so many patches at least (more than there are hold values that nothing reads): a symbol of
# which that is known takes no branch that is made for few patches.
_LEAST_TRACED_PATCHES = 16


def _is_any_of(ids: Tensor, token_id: int | list[int]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for one in [token_id] if isinstance(token_id, int) else token_id:
        found = found | (ids == one)
    return found


def _running_max(values: Tensor, carried: Tensor) -> Tensor:
    """Running maximum along the row, that starts from `carried` `(B,)`."""
    return running_max(torch.maximum(values, carried[:, None]), carried)


@dataclass
class ByteChunk:
    """New bytes of each row, from its first column on.

    Attributes:
        input_ids: int64 `(B, S)`; ids after a row's bytes are whatever the padding was. None with `inputs_embeds`.
        num_bytes: int64 `(B,)`, bytes of each row in this chunk; `row_bytes` on the host. (What is on the host is None in
            a step, whose caller counts, and in traced code, where values are not known.)
        is_small: it is written to the slots of the cache first, and reads them then (see `cache_blt.py`).
        num_croppable: columns at the chunk's end that are text in every row.
        layout: where the bytes stood; None: every column is text.
        row_positions: int64 `(B, S)`, index of each byte in its row.
        text_positions: int64 `(B, S)`, index of each byte in its text.
        text_starts: bool `(B, S)`, bytes at which `position_ids` begin a new text; None: only at the row's first byte.
        document_start, context_start: int64 `(B, S)`, row index of the first byte that each byte may see, in the
            encoder and decoder, and in the entropy model. None: all bytes before it.
        previous: last log entry of each row, field by field (zeros in an empty cache).
        history: int64 `(B, H)`, ids before the chunk, as many as the hashes and the patching rule may ask.
        past_entropies: fp32 `(B, H)`, nats after the last bytes before the chunk, as many as the patching rule may ask.
        cached_bytes: int64 `(B,)`, bytes of each row before the chunk; None: there are none.
        is_partial: some columns at the end of rows hold no byte, though there is no `layout`.
    """

    input_ids: Tensor | None
    num_bytes: Tensor
    row_bytes: list[int] | None
    is_small: bool
    num_croppable: int | None
    layout: RowLayout | None
    row_positions: Tensor
    text_positions: Tensor
    previous: dict[str, Tensor]
    past_entropies: Tensor
    history: Tensor | None
    cached_bytes: Tensor | None
    is_partial: bool = False
    text_starts: Tensor | None = None
    document_start: Tensor | None = None
    context_start: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.row_positions.shape[1]

    @property
    def is_traced(self) -> bool:
        """`torch.compile` or `torch.export` records a whole forward, for texts of any length and number of patches."""
        return self.row_bytes is None and not self.is_small

    @property
    def has_documents(self) -> bool:
        return self.text_starts is not None

    @property
    def is_text(self) -> Tensor | None:
        """bool `(B, S)`: columns that hold a byte; None: all."""
        if self.layout is None and not self.is_partial:
            return None
        return torch.arange(self.num_columns, device=self.num_bytes.device) < self.num_bytes[:, None]

    def pack(self, values: Tensor) -> Tensor:
        return values if self.layout is None else self.layout.pack(values)

    def unpack(self, values: Tensor) -> Tensor:
        """From this chunk's columns to those of the caller; 0 at padding."""
        return values if self.layout is None else self.layout.unpack(values)

    def unpack_weights(self, weights: Tensor) -> Tensor:
        """The same for attention weights `(B, H, S, T)`, whose last `S` keys are this chunk's bytes."""
        if self.layout is None:
            return weights
        past = weights.shape[-1] - self.num_columns
        chunk = self.layout.unpack(weights[..., past:].permute(0, 3, 2, 1))
        weights = torch.cat([weights[..., :past], chunk.permute(0, 3, 2, 1)], dim=-1)
        return self.layout.unpack(weights.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)

    @property
    def previous_entropy(self) -> Tensor:
        """fp32 `(B,)`, nats after the last byte before the chunk."""
        return self.past_entropies[:, -1]

    def access(self, slots: Slots, num_past: int) -> SlotAccess:
        """Where the bytes of this chunk go in slots of bytes; a large chunk also reads `num_past` bytes before it."""
        if self.is_small:
            return SlotAccess(index=slots.find(self.row_positions).flatten())
        before = torch.zeros_like(self.num_bytes) if self.cached_bytes is None else self.cached_bytes
        past = None
        if num_past:
            past = slots.find(before[:, None] + torch.arange(-num_past, 0, device=before.device))
        return SlotAccess(source=slots.held(before + self.num_bytes) - before[:, None], past=past)

    def span(
        self,
        cache: BltCache | None,
        slots: Slots | None,
        window: int | None,
        start: Tensor | None,
        implementation: str,
        wants_weights: bool = False,
    ) -> AttentionSpan:
        """Keys of each byte.

        Args:
            cache, slots: where keys are kept; None: nowhere.
            window: bytes that a byte sees, itself included; None: no limit.
            start: `document_start`, `context_start` or None.
        """
        if self.is_small:
            last = self.cached_bytes + self.num_columns
            return SlotSpan(slots.held(last), self.row_positions, window, start, implementation, self.access(slots, 0))
        num_past, access = 0, None
        if cache is not None:
            longest = max(cache.row_bytes)
            num_past = longest if window is None else min(longest, window - 1)
            access = self.access(slots, num_past)
        first_key = self._first_key(start, num_past, 0 if cache is None else cache.min_bytes)
        return AttentionSpan(num_past, self.num_columns, window, first_key, implementation, wants_weights, access)

    def _first_key(self, start: Tensor | None, num_past: int, min_cached_bytes: int) -> Tensor | None:
        """First visible key of each byte, as an index into `[past | chunk]` `(B, S)`; None: nothing to hide.

        Args:
            start: `document_start`, `context_start` or None.
            num_past: keys in the past.
            min_cached_bytes: lower bound of the bytes that each row has in the cache.
        """
        if start is None and num_past <= min_cached_bytes:
            # An exported span is one for all lengths, so it always goes block by block.
            return torch.zeros_like(self.row_positions) if is_exporting() else None
        offset = num_past if self.cached_bytes is None else num_past - self.cached_bytes[:, None]
        if start is None:
            return offset.clamp_min(0).expand(-1, self.num_columns)
        return (start + offset).clamp_min(0)


def make_chunk(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: BltCache | None,
    shape: tuple[int, int],
    device: torch.device,
    mask_documents: bool = False,
    newline_reset: bool = False,
    eos_token_id: int | list[int] | None = None,
    in_order: bool = False,
) -> ByteChunk:
    """Reads what the caller says about the rows of a chunk.

    Args:
        input_ids: int64 `(B, S)`; None with `inputs_embeds`.
        attention_mask: `(B, S)` or `(B, past + S)`; zeros may stand on either side, or between texts.
        position_ids: `(B or 1, S)`; only where they begin anew matters, as the positions of this model are relative.
        cache: what came before; None: nothing, and nothing is kept.
        shape: `(B, S)`.
        mask_documents: a document ends at each `eos_token_id`.
        newline_reset: the entropy model forgets what came before each newline.
        in_order: attention is to see its keys in their order, however few bytes come.
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
    is_traced = cache is None and is_compiling()
    layout, row_bytes, num_croppable = _find_text(
        attention_mask, shape, 0 if is_empty else cache.seq_length, is_traced
    )
    if layout is None:
        num_bytes = torch.full((rows,), columns, dtype=torch.int64, device=device)
    else:
        num_bytes = layout.num_bytes
        input_ids = None if input_ids is None else layout.pack(input_ids)
    past = _Past.none(rows, device) if is_empty else _Past.of(cache)
    index = torch.arange(columns, device=device)
    chunk = ByteChunk(
        input_ids=input_ids,
        num_bytes=num_bytes,
        row_bytes=row_bytes,
        is_small=not in_order and not is_empty and cache.is_small(columns),
        num_croppable=num_croppable,
        layout=layout,
        row_positions=index.expand(rows, -1) if past.num_bytes is None else past.num_bytes[:, None] + index,
        text_positions=index + past.state["position"][:, None] + 1,
        previous=past.state,
        past_entropies=past.entropies,
        history=past.ids,
        cached_bytes=past.num_bytes,
    )
    _find_texts(chunk, position_ids)
    _find_documents(chunk, not is_empty and cache.has_documents, mask_documents, newline_reset, eos_token_id)
    return chunk


def next_bytes(
    input_ids: Tensor,
    lengths: Tensor | None,
    cache: BltCache,
    mask_documents: bool = False,
    newline_reset: bool = False,
    eos_token_id: int | list[int] | None = None,
) -> ByteChunk:
    """A small chunk without padding or texts to look for: the next bytes `(B, S)` of each row.

    Args:
        lengths: int64 `(B,)`, how many of them count in each row; None: all.
        cache: holds at least one byte of some row.
        mask_documents, newline_reset, eos_token_id: as in [`make_chunk`].
    """
    rows, columns = input_ids.shape
    past = _Past.of(cache)
    index = torch.arange(columns, device=input_ids.device)
    chunk = ByteChunk(
        input_ids=input_ids,
        num_bytes=torch.full_like(past.num_bytes, columns) if lengths is None else lengths,
        row_bytes=None,
        is_small=True,
        num_croppable=None,
        layout=None,
        row_positions=past.num_bytes[:, None] + index,
        text_positions=index + past.state["position"][:, None] + 1,
        previous=past.state,
        past_entropies=past.entropies,
        history=past.ids,
        cached_bytes=past.num_bytes,
        is_partial=lengths is not None,
    )
    _find_documents(chunk, cache.has_documents, mask_documents, newline_reset, eos_token_id)
    return chunk


def _find_text(
    attention_mask: Tensor | None, shape: tuple[int, int], past_columns: int, is_traced: bool
) -> tuple[RowLayout | None, list[int] | None, int | None]:
    """Where the text of a chunk stands (None: in every column), its bytes in each row, and the columns at the end that
    are text in every row."""
    rows, columns = shape
    if attention_mask is None:
        return (None, None, None) if is_traced else (None, [columns] * rows, columns)
    attention_mask = check_attention_mask(attention_mask, rows, columns, past_columns)
    if is_traced:
        return RowLayout.from_mask(attention_mask), None, None
    is_text = attention_mask != 0
    text_at_end = is_text.flip(1).long().cumprod(dim=1).sum(dim=1)
    # One transfer for what the host must know.
    row_bytes, at_end = torch.stack([is_text.sum(dim=1), text_at_end]).tolist()
    if past_columns == 0 and not any(row_bytes):
        raise ValueError("`attention_mask` leaves no text in any row; it must be 1 (text) somewhere.")
    layout = RowLayout.from_mask(attention_mask) if min(row_bytes) < columns else None
    return layout, row_bytes, min(at_end)


@dataclass
class _Past:
    """What the new bytes of a row follow: bytes before them (None: none), and the last entry of the log.

    `ids` are those before the chunk, as many as the hashes and the patching rule may ask; `entropies` as many as the
    rule may ask.
    """

    num_bytes: Tensor | None
    state: dict[str, Tensor]
    entropies: Tensor
    ids: Tensor | None

    @classmethod
    def none(cls, rows: int, device: torch.device) -> "_Past":
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        state = {**dict.fromkeys(ByteLog.FIELDS, zeros), "position": zeros - 1}
        return cls(None, state, zeros.float()[:, None], None)

    @classmethod
    def of(cls, cache: BltCache) -> "_Past":
        # Nothing of the cache that the host counts is read here: a compiled step would depend on it.
        counts = cache.num_bytes
        entries = cache.log.last(counts, max(cache.num_hash_bytes, 1))
        # A row without text so far has no state.
        has_text = counts > 0
        state = dict(zip(ByteLog.FIELDS, torch.where(has_text[:, None], entries[:, -1], 0).unbind(-1)))
        state["position"] = torch.where(has_text, state["position"], -1)
        return cls(
            # A copy, because the counter itself goes on.
            counts.clone(),
            state,
            cache.log.last_entropies(counts, cache.num_rule_entropies),
            log_field(entries, "input_id") if cache.num_hash_bytes else None,
        )


def _find_texts(chunk: ByteChunk, position_ids: Tensor | None) -> None:
    """Sets where `position_ids` begin another text inside a row, and the positions in it."""
    if position_ids is None:
        return
    rows, columns = chunk.row_positions.shape
    position_ids = check_position_ids(position_ids, rows, columns)
    if not chunk.is_traced and columns == 1 and chunk.cached_bytes is None:
        return
    position_ids = chunk.pack(position_ids)
    chunk.text_starts = find_text_starts(position_ids, chunk.num_bytes, chunk.cached_bytes, chunk.is_traced)
    if chunk.text_starts is not None:
        index = torch.arange(columns, device=position_ids.device)
        before = -1 - chunk.previous["position"]
        chunk.text_positions = index - running_max(torch.where(chunk.text_starts, index, before[:, None]), before)


def _find_documents(
    chunk: ByteChunk,
    holds_documents: bool,
    mask_documents: bool,
    newline_reset: bool,
    eos_token_id: int | list[int] | None,
) -> None:
    """Sets the first byte that each byte may see, if there is more than one document in some row."""
    may_hold_documents = chunk.text_starts is not None or holds_documents
    if not (may_hold_documents or mask_documents or newline_reset):
        return
    if chunk.input_ids is None and (mask_documents or newline_reset):
        raise ValueError(
            "document boundaries are read from `input_ids`; with `inputs_embeds` set them by `position_ids`."
        )
    positions = chunk.row_positions
    begins = torch.zeros_like(positions, dtype=torch.bool) if chunk.text_starts is None else chunk.text_starts
    previous_ids = None if chunk.input_ids is None else shift_right(chunk.input_ids, chunk.previous["input_id"])
    if mask_documents:
        eos_token_id = EOS_TOKEN_ID if eos_token_id is None else eos_token_id
        begins = begins | (_is_any_of(previous_ids, eos_token_id) & (positions > 0))
    if may_hold_documents or mask_documents:
        chunk.document_start = _running_max(positions * begins, chunk.previous["document_start"])
    if newline_reset:
        begins = begins | ((previous_ids == NEWLINE_ID) & (positions > 0))
    chunk.context_start = _running_max(positions * begins, chunk.previous["context_start"])


@dataclass
class PatchNumbers:
    """Which patch holds each byte, and which it reads. New patches of a row are numbered from 0 in this chunk.

    Attributes:
        ends: bool `(B, S)`, bytes that end a patch by the rule.
        closes: bool `(B, S)`, `ends`, and the last byte of each text that is followed by another in the row: its
            patch gets a latent that nobody reads, so that patches never mix texts.
        num_new: int64 `(B,)`, patches closed in this chunk.
        byte_patch: int64 `(B, S)`, index in its row of the patch that holds each byte.
        read: int64 `(B, S)`, new patch that each byte reads; -1 is the last one closed before the chunk.
        facts: int64 `(3, B)`, for [`PatchCounts`].
        log: the chunk's entries for [`ByteLog`], integers `(B, S, F)`.
    """

    ends: Tensor
    closes: Tensor
    num_new: Tensor
    byte_patch: Tensor
    read: Tensor
    facts: Tensor
    log: Tensor


@dataclass
class PatchCounts:
    """What the host knows of the patches of a chunk.

    Attributes:
        old, new: patches closed before the chunk and in it, of each row; `max_new`: the most new ones.
        seen: columns of the global transformer's cache to read, so that all of a row's patches are among them.
        max_open_bytes: bytes of the longest open patch after any byte.
    """

    old: list[int]
    new: list[int]
    max_new: int
    seen: int
    max_open_bytes: int

    @classmethod
    def traced(cls, numbers: PatchNumbers) -> "PatchCounts":
        """In traced code the most new patches are a symbol, and the rest is asked for by caches alone."""
        return cls([], [], largest_count(numbers.num_new, _LEAST_TRACED_PATCHES), 0, 0)

    @classmethod
    def of(cls, numbers: PatchNumbers) -> "PatchCounts":
        """The one place where the host learns what the patcher decided."""
        old, new, open_bytes = numbers.facts.tolist()
        max_new = max(new)
        return cls(old, new, max_new, round_up_columns(max(old) + max_new), max(open_bytes))


def number_patches(
    chunk: ByteChunk, ends: Tensor, mask_documents: bool, eos_token_id: int | list[int] | None
) -> PatchNumbers:
    """Numbers the patches that `ends` `(B, S)` closes, without asking the device for anything."""
    is_text = chunk.is_text
    if is_text is not None:
        ends = ends & is_text
    closes, unread = ends, None
    if chunk.text_starts is not None:
        none = torch.zeros_like(ends[:, :1])
        unread = take_columns(torch.cat([chunk.text_starts, none], dim=1), 1, ends.shape[1] + 1) & ~ends
        closes = ends | unread
    closed = closes.long().cumsum(dim=1)
    old = chunk.previous["num_patches"]
    byte_patch = old[:, None] + closed - closes.long()
    read = closed - 1 if unread is None else closed - 1 - unread.long()

    previous_open = chunk.previous["open_bytes"]
    if chunk.text_starts is not None:
        # A patch that was open when another text begins is never closed.
        previous_open = torch.where(chunk.text_starts[:, 0], torch.zeros_like(previous_open), previous_open)
    open_bytes = open_patch_bytes(closes, previous_open)
    if is_text is not None:
        open_bytes = torch.where(is_text, open_bytes, 0)

    zeros = torch.zeros_like(byte_patch)
    own = later = zeros
    if chunk.document_start is not None:
        own, later = _patch_document_starts(chunk, closes, byte_patch, previous_open, mask_documents, eos_token_id)
    fields = {
        "input_id": zeros if chunk.input_ids is None else chunk.input_ids,
        "position": chunk.text_positions,
        "open_bytes": open_bytes,
        "num_patches": old[:, None] + closed,
        "document_start": zeros if chunk.document_start is None else chunk.document_start,
        "context_start": zeros if chunk.context_start is None else chunk.context_start,
        "patch_document_start": own,
        "next_patch_document_start": later,
        "row_position": chunk.row_positions,
        "byte_patch": byte_patch,
    }
    log = torch.stack([fields[name] for name in ByteLog.FIELDS], dim=-1)
    num_new = closed[:, -1]
    facts = torch.stack([old, num_new, open_bytes.amax(dim=1)])
    return PatchNumbers(ends, closes, num_new, byte_patch, read, facts, log)


def first_visible_patches(chunk: ByteChunk, numbers: PatchNumbers, new: Tensor) -> Tensor | None:
    """Index in its row of the first patch that each new patch may see, int64 `(B, P)`; None: 0. `new`: `0 .. P - 1`."""
    if chunk.document_start is None:
        return None
    num_new = new.shape[0]
    column = torch.where(numbers.closes, numbers.closes.long().cumsum(dim=1) - 1, num_new).clamp_max(num_new)
    first = torch.zeros(column.shape[0], num_new + 1, dtype=torch.int64, device=column.device)
    return take_columns(first.scatter(1, column, log_field(numbers.log, "patch_document_start")), 0, num_new)


def _patch_document_starts(
    chunk, closes, byte_patch, previous_open, mask_documents, eos_token_id
) -> tuple[Tensor, Tensor]:
    """First patch that the patch of each byte may see, and that later patches may see; both int64 `(B, S)`.

    A text that `position_ids` begin starts with a patch of its own. An `eos` in the middle of a patch leaves that
    patch wholly in the earlier document (recorded behaviour of Meta's reference).
    """
    starts = chunk.text_starts
    begins = torch.zeros_like(byte_patch) if starts is None else byte_patch * starts
    later = begins
    if mask_documents:
        eos_token_id = EOS_TOKEN_ID if eos_token_id is None else eos_token_id
        later = torch.maximum(later, (byte_patch + 1) * _is_any_of(chunk.input_ids, eos_token_id))
    later = _running_max(later, chunk.previous["next_patch_document_start"])
    starts_patch = shift_right(closes, previous_open == 0)
    before = shift_right(later, chunk.previous["next_patch_document_start"])
    own = torch.where(starts_patch, torch.maximum(before, begins), 0)
    return _running_max(own, chunk.previous["patch_document_start"]), later


__all__ = [
    "ByteChunk",
    "PatchCounts",
    "PatchNumbers",
    "first_visible_patches",
    "make_chunk",
    "next_bytes",
    "number_patches",
]
