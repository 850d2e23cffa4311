"""The texts of a batch while they are written: what `generate` promises of each, whether or not they grow in step."""

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .names_blt import CACHE_NAME


# These look at one distribution alone, so that those of several bytes may go through them at once.
_WITHOUT_CONTEXT = {
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    SuppressTokensLogitsProcessor,
}
# These look at the text that they are given, and remember nothing of it.
_WITHOUT_STATE = _WITHOUT_CONTEXT | {
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    WatermarkLogitsProcessor,
}


def may_keep_state(processor) -> bool:
    """Whether a logits processor may remember the text of its last call, so that it must see each byte once and in order.

    One of a user's is asked for an attribute `keeps_state`. Without it, one that has attributes may, and any function may.
    """
    if type(processor) in _WITHOUT_STATE:
        return False
    is_function = not isinstance(processor, LogitsProcessor)
    return bool(getattr(processor, "keeps_state", is_function or vars(processor)))


def check_processors(processors: LogitsProcessorList, generation_config, num_rows: int) -> None:
    """Raises a `ValueError` where drafts or blocks would show a processor with a state bytes out of order."""
    window, size = (
        getattr(generation_config, name, None) for name in ("self_speculation_window", "diffusion_block_size")
    )
    is_verified = size is None or getattr(generation_config, "verify", False)
    stateful = next(filter(may_keep_state, processors), None)
    if stateful is None or (window is None and size is None) or (is_verified and num_rows == 1):
        return
    is_guidance = type(stateful) is UnbatchedClassifierFreeGuidanceLogitsProcessor
    argument = "guidance_scale" if is_guidance else "logits_processor"
    field = f"self_speculation_window={window}" if size is None else f"diffusion_block_size={size}"
    raise ValueError(
        f"`{argument}` asks for a {type(stateful).__name__}, which may keep a state and so must see each byte of a text "
        f"once and in order; with `{field}` that is possible for one row whose drafts are verified, and got "
        f"{num_rows} rows{'' if is_verified else ' and no `verify`'}. Leave out one of the two. (A processor that keeps "
        "no state may say so by an attribute `keeps_state = False`.)"
    )


class RaggedText:
    """Rows of bytes that may grow by different numbers.

    Args:
        input_ids: int64 `(B, N)`, the prompts, all of `N` columns.
        logits_processor, stopping_criteria, generation_config, streamer: as `generate` gives them to its loops.

    Attributes:
        sequences: int64 `(B, max_length)`; row `b` holds its text in the first `lengths[b]` columns.
        lengths: columns of each row, on the host.
        is_in_order: a logits processor may keep a state, so drafts are made without the processors.
        stops: length at which each row met a stopping criterion; None: it has not.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        streamer=None,
    ):
        rows, columns = input_ids.shape
        self.max_length = max(stopping_criteria.max_length, columns + 1)
        pad = getattr(generation_config, "_pad_token_tensor", None)
        self.pad_token_id = 0 if pad is None else int(pad)
        self.sequences = input_ids.new_full((rows, self.max_length), self.pad_token_id)
        self.sequences[:, :columns] = input_ids
        self.lengths, self.stops = [columns] * rows, [None] * rows
        self.logits_processor, self.streamer = logits_processor, streamer
        self.has_context = any(type(processor) not in _WITHOUT_CONTEXT for processor in logits_processor)
        self.is_in_order = any(map(may_keep_state, logits_processor))
        # As in transformers, only `eos` makes a row that has stopped wait for the others; else it goes on beside them.
        self.waits = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.eos_token_ids, self._criteria = set(), StoppingCriteriaList()
        for criterion in stopping_criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos_token_ids |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self._criteria.append(criterion)
        returns = generation_config.return_dict_in_generate
        self.returns_dict = returns
        self.scores = [] if returns and generation_config.output_scores else None
        self.logits = [] if returns and generation_config.output_logits else None
        self._first = self._streamed = columns

    @property
    def active(self) -> list[bool]:
        """Rows that are still written."""
        if self.waits:
            return [stop is None for stop in self.stops]
        unstopped = [length for length, stop in zip(self.lengths, self.stops) if stop is None]
        goal = min(unstopped) if unstopped else max(self.stops)
        return [stop is None or length < goal for length, stop in zip(self.lengths, self.stops)]

    @property
    def is_done(self) -> bool:
        return not any(self.active)

    def last_ids(self) -> Tensor:
        """The last byte of each row, int64 `(B, 1)`."""
        if len(set(self.lengths)) == 1:
            return self.sequences[:, self.lengths[0] - 1, None]
        return self.sequences.gather(1, torch.tensor(self.lengths, device=self.sequences.device)[:, None] - 1)

    def put_drafts(self, ids: Tensor) -> None:
        """Writes drafts `(B, k)` behind the texts, for `process` to see; they are not part of them."""
        offsets = torch.arange(ids.shape[1], device=ids.device)
        columns = torch.tensor(self.lengths, device=ids.device)[:, None] + offsets
        rows = torch.arange(len(self.lengths), device=ids.device)[:, None].expand_as(columns)
        fits = columns < self.max_length
        self.sequences[rows[fits], columns[fits]] = ids[fits]

    def process(self, logits: Tensor, ahead: int = 0) -> Tensor:
        """Applies the logits processors to fp32 logits `(B, S, V)`, the `i`-th after text and `ahead + i` drafts.

        Each row is seen with its own text, of its own length.
        """
        if not self.logits_processor:
            return logits
        rows, steps, size = logits.shape
        if not self.has_context:
            return self.logits_processor(None, logits.flatten(0, 1)).view(rows, steps, size)
        scores = logits.clone()
        for step in range(steps):
            for length in set(self.lengths):
                stop = min(length + ahead + step, self.max_length)
                processed = self.logits_processor(self.sequences[:, :stop].contiguous(), logits[:, step].clone())
                if len(set(self.lengths)) == 1:
                    scores[:, step] = processed
                else:
                    chosen = torch.tensor([n == length for n in self.lengths], device=logits.device)
                    scores[:, step] = torch.where(chosen[:, None], processed, scores[:, step])
        return scores

    def append(
        self, ids: Tensor, counts: list[int], logits: Tensor | None = None, scores: Tensor | None = None
    ) -> list[int]:
        """Adds the first `counts[b]` of `ids` `(B, n)` to each row, up to where it stops.

        Args:
            logits, scores: fp32 `(B, n, V)`, what the ids were chosen from, kept if `generate` is to return them.
        Returns:
            how many were added to each row.
        """
        values, before = ids.tolist(), list(self.lengths)
        counts = [min(count, self.max_length - length) for count, length in zip(counts, self.lengths)]
        is_even = len(set(before)) == 1 and len(set(counts)) == 1
        if is_even:
            self.sequences[:, before[0] : before[0] + counts[0]] = ids[:, : counts[0]]
        else:
            for row, (count, length) in enumerate(zip(counts, before)):
                self.sequences[row, length : length + count] = ids[row, :count]
        self._keep(before, counts, logits, scores)
        added = [0] * len(counts)
        stopped_at: dict[int, list[bool]] = {}
        for row, count in enumerate(counts):
            for index in range(count):
                length = before[row] + index + 1
                added[row] = index + 1
                is_stop = values[row][index] in self.eos_token_ids or length >= self.max_length
                if self._criteria and self.stops[row] is None:
                    if length not in stopped_at:
                        kept = None if self.scores is None else tuple(self.scores[: length - self._first])
                        stopped_at[length] = self._criteria(self.sequences[:, :length], kept).tolist()
                    is_stop = is_stop or stopped_at[length][row]
                if is_stop and self.stops[row] is None:
                    self.stops[row] = length
                    if self.waits:
                        break
        self.lengths = [length + count for length, count in zip(before, added)]
        self._stream()
        return added

    def _keep(self, before: list[int], counts: list[int], logits: Tensor | None, scores: Tensor | None) -> None:
        for kept, new in ((self.logits, logits), (self.scores, scores)):
            if kept is None or new is None:
                continue
            if counts == [1] * len(counts) and before == [self._first + len(kept)] * len(counts):
                kept.append(new[:, 0])
                continue
            for row, (length, count) in enumerate(zip(before, counts)):
                for index in range(count):
                    column = length + index - self._first
                    while column >= len(kept):
                        kept.append(new.new_zeros(new.shape[0], new.shape[2]))
                    kept[column][row] = new[row, index]

    def _stream(self) -> None:
        """Hands over the columns that every row has reached."""
        if self.streamer is None:
            return
        reached = [length for length, is_active in zip(self.lengths, self.active) if is_active]
        reached = min(reached) if reached else self.end
        while self._streamed < reached:
            self.streamer.put(self.sequences[:, self._streamed].cpu())
            self._streamed += 1

    @property
    def end(self) -> int:
        """Columns of what is returned."""
        return max(self.lengths) if None in self.stops else max(self.stops)

    def finish(self, cache):
        """What `generate` returns; rows that ended before others are padded."""
        end = self.end
        for row, length in enumerate(self.lengths):
            if length < end:
                self.sequences[row, length:end] = self.pad_token_id
        sequences = self.sequences[:, :end].clone()
        if self.streamer is not None:
            self.streamer.end()
        if not self.returns_dict:
            return sequences
        new = end - self._first
        fields = {
            "scores": None if self.scores is None else tuple(self.scores[:new]),
            "logits": None if self.logits is None else tuple(self.logits[:new]),
        }
        return GenerateDecoderOnlyOutput(sequences=sequences, **fields, **{CACHE_NAME: cache})


__all__ = ["RaggedText", "check_processors", "may_keep_state"]
