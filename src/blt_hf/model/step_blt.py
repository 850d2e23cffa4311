"""A few bytes of each row, in three parts of fixed shape: read the bytes, close the patches that end, predict the next.

Between them the host learns one thing, whether patches ended. Everything else stays on the device, so that each part can
be compiled once for any length of text. Drafting is the first and the last part, without the entropy model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention_blt import AttentionSpan
from .cache_blt import BltCache, SlotAccess, round_up_columns
from .chunk_blt import ByteChunk, PatchCounts, PatchNumbers, next_bytes, number_patches
from .compiling_blt import is_compiled, is_spread, round_up_bytes
from .layers_blt import StateTrace
from .recording_blt import can_record


_STEP_PATCHES = 4  # patches that they close, unless more end
_HELD = 16  # bytes of open patches are read in multiples of this, so that few shapes occur


@dataclass
class BytesRead:
    """What reading bytes leaves for predicting the next ones: the chunk, its patches, encoder states, keys to see."""

    chunk: ByteChunk
    numbers: PatchNumbers
    hidden_states: Tensor
    span: AttentionSpan


def read_bytes(model, cache: BltCache, input_ids: Tensor, lengths: Tensor | None) -> BytesRead:
    """Entropy model and encoder on the next bytes `(B, S)` of each row, `lengths` `(B,)` of which count (None: all)."""
    chunk = next_bytes(input_ids, lengths, cache, **model._document_rules)
    return _read(model, cache, chunk)[0]


def _read(model, cache: BltCache, chunk: ByteChunk, *arguments) -> tuple[BytesRead, Tensor | None]:
    byte_states, span, numbers, entropies = model._read_bytes(chunk, cache, *arguments)
    model._keep_bytes(chunk, numbers, byte_states, entropies, cache)
    return BytesRead(chunk, numbers, byte_states[-1], span), entropies


def read_drafts(model, cache: BltCache, input_ids: Tensor) -> BytesRead:
    """The encoder alone, as if no patch ended."""
    chunk = next_bytes(input_ids, None, cache, **model._document_rules)
    no_ends = torch.zeros_like(input_ids, dtype=torch.bool)
    numbers = number_patches(chunk, no_ends, model.config.mask_documents, model.config.eos_token_id)
    span = model._local_span(chunk, cache)
    byte_states = model.local_encoder(model._embed_bytes(chunk), chunk, span, cache)
    model._keep_bytes(chunk, numbers, byte_states, None, cache)
    return BytesRead(chunk, numbers, byte_states[-1], span)


def draft_bytes(model, cache: BltCache, input_ids: Tensor, head: nn.Module | None) -> Tensor:
    """Encoder and decoder alone; results as `predict_bytes`."""
    return predict_bytes(model, cache, read_drafts(model, cache, input_ids), head, is_draft=True)


def close_patches(
    model,
    cache: BltCache,
    read: BytesRead,
    new: Tensor,
    columns: Tensor,
    back: Tensor,
    rows: Tensor | None,
    trace: StateTrace | None = None,
) -> None:
    """Encoder cross attention and global transformer; what the decoder reads of the patches that ended.

    Args:
        new: `0 .. P - 1`, int64, for up to `P` patches of a row.
        columns: `0, 1, ...`, int64, columns of the global transformer's cache to read.
        back: `-T .. -1`, int64, for the last `T` bytes, which hold all that these patches are made of.
        rows: int64 `(R,)`, those whose patches ended; None: all rows are run, and nothing reads what the others give.
    """
    chunk = read.chunk
    counts = chunk.cached_bytes + chunk.num_columns
    states, segment = model.local_encoder.held_bytes(cache, chunk, counts, back, rows)
    latents = model.local_encoder.make_latents(states, segment, new.shape[0])
    latents = model.global_transformer(latents.flatten(2), chunk, read.numbers, new, columns, rows, cache, trace)
    before = chunk.previous["num_patches"]
    before = before if rows is None else before.index_select(0, rows)
    access = SlotAccess(index=cache.latent_slots.find(before[:, None] + new, rows).flatten())
    model.local_decoder.keep_latents(model.local_decoder.split_latents(latents), access, cache)


def predict_bytes(
    model,
    cache: BltCache,
    read: BytesRead,
    head: nn.Module | None,
    trace: StateTrace | None = None,
    is_draft: bool = False,
) -> Tensor:
    """Decoder states `(B, S, W)`, or with a `head` its fp32 logits; the bytes are part of the past then."""
    chunk = read.chunk
    reads = model._reads(chunk, read.numbers, cache)
    hidden_states = model.local_decoder(read.hidden_states, None, chunk, reads, read.span, cache, trace)
    result = hidden_states if head is None else head(hidden_states).float()
    # Last, so that an interrupt in the middle of a step leaves a cache that has not read it
    cache.commit(chunk, None if is_draft else read.numbers)
    return result


@dataclass
class StepParts:
    """The parts of a step, as they are or compiled."""

    read_bytes: Callable = read_bytes
    read_drafts: Callable = read_drafts
    draft_bytes: Callable = draft_bytes
    close_patches: Callable = close_patches
    predict_bytes: Callable = predict_bytes


_PLAIN = StepParts()


class _Step:
    """The parts of a step of `(B, S)` bytes, in a cache that has room for them: plain or compiled, and recorded or not."""

    def __init__(self, model, cache: BltCache, input_ids: Tensor, head: nn.Module | None = None):
        rows, columns = input_ids.shape
        self.model, self.cache, self.head, self.parts = model, cache, head, _PLAIN
        if columns == round_up_bytes(columns) and is_compiled(model, cache, rows):
            functions = list(vars(_PLAIN).values())
            roots = (model,) if head is None else (model, head)
            self.parts = StepParts(*model.compiled_steps.find(str(columns), functions, cache, *roots))
        device = input_ids.device
        self.is_recorded = cache.recorder is not None and can_record(device) and _may_record(model, device)
        if self.is_recorded:
            cache.recorder.begin(model, head, device)

    def first(self, part: Callable, *inputs: Tensor | None, more: tuple = ()):
        """`part`, which reads the bytes: all tensors that it takes in, and `more` behind them."""
        return self._run(part, True, lambda *given: part(self.model, self.cache, *given, *more), *inputs)

    def then(self, part: Callable, function: Callable, *inputs: Tensor | None):
        """`function`, which runs `part` on what was read, and takes in other tensors as `inputs`."""
        return self._run(part, False, function, *inputs)

    def _run(self, part: Callable, is_first: bool, function: Callable, *inputs: Tensor | None):
        if not self.is_recorded:
            return function(*inputs)
        return self.cache.recorder.run(self.cache, (part, self.head), is_first, function, *inputs)

    def keep(self, result: Tensor) -> Tensor:
        """A result for the caller: what was recorded is written over by the next step."""
        return result.clone() if self.is_recorded else result


def _may_record(model, device: torch.device) -> bool:
    """Whether nothing around the model does more with its tensors than its modules say."""
    return not (is_spread(model) or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type))


def _close(
    model,
    cache: BltCache,
    read: BytesRead,
    counts: PatchCounts,
    step: _Step | None = None,
    trace: StateTrace | None = None,
) -> None:
    """Closes patches, in shapes of which few exist where they are compiled or recorded."""
    close = close_patches if step is None else step.parts.close_patches
    device, num_columns, max_new = read.chunk.num_bytes.device, read.chunk.num_columns, counts.max_new
    is_fixed = close is not close_patches or (step is not None and step.is_recorded)
    if is_fixed and num_columns > 1:
        if max_new > _STEP_PATCHES:
            is_fixed, close = False, close_patches
        else:
            max_new = _STEP_PATCHES
    cache.reserve_patches(max_new)
    size, needed = cache.recent_slots.size, cache.needed_states(cache.max_open_bytes) + num_columns
    back = torch.arange(-size if is_fixed else -min(-(-needed // _HELD) * _HELD, size), 0, device=device)
    seen = round_up_columns(max(counts.old) + max_new)
    new, columns = torch.arange(max_new, device=device), torch.arange(seen, device=device)
    if close is not close_patches:
        torch._dynamo.maybe_mark_dynamic(columns, 0)
    rows = _closing_rows(model, counts, device)
    if step is None:
        close(model, cache, read, new, columns, back, rows, trace)
    else:
        step.then(close, lambda *given: close(model, cache, read, *given), new, columns, back, rows)


def _closing_rows(model, counts: PatchCounts, device: torch.device) -> Tensor | None:
    """Rows that close a patch; None: run all of them."""
    # Leaving rows out saves work on a CPU; a GPU had better see the same shapes again.
    if len(counts.new) == 1 or device.type != "cpu" or 0 not in counts.new:
        return None
    # PEFT gives each row its own adapter by hooks that count the rows.
    if any(module._forward_pre_hooks for module in model.modules()):
        return None
    return torch.tensor([row for row, count in enumerate(counts.new) if count])


def run_small(
    model,
    chunk: ByteChunk,
    cache: BltCache,
    embeds: Tensor | None,
    given_ends: Tensor | None,
    traces: list[StateTrace],
) -> tuple[Tensor, Tensor | None, PatchNumbers]:
    """The three parts for whatever `forward` was asked; results as [`BltModel._run`]."""
    cache.begin(len(chunk.row_bytes), chunk.num_columns, True, chunk.num_bytes.device)
    read, entropies = _read(model, cache, chunk, embeds, given_ends, traces[0])
    counts = PatchCounts.of(read.numbers)
    if counts.max_new:
        _close(model, cache, read, counts, trace=traces[1])
    hidden_states = predict_bytes(model, cache, read, None, traces[2])
    cache.count_chunk(chunk, counts)
    return hidden_states, entropies, read.numbers


def take_step(
    model, cache: BltCache, input_ids: Tensor, lengths: list[int] | None, head: nn.Module | None = None
) -> Tensor:
    """The three parts for plain bytes; see [`BltModel.step`]."""
    rows, columns = input_ids.shape
    if columns > 1 and is_compiled(model, cache, rows):
        lengths, length = [columns] if lengths is None else lengths, round_up_bytes(columns)
        if columns < length <= cache.slack:  # bytes that do not count are written behind the others, and over later
            filled = nn.functional.pad(input_ids, (0, length - columns))
            return take_step(model, cache, filled, lengths, head)[:, :columns]
    cache.begin(rows, columns, True, input_ids.device)
    on_device = None if lengths is None else torch.tensor(lengths, device=input_ids.device)
    step = _Step(model, cache, input_ids, head)
    input_ids = input_ids.clone(memory_format=torch.contiguous_format)  # one stride, whatever it was cut from
    read = step.first(step.parts.read_bytes, input_ids, on_device)
    counts = PatchCounts.of(read.numbers)
    if counts.max_new:
        _close(model, cache, read, counts, step)
    predict = step.parts.predict_bytes
    result = step.keep(step.then(predict, lambda: predict(model, cache, read, head)))
    cache.count(columns, [columns] * rows if lengths is None else lengths, counts)
    return result


def take_draft(model, cache: BltCache, input_ids: Tensor, head: nn.Module | None = None) -> Tensor:
    """Drafting, one byte or more of each row; see [`BltModel.draft`]."""
    rows, columns = input_ids.shape
    cache.begin(rows, columns, True, input_ids.device)
    step = _Step(model, cache, input_ids, head)
    input_ids = input_ids.clone(memory_format=torch.contiguous_format)
    result = step.keep(step.first(step.parts.draft_bytes, input_ids, more=(head,)))
    cache.count(columns, [columns] * rows)
    return result


def read_last_byte(model, cache: BltCache, input_ids: Tensor) -> Tensor:
    """Encoder states `(B, 1, W)` of one more byte of each row, `(B, 1)`, that is not counted as read."""
    cache.begin(*input_ids.shape, True, input_ids.device)
    step = _Step(model, cache, input_ids)
    input_ids = input_ids.clone(memory_format=torch.contiguous_format)
    return step.keep(step.first(step.parts.read_drafts, input_ids).hidden_states)


__all__ = [
    "read_last_byte",
    "run_small",
    "take_draft",
    "take_step",
]
