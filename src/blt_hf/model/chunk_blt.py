"""The bytes of one forward: padding taken out, texts and documents found, patches numbered.

A full forward is a chunk on an empty cache, a decoding step a chunk of one byte; everything after this file sees rows
that begin with their first new byte and knows nothing of padding. Dimension letters as in `patching_blt.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_blt import BltCache, ByteLog
from .patching_blt import NEWLINE_ID, RowLayout, open_patch_bytes, shift_right


DEFAULT_EOS_TOKEN_ID = 2


def _is_any_of(ids: Tensor, token_id: int | list[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(token_id, device=ids.device))


def _running_max(values: Tensor, carried: Tensor) -> Tensor:
    """Running maximum along the row, that starts from `carried` `(B,)`."""
    return torch.maximum(values.cummax(dim=1).values, carried[:, None])


@dataclass
class ByteChunk:
    """New bytes of each row, from its first column on.

    Attributes:
        input_ids: int64 `(B, S)`; ids after a row's bytes are whatever the padding was. None with `inputs_embeds`.
        num_bytes: int64 `(B,)`, bytes of each row in this chunk.
        min_bytes: the smallest of them, on the host.
        num_croppable: columns at the chunk's end that are text in every row.
        layout: where the bytes stood; None: every column is text.
        row_positions: int64 `(B, S)`, index of each byte in its row.
        text_positions: int64 `(B, S)`, index of each byte in its text.
        text_starts: bool `(B, S)`, bytes at which `position_ids` begin a new text; None: only at the row's first byte.
        document_start, context_start: int64 `(B, S)`, row index of the first byte that each byte may see, in the
            encoder and decoder, and in the entropy model. None: all bytes before it.
        previous: last log entry of each row, field by field (zeros in an empty cache).
        history: int64 `(B, H)`, ids before the chunk, as many as the hashes may ask.
    """

    input_ids: Tensor | None
    num_bytes: Tensor
    min_bytes: int
    num_croppable: int
    layout: RowLayout | None
    row_positions: Tensor
    text_positions: Tensor
    text_starts: Tensor | None
    document_start: Tensor | None
    context_start: Tensor | None
    previous: dict[str, Tensor]
    previous_entropy: Tensor
    history: Tensor | None
    cached_bytes: Tensor | None

    @property
    def num_columns(self) -> int:
        return self.row_positions.shape[1]

    @property
    def has_documents(self) -> bool:
        return self.text_starts is not None

    @property
    def is_text(self) -> Tensor | None:
        """bool `(B, S)`: columns that hold a byte; None: all."""
        if self.layout is None:
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

    def first_key(self, start: Tensor | None, num_past: int, min_cached_bytes: int) -> Tensor | None:
        """First visible key of each byte, as an index into `[past | chunk]` `(B, S)`; None: nothing to hide.

        Args:
            start: `document_start`, `context_start` or None.
            num_past: keys in the past.
            min_cached_bytes: lower bound of the bytes that each row has in the cache.
        """
        if start is None and num_past <= min_cached_bytes:
            return None
        offset = num_past if self.cached_bytes is None else num_past - self.cached_bytes[:, None]
        if start is None:
            return offset.clamp_min(0).expand(-1, self.num_columns)
        return (start + offset).clamp_min(0)


def _check_mask(attention_mask: Tensor, rows: int, columns: int, past: int) -> Tensor:
    """The columns of `attention_mask` that belong to the chunk."""
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"`attention_mask` must be a tensor; got {type(attention_mask).__name__}.")
    accepted = {columns, past + columns}
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] not in accepted:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; a two-dimensional mask with {rows} rows and "
            f"{' or '.join(str(n) for n in sorted(accepted))} columns is accepted (1 for text, 0 for padding)."
        )
    return attention_mask[:, -columns:]


def _find_text_starts(position_ids: Tensor, num_bytes: Tensor, cached_bytes: Tensor | None) -> Tensor | None:
    """Where `position_ids` begin another text inside a row; None if they do so nowhere."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1  # transformers' own rule for packed rows
    if cached_bytes is None:
        begins = torch.zeros_like(breaks[:, :1]) if breaks.shape[1] else breaks.new_zeros(breaks.shape[0], 1)
    else:
        begins = (position_ids[:, :1] == 0) & (cached_bytes[:, None] > 0)
    starts = torch.cat([begins, breaks], dim=1)
    starts = starts & (torch.arange(starts.shape[1], device=starts.device) < num_bytes[:, None])
    return starts if bool(starts.any()) else None


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
    Raises:
        ValueError: a shape does not fit.
    """
    rows, columns = shape
    if columns == 0:
        raise ValueError("`input_ids` has no columns; a forward needs at least one byte a row (a BOS for empty text).")
    is_empty = cache is None or cache.is_empty
    cached_bytes = None if is_empty else cache.num_bytes
    if cached_bytes is not None and cached_bytes.shape[0] != rows:
        raise ValueError(
            f"`past_key_values` holds {cached_bytes.shape[0]} rows and the input has {rows}; "
            "they must be the same rows, in the same order."
        )
    layout, min_bytes, num_croppable = None, columns, columns
    num_bytes = torch.full((rows,), columns, dtype=torch.int64, device=device)
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, rows, columns, 0 if is_empty else cache.seq_length)
        is_text = attention_mask != 0
        text_at_end = is_text.flip(1).long().cumprod(dim=1).sum(dim=1)
        # One transfer for the three facts that the host must know.
        min_bytes, num_croppable = torch.stack([is_text.sum(dim=1).min(), text_at_end.min()]).tolist()
        if min_bytes < columns:
            layout = RowLayout.from_mask(attention_mask)
            num_bytes = layout.num_bytes
            input_ids = None if input_ids is None else layout.pack(input_ids)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    if is_empty:
        previous = dict.fromkeys(ByteLog.FIELDS, zeros)
        previous["position"] = zeros - 1
        previous_entropy, history = zeros.float(), None
    else:
        state = cache.log.integers.values[:, -1]
        # A row without text so far has no state: its columns hold padding.
        state = (
            torch.where(cached_bytes[:, None] > 0, state, torch.zeros_like(state)) if cache.min_bytes == 0 else state
        )
        previous = dict(zip(ByteLog.FIELDS, state.unbind(-1)))
        if cache.min_bytes == 0:
            previous["position"] = torch.where(cached_bytes > 0, previous["position"], zeros - 1)
        previous_entropy = cache.log.last_entropy
        history = (
            cache.log.last("input_id", min(len(cache.log), cache.num_hash_bytes)) if cache.num_hash_bytes else None
        )

    text_starts = None
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != columns:
            raise ValueError(
                f"`position_ids` has shape {tuple(position_ids.shape)}; accepted is ({rows} or 1, {columns}): one "
                "position for each column of this call."
            )
        position_ids = position_ids.expand(rows, -1)
        if columns > 1 or not is_empty:
            packed_ids = position_ids if layout is None else layout.pack(position_ids)
            text_starts = _find_text_starts(packed_ids, num_bytes, cached_bytes)

    index = torch.arange(columns, device=device)
    row_positions = index.expand(rows, -1) if cached_bytes is None else cached_bytes[:, None] + index
    text_positions = index + previous["position"][:, None] + 1
    if text_starts is not None:
        base = torch.where(text_starts, index, -1 - previous["position"][:, None])
        text_positions = index - base.cummax(dim=1).values

    document_start = context_start = None
    may_hold_documents = text_starts is not None or (not is_empty and cache.has_documents)
    if may_hold_documents or mask_documents or newline_reset:
        previous_ids = None if input_ids is None else shift_right(input_ids, previous["input_id"])
        if input_ids is None and (mask_documents or newline_reset):
            raise ValueError(
                "document boundaries are read from `input_ids`; with `inputs_embeds` set them by `position_ids`."
            )
        begins = torch.zeros(rows, columns, dtype=torch.bool, device=device) if text_starts is None else text_starts
        if mask_documents:
            eos_token_id = DEFAULT_EOS_TOKEN_ID if eos_token_id is None else eos_token_id
            begins = begins | (_is_any_of(previous_ids, eos_token_id) & (row_positions > 0))
        if may_hold_documents or mask_documents:
            document_start = _running_max(row_positions * begins, previous["document_start"])
        if newline_reset:
            begins = begins | ((previous_ids == NEWLINE_ID) & (row_positions > 0))
        context_start = _running_max(row_positions * begins, previous["context_start"])
    return ByteChunk(
        input_ids=input_ids,
        num_bytes=num_bytes,
        min_bytes=min_bytes,
        num_croppable=num_croppable,
        layout=layout,
        row_positions=row_positions,
        text_positions=text_positions,
        text_starts=text_starts,
        document_start=document_start,
        context_start=context_start,
        previous=previous,
        previous_entropy=previous_entropy,
        history=history,
        cached_bytes=cached_bytes,
    )


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
        open_at_end: int64 `(B,)`, bytes of the patch left open.
        log: the chunk's entries for [`ByteLog`], integers `(B, S, F)`.
    """

    ends: Tensor
    closes: Tensor
    num_new: Tensor
    byte_patch: Tensor
    read: Tensor
    open_at_end: Tensor
    log: Tensor


@dataclass
class PatchRouting(PatchNumbers):
    """The same, and what the host knows of it.

    Attributes:
        new_counts: `num_new`; `max_new`: their maximum.
        old_counts: patches closed before the chunk.
        max_open_bytes: bytes of the longest patch left open.
        first_patch: int64 `(B, max_new)`, index in its row of the first patch that each new patch may see. None: 0.
    """

    new_counts: list[int]
    max_new: int
    old_counts: list[int]
    max_open_bytes: int
    first_patch: Tensor | None


def log_field(log: Tensor, field: str) -> Tensor:
    """`field` of log entries `(..., F)`."""
    return log[..., ByteLog.FIELDS.index(field)]


def number_patches(
    chunk: ByteChunk, ends: Tensor, mask_documents: bool, eos_token_id: int | list[int] | None
) -> PatchNumbers:
    """Numbers the patches that `ends` `(B, S)` closes, without asking the device for anything."""
    is_text = chunk.is_text
    if is_text is not None:
        ends = ends & is_text
    closes, unread = ends, None
    if chunk.text_starts is not None:
        unread = torch.cat([chunk.text_starts[:, 1:], torch.zeros_like(ends[:, :1])], dim=1) & ~ends
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
    last_byte = (chunk.num_bytes - 1).clamp_min(0)[:, None]
    open_at_end = torch.where(chunk.num_bytes > 0, open_bytes.gather(1, last_byte)[:, 0], previous_open)

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
    }
    log = torch.stack([fields[name] for name in ByteLog.FIELDS], dim=-1)
    return PatchNumbers(ends, closes, closed[:, -1], byte_patch, read, open_at_end, log)


def route_patches(
    chunk: ByteChunk, ends: Tensor, mask_documents: bool, eos_token_id: int | list[int] | None
) -> PatchRouting:
    """Numbers the patches that `ends` `(B, S)` closes; see [`PatchRouting`]."""
    numbers = number_patches(chunk, ends, mask_documents, eos_token_id)
    # The one place where the host learns what the patcher decided.
    facts = torch.stack([numbers.num_new, chunk.previous["num_patches"], numbers.open_at_end])
    new_counts, old_counts, open_counts = facts.tolist()
    max_new = max(new_counts)
    first_patch = None
    if chunk.document_start is not None:
        column = torch.where(numbers.closes, numbers.closes.long().cumsum(dim=1) - 1, max_new)
        first_patch = torch.zeros(ends.shape[0], max_new + 1, dtype=torch.int64, device=ends.device)
        first_patch = first_patch.scatter(1, column, log_field(numbers.log, "patch_document_start"))[:, :max_new]
    return PatchRouting(
        **vars(numbers),
        new_counts=new_counts,
        max_new=max_new,
        old_counts=old_counts,
        max_open_bytes=max(open_counts),
        first_patch=first_patch,
    )


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
        eos_token_id = DEFAULT_EOS_TOKEN_ID if eos_token_id is None else eos_token_id
        later = torch.maximum(later, (byte_patch + 1) * _is_any_of(chunk.input_ids, eos_token_id))
    later = _running_max(later, chunk.previous["next_patch_document_start"])
    starts_patch = shift_right(closes, previous_open == 0)
    before = shift_right(later, chunk.previous["next_patch_document_start"])
    own = torch.where(starts_patch, torch.maximum(before, begins), 0)
    return _running_max(own, chunk.previous["patch_document_start"]), later


__all__ = ["ByteChunk", "PatchNumbers", "PatchRouting", "log_field", "make_chunk", "number_patches", "route_patches"]
