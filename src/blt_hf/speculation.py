"""Drafts of `generate`: a source proposes bytes for each row, and one pass of the whole model verifies them.

Each row accepts its own number of bytes. Self-speculation (BLT-S, arXiv 2605.08044) is the first source: encoder and
decoder draft alone. Greedy text is that of decoding byte by byte; sampling keeps its distribution.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import generation
from transformers.generation import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .model.attention_blt import SlotSpan
from .model.cache_blt import BltCache
from .model.chunk_blt import ByteChunk, assign_patches, next_bytes
from .model.configuration_blt import BltConfig
from .model.forward_blt import ForwardInputs, ForwardSettings, predict_bytes, read_bytes
from .model.generation_blt import WITHOUT_CONTEXT, NextByte, RaggedText, processor_classes
from .model.modeling_blt import BltModel
from .model.names_blt import kept_arange
from .model.packed_blt import PackedStack
from .model.step_blt import StepRunner, of_one_stride, round_up_bytes


SCHEDULES = ("constant", "heuristic")
# Processors that look at the text that they are given, and remember nothing of it.
_WITHOUT_STATE = WITHOUT_CONTEXT | processor_classes(
    "EpsilonLogitsWarper EtaLogitsWarper ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor "
    "ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor "
    "MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor "
    "PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor "
    "SuppressTokensAtBeginLogitsProcessor WatermarkLogitsProcessor"
)


def check_settings(generation_config: GenerationConfig, model_config: BltConfig) -> None:
    """Checks the fields of self-speculation in a configuration of `generate`.

    `model_config` decides nothing here; `generate` calls this as it calls [`blocks.check_settings`].

    Raises:
        ValueError: names the field, its value and the accepted ones.
    """
    window, schedule = generation_config.self_speculation_window, generation_config.self_speculation_schedule
    if window not in (None, "auto") and (not isinstance(window, int) or window < 1):
        raise ValueError(f"`self_speculation_window` must be None, 'auto', or at least 1 byte; got {window!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"`self_speculation_schedule` must be one of {SCHEDULES}; got {schedule!r}.")


def may_keep_state(processor: Callable) -> bool:
    """Tells whether a logits processor may remember its last text, so that it must see each byte once and in order.

    A user's processor says so by an attribute `keeps_state`. Without it, any function may, and any object with attributes.
    """
    if type(processor) in _WITHOUT_STATE:
        return False
    is_function = not isinstance(processor, LogitsProcessor)
    return bool(getattr(processor, "keeps_state", is_function or vars(processor)))


def is_in_order(text: RaggedText) -> bool:
    """Tells whether a logits processor of a text may keep a state, so that drafts are made without the processors."""
    return any(map(may_keep_state, text.logits_processor))


def check_processors(processors: LogitsProcessorList, generation_config: GenerationConfig, num_rows: int) -> None:
    """Raises a `ValueError` where drafts or blocks would show a processor with a state bytes out of order."""
    window, size = generation_config.self_speculation_window, generation_config.diffusion_block_size
    is_verified = size is None or generation_config.verify
    stateful = next(filter(may_keep_state, processors), None)
    if stateful is None or (window is None and size is None) or (is_verified and num_rows == 1):
        return
    is_guidance = type(stateful) is generation.UnbatchedClassifierFreeGuidanceLogitsProcessor
    argument = "guidance_scale" if is_guidance else "logits_processor"
    field = f"self_speculation_window={window}" if size is None else f"diffusion_block_size={size}"
    raise ValueError(
        f"`{argument}` asks for a {type(stateful).__name__}, which may keep a state and so must see each byte of a text "
        f"once and in order; with `{field}` that is possible for one row whose drafts are verified, and got "
        f"{num_rows} rows{'' if is_verified else ' and no `verify`'}. Leave out one of the two. (A processor that keeps "
        "no state may say so by an attribute `keeps_state = False`.)"
    )


@dataclass
class Drafts:
    """Holds proposed bytes.

    Attributes:
        ids: int64 `(B, k)`.
        lengths: how many of these ids count in each row.
        probs: fp32 `(B, k, V)`, the distribution that each was drawn from. None: they were not drawn.
    """

    ids: Tensor
    lengths: list[int]
    probs: Tensor | None = None


class DraftedByte(NextByte):
    """Chooses each byte of a draft, for [`draft`]."""

    def __init__(self, text: RaggedText, do_sample: bool, draw=None):
        super().__init__(text, do_sample, draw)
        self.is_in_order, self._ids = is_in_order(text), []
        self.is_on_device = self.is_in_order or not text.with_context

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Chooses ids, and gives the probabilities, as `choose` does."""
        text, self._ids = self.text, self._ids if step else []
        if step and text.with_context:
            put_drafts(text, torch.cat(self._ids, dim=1))
        ids, probs = self.choose(logits if self.is_in_order else text.process(logits, ahead=step), step)
        self._ids.append(ids)
        return ids, probs


class DraftSource(ABC):
    """Proposes bytes for the rows of a batch."""

    @abstractmethod
    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        """Makes drafts for each row, at most `limits[b]`.

        The cache has read all bytes of `text` but the last one of each row, and must be left as it was: `crop_rows` takes
        back other bytes.
        """

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """Learns how many drafts of each row were verified, and how many accepted; rows that wait have 0 of both."""
        return


class SelfSpeculation(DraftSource):
    """Drafts as BLT-S does: by encoder and decoder alone, on the last closed patch, as if no patch ended.

    Args:
        runner: a [`StepRunner`] that gives logits.
        num_rows: rows of the batch.
        window: bytes to draft.
        is_adaptive: each row's window grows by two bytes after all of its drafts were accepted and shrinks by one
            otherwise; the batch drafts the mean of its rows' windows.
        do_sample: draw the drafts from processed logits.
    """

    def __init__(self, runner: StepRunner, num_rows: int, window: int, is_adaptive: bool, do_sample: bool):
        self.runner, self.windows = runner, [window] * num_rows
        self.is_adaptive, self.do_sample = is_adaptive, do_sample
        self.choose: DraftedByte | None = None

    @torch.no_grad()
    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        windows = [window for window, limit in zip(self.windows, limits) if limit > 0]
        window = -(-sum(windows) // len(windows)) if windows else 0
        window = min(window, max(limits), cache.slack - 1)
        pending = text.last_ids()
        if not window:
            return Drafts(pending[:, :0], [0] * len(limits))
        if self.choose is None or self.choose.text is not text:
            draw = None if self.runner.graphs is None else self.runner.graphs.draw(cache.slack)
            self.choose = DraftedByte(text, self.do_sample, draw)
        self.choose.prepare(window)
        ids, probs = zip(*draft(self.runner, pending, window, self.choose))
        lengths = [min(limit, window) for limit in limits]
        return Drafts(torch.cat(ids, dim=1), lengths, torch.stack(probs, dim=1) if self.do_sample else None)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        if self.is_adaptive:
            self.windows = [
                window if not d else window + 2 if a == d else max(window - 1, 1)
                for window, d, a in zip(self.windows, drafted, accepted)
            ]


class AutoSpeculation(SelfSpeculation):
    """Drafts with a window that follows the cost of drafts here and how many are accepted; 0 where they do not pay.

    A round with window `w` writes `1 + a + ... + a^w` bytes if each draft is accepted with probability `a`. Its time is
    measured in the first rounds of a process, for each model, kind of step and window, and the window with the most bytes
    a second is taken. `a` is that of the last rounds, over all rows. A window of 0 is left for one round in 64, to ask
    again.

    Args:
        runner, num_rows, do_sample: as in [`SelfSpeculation`].
    """

    _costs: "WeakKeyDictionary[torch.nn.Module, dict[tuple, dict[int, float]]]" = WeakKeyDictionary()
    _TIMES = 2  # rounds of each window that are timed
    _PROBE = 64  # of so many rounds with a window of 0, one drafts

    def __init__(self, runner: StepRunner, num_rows: int, do_sample: bool):
        super().__init__(runner, num_rows, 0, is_adaptive=False, do_sample=do_sample)
        kind = (num_rows, runner.compiles, runner.graphs is None, runner.packed is None, torch.get_num_threads())
        self.costs = self._costs.setdefault(runner.model, {}).setdefault(kind, {})
        # Steps of other lengths would be compiled as well.
        self.candidates = (0, 3, 7) if runner.compiles else (0, 3, 7, 15)
        self.pending = [w for w in self.candidates if w not in self.costs for _ in range(self._TIMES)]
        self.accepted, self.tried, self.idle = 0.9, 1.0, 0
        self.window, self.started = 0, 0.0

    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        self.window = self.pending[0] if self.pending else self.best_window()
        if self.window == 0 and not self.pending:
            self.idle += 1
            if self.idle % self._PROBE == 0:
                self.window = 3
        self.windows = [self.window] * len(limits)
        self.started = time.perf_counter()
        return super().propose(text, cache, limits)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        elapsed = time.perf_counter() - self.started
        if max(drafted, default=0) == self.window and self.pending and self.pending[0] == self.window:
            # The least, as the first rounds also compile, and other programs take their share of any.
            self.costs[self.window] = min(elapsed, self.costs.get(self.window, elapsed))
            self.pending.pop(0)
        if any(drafted):
            forget = 0.9
            self.accepted = forget * self.accepted + sum(accepted)
            self.tried = forget * self.tried + sum(a + (a < d) for a, d in zip(accepted, drafted))

    def best_window(self) -> int:
        """Finds the window with the most bytes a second."""
        rate = min(self.accepted / self.tried, 0.995)

        def bytes_per_second(window: int) -> float:
            return (1 - rate ** (window + 1)) / (1 - rate) / max(self.costs[window], 1e-9)

        return max(self.candidates, key=bytes_per_second)


@torch.no_grad()
def draft(runner: StepRunner, input_ids: Tensor, count: int, choose: Callable) -> list[tuple]:
    """Runs the local models alone on the next bytes: they read the last closed patch, and close none.

    Args:
        runner: of the steps; the cache is as before when this returns.
        input_ids: int64 `(B, 1)`, the next byte of each row.
        count: steps; each reads the bytes that were chosen in the step before it.
        choose: called as `choose(logits, step)`, for example a [`DraftedByte`]; the first item of the tuple that it gives
            is the next bytes `(B, 1)`.
    Returns:
        the tuples of all steps.
    """
    runner.begin(input_ids.shape[0], 1, count, input_ids.device)
    if runner.graphs is None or not choose.is_on_device:
        return _draft(runner, input_ids, count, choose)
    return runner.graphs.run(("drafts", count), lambda ids: _draft(runner, ids, count, choose), input_ids)


def _draft(runner: StepRunner, ids: Tensor, count: int, choose: Callable) -> list[tuple]:
    model, settings, cache = runner.model, runner.settings, runner.cache
    runner.hold_patch(True)
    first = next_bytes(ids, None, cache, settings.documents)
    first.packed, history, found = runner.packed, first.history, []
    patches = assign_patches(first, torch.zeros_like(ids, dtype=torch.bool), settings.documents)
    positions = first.row_positions + kept_arange(0, count, ids.device)
    spans, stage = [None] * count, runner.stage(draft_next, 1)
    if not runner.is_compiled:  # compiled code makes a span faster than it takes one in
        # The drafts stay in the document of the first byte.
        start = None if first.document_start is None else first.document_start.expand_as(positions)
        whole = replace(first, row_positions=positions, document_start=start)
        encoder = None if runner.packed is None else runner.packed.encoder
        span = whole.span(cache, settings.local_window, settings.attention)
        spans = split_span(span, model.local_encoder.embed_tokens.weight, encoder)
    for span, place in zip(spans, positions.split(1, dim=1)):
        given = {"input_ids": ids, "history": history, "row_positions": place}
        if runner.is_compiled:
            given = {name: of_one_stride(tensor) for name, tensor in given.items()}
        inputs = ForwardInputs(patches=patches, span=span)
        logits = stage(model, settings, cache, replace(first, **given, spans={}), inputs, runner.head)
        found.append(choose(logits, len(found)))
        history, ids = torch.cat([history, ids], dim=1)[:, 1:], found[-1][0]
    return found


def draft_next(
    model: BltModel,
    settings: ForwardSettings,
    cache: BltCache,
    chunk: ByteChunk,
    inputs: ForwardInputs,
    head: nn.Module | None,
) -> Tensor:
    """Reads one byte of each row by the local models alone; results as [`predict_bytes`]."""
    read = read_bytes(model, settings, chunk, cache, inputs)
    return predict_bytes(model, settings, cache, read, None, head, inputs)


def split_span(span: SlotSpan, like: Tensor, stack: PackedStack | None = None) -> list[SlotSpan]:
    """Makes the span of each query alone; masks, and rotations of a packed stack, are made for all of them at once.

    `like`: of the dtype and device of queries.
    """
    positions = span.query_positions
    starts = [None] * positions.shape[1] if span.start is None else span.start.split(1, dim=1)
    indices = span.slot_index.index.view(positions.shape).unbind(1)
    spans = [
        SlotSpan(span.num_slots, one, span.window, start, span.implementation, replace(span.slot_index, index=index))
        for one, start, index in zip(positions.split(1, dim=1), starts, indices)
    ]
    mask = span.mask(like)
    if isinstance(mask, Tensor):  # not one of flex attention
        for one, own in zip(spans, mask.split(1, dim=2)):
            one.masks[None, like.dtype, like.device] = own
    if stack is not None:
        rotation = stack.make_rotation(positions, like)
        is_flat = rotation.is_complex()  # (B*S, ...), else (2, B, S, ...)
        parts = rotation.unflatten(0, positions.shape).unbind(1) if is_flat else rotation.split(1, dim=2)
        for one, own in zip(spans, parts):
            one.rotations[stack.rotation_key] = own
    return spans


@torch.no_grad()
def verify(runner: StepRunner, text: RaggedText, drafts: Drafts, do_sample: bool) -> tuple:
    """Runs the whole model over the last byte of each row and its drafts, and accepts some of them.

    Each row accepts drafts up to the first that the model would not have written (greedy), or by speculative sampling
    (arXiv 2211.17192, algorithm 1), and gets one byte of the model's own behind them. Afterwards the cache holds all of
    these but the last; rows that wait are unchanged.

    Returns:
        ids `(B, k + 1)`, on the host or the device; counts: how many of them each row gets; logits and scores: fp32
        `(B, k + 1, V)`.
    """
    is_active = text.active
    lengths = [count + 1 if active else 0 for count, active in zip(drafts.lengths, is_active)]
    num_drafts = drafts.ids.shape[1]
    is_full = min(lengths) == num_drafts + 1
    if num_drafts == 0:
        logits = runner.step(text.last_ids(), None if is_full else lengths)
        scores = text.process(logits)
        ids = torch.multinomial(scores[:, 0].softmax(dim=-1), num_samples=1) if do_sample else scores.argmax(dim=-1)
        return ids, lengths, logits, scores
    input_ids = torch.cat([text.last_ids(), drafts.ids], dim=1)
    logits = runner.step(input_ids, None if is_full else lengths)
    if text.with_context:
        put_drafts(text, drafts.ids)
    if is_in_order(text):
        ids, accepted, scores = accept_in_order(text, logits, drafts, do_sample)
    else:
        scores = text.process(logits)
        ids, accepted = accept(scores, drafts, do_sample)
    accepted, ids = zip(*((row[0], row[1:]) for row in torch.cat([accepted[:, None], ids], dim=1).tolist()))
    kept = map(min, accepted, drafts.lengths)
    counts = [count + 1 if active else 0 for count, active in zip(kept, is_active)]
    runner.cache.crop_rows([length - count for length, count in zip(lengths, counts)])
    return ids, counts, logits, scores


def accept(scores: Tensor, drafts: Drafts, do_sample: bool) -> tuple[Tensor, Tensor]:
    """Chooses ids `(B, k + 1)` and how many drafts are accepted `(B,)`, from processed scores `(B, k + 1, V)`."""
    rows, num_drafts = drafts.ids.shape
    lengths = torch.tensor(drafts.lengths, device=scores.device)
    exists = torch.arange(num_drafts, device=scores.device) < lengths[:, None]
    if not do_sample:
        ids = scores.argmax(dim=-1)
        is_accepted = (ids[:, :num_drafts] == drafts.ids) & exists
        return ids, is_accepted.long().cumprod(dim=1).sum(dim=1)
    probs = scores.softmax(dim=-1)
    proposed = drafts.probs
    if proposed is None:  # the whole probability of a draft that was not drawn is its own
        proposed = nn.functional.one_hot(drafts.ids, probs.shape[-1]).to(probs.dtype)
    of_model = probs[:, :num_drafts].gather(2, drafts.ids[..., None])[..., 0]
    of_draft = proposed.gather(2, drafts.ids[..., None])[..., 0]
    is_accepted = (torch.rand_like(of_model) * of_draft < of_model) & exists
    accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)
    # After a refused draft, the next byte comes from the excess of the model over the draft; else from the model.
    proposed = torch.cat([proposed * exists[..., None], torch.zeros_like(probs[:, :1])], dim=1)
    at = accepted[:, None, None].expand(-1, 1, probs.shape[-1])
    model_probs, draft_probs = probs.gather(1, at)[:, 0], proposed.gather(1, at)[:, 0]
    rest = (model_probs - draft_probs).clamp_min(0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, model_probs)
    own = torch.multinomial(rest, num_samples=1)
    ids = torch.cat([drafts.ids, own], dim=1)
    is_own = torch.arange(num_drafts + 1, device=ids.device) == accepted[:, None]
    return torch.where(is_own, own, ids), accepted


def accept_in_order(
    text: RaggedText, logits: Tensor, drafts: Drafts, do_sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Accepts drafts of one row one by one, as its logits processors may see accepted bytes alone; gives scores, too."""
    ids, scores, count = [], logits.clone(), 0
    for step in range(drafts.lengths[0] + 1):
        scores[:, step] = text.process(logits[:, step, None], ahead=step)[:, 0]
        is_draft = step < drafts.lengths[0]
        here = slice(step, step + 1) if is_draft else slice(0, 0)
        probs = None if drafts.probs is None else drafts.probs[:, here]
        # `accept` wants scores of one byte more than there are drafts: this step's fill the place, that choice is dropped.
        pair = scores[:, [step] * (1 + is_draft)]
        chosen, accepted = accept(pair, Drafts(drafts.ids[:, here], [int(is_draft)], probs), do_sample)
        ids.append(chosen[:, :1])
        if not int(accepted) or int(chosen[0, 0]) in text.eos_token_ids:
            break
        count += 1
    rest = drafts.ids.shape[1] + 1 - len(ids)
    chosen = nn.functional.pad(torch.cat(ids, dim=1), (0, rest), value=text.pad_token_id)
    return chosen, torch.tensor([count], device=chosen.device), scores


def decode_drafted(runner: StepRunner, source: DraftSource, text: RaggedText, do_sample: bool) -> None:
    """Writes texts to their ends. The cache has read all bytes but the last one of each row, before and after.

    A streamer that has a method `put_drafts` gets, after the bytes of each verification, the drafts `(B, k)`, how many of
    them counted in each row, and how many were accepted.
    """
    cache = runner.cache
    while not text.is_done:
        is_active = text.active
        limits = [max(text.max_length - n - 1, 0) if active else 0 for n, active in zip(text.lengths, is_active)]
        drafts = source.propose(text, cache, limits)
        ids, counts, logits, scores = verify(runner, text, drafts, do_sample)
        added = text.append(ids, counts, logits, scores)
        cache.crop_rows([count - new for count, new in zip(counts, added)])
        drafted = [count if active else 0 for count, active in zip(drafts.lengths, is_active)]
        accepted = [max(count - 1, 0) for count in counts]
        source.update(drafted, accepted)
        if hasattr(text.streamer, "put_drafts"):
            text.streamer.put_drafts(drafts.ids.cpu(), drafted, accepted)
    finish_rows(runner, text)


def finish_rows(runner: StepRunner, text: RaggedText) -> None:
    """Makes the cache hold all bytes of the result of `generate` but the last of each row."""
    # Rows that ended before others have one byte that the next turn would not read; others may have gone too far.
    cache = runner.cache
    cache.crop_rows([max(length - text.end, 0) for length in text.lengths])
    is_behind = [int(length < text.end) for length in text.lengths]
    if any(is_behind):
        runner.step(text.last_ids(), is_behind)
    cache.seq_length, cache.num_croppable = text.end - 1, 0  # rows may have grown differently


def put_drafts(text: RaggedText, ids: Tensor) -> None:
    """Writes drafts `(B, k)` behind the texts, for `text.process` to see; they are not part of them."""
    offsets = torch.arange(ids.shape[1], device=ids.device)
    columns = torch.tensor(text.lengths, device=ids.device)[:, None] + offsets
    rows = torch.arange(len(text.lengths), device=ids.device)[:, None].expand_as(columns)
    fits = columns < text.max_length
    text.sequences[rows[fits], columns[fits]] = ids[fits]


def make_source(runner: StepRunner, generation_config, num_rows: int) -> DraftSource:
    """Makes the source of drafts that the configuration of `generate` asks for, and room in the cache for its drafts."""
    cache, do_sample, window = runner.cache, generation_config.do_sample, generation_config.self_speculation_window
    if window == "auto":
        cache.reserve_slack(round_up_bytes(16))
        return AutoSpeculation(runner, num_rows, do_sample)
    is_adaptive = generation_config.self_speculation_schedule == "heuristic"
    cache.reserve_slack(round_up_bytes(max(window, 32 if is_adaptive else 0) + 1))
    return SelfSpeculation(runner, num_rows, window, is_adaptive, do_sample)


def decode(model: nn.Module, runner: StepRunner, text: RaggedText, generation_config) -> None:
    """Writes texts to their ends with the drafts that the configuration of `generate` asks for.

    Args:
        model: a [`BltForCausalLM`]; not read here, as `generate` calls this as it calls `blocks.decode`.
        runner: of its steps. The cache has read all bytes but the last one of each row, before and after.
    """
    source = make_source(runner, generation_config, len(text.lengths))
    decode_drafted(runner, source, text, generation_config.do_sample)


__all__ = [
    "AutoSpeculation",
    "DraftSource",
    "DraftedByte",
    "Drafts",
    "SelfSpeculation",
    "accept",
    "check_processors",
    "check_settings",
    "decode",
    "decode_drafted",
    "draft",
    "finish_rows",
    "is_in_order",
    "make_source",
    "may_keep_state",
    "put_drafts",
    "verify",
]
