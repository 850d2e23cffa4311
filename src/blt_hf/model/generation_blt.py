"""The loop of `generate` for a BLT, and the hooks of transformers.

[`RaggedText`] keeps the promises of `generate` for each row while it is written: with drafts (`blt_hf.speculation`), rows
grow by different numbers. The mixin makes the cache and hands the model its next bytes; all else is transformers'.
"""

from contextlib import closing
from types import ModuleType

import torch
from torch import Tensor
from transformers import generation
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache_blt import BltCache, cache_to_write
from .checks_blt import check_tensor
from .names_blt import CACHE_NAME, import_from_package, import_where_installed, takes_cache
from .patching_blt import BOE_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID
from .step_blt import StepRunner, captures_by_default


def processor_classes(names: str) -> set[type]:
    """Finds the classes of transformers' logits processors with these names."""
    return {getattr(generation, name) for name in names.split()}


# Processors that look at one distribution alone, so that those of several bytes may go through them at once.
WITHOUT_CONTEXT = processor_classes(
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper TypicalLogitsWarper "
    "SuppressTokensLogitsProcessor"
)


class RaggedText:
    """Holds rows of bytes that may grow by different numbers.

    Args:
        input_ids: int64 `(B, N)`, the prompts, all of `N` columns.
        logits_processor, stopping_criteria, generation_config, streamer: as `generate` gives them to its loops.

    Attributes:
        lengths: columns of each row, on the host.
        with_context: logits processors that look at the text.
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
        self.pad_token_id, self.device = 0 if pad is None else int(pad), input_ids.device
        self._sequences = input_ids.new_full((rows, self.max_length), self.pad_token_id)
        self._sequences[:, :columns] = input_ids
        self._new_ids: list[list[int]] = [[] for _ in range(rows)]
        self._written = [0] * rows  # how many of these the tensor has
        self.lengths, self.stops = [columns] * rows, [None] * rows
        self.logits_processor, self.streamer = logits_processor, streamer
        self.with_context = [processor for processor in logits_processor if type(processor) not in WITHOUT_CONTEXT]
        # As in transformers, only `eos` makes a row that has stopped wait for the others; else it goes on beside them.
        self.waits = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.eos_token_ids, self._criteria = set(), StoppingCriteriaList()
        for criterion in stopping_criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos_token_ids |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self._criteria.append(criterion)
        # Objects of a user's classes may change the model between two bytes.
        parts = (*logits_processor, *self._criteria, *([] if streamer is None else [streamer]))
        self.runs_other_code = any(not type(part).__module__.startswith("transformers.") for part in parts)
        self.returns_dict = returns = generation_config.return_dict_in_generate
        self.scores = [] if returns and generation_config.output_scores else None
        self.logits = [] if returns and generation_config.output_logits else None
        self._first = self._streamed = columns

    @property
    def sequences(self) -> Tensor:
        """int64 `(B, max_length)`; row `b` holds its text in the first `lengths[b]` columns."""
        for row, (ids, written) in enumerate(zip(self._new_ids, self._written)):
            if written < len(ids):
                new = torch.tensor(ids[written:], device=self.device)
                self._sequences[row, self._first + written : self._first + len(ids)] = new
                self._written[row] = len(ids)
        return self._sequences

    @property
    def active(self) -> list[bool]:
        """Rows that are still written."""
        if self.waits:
            return [stop is None for stop in self.stops]
        unstopped = [length for length, stop in zip(self.lengths, self.stops) if stop is None]
        goal = min(unstopped) if unstopped else max(self.stops)
        return [stop is None or length < goal for length, stop in zip(self.lengths, self.stops)]

    @property
    def goes_on(self) -> bool:
        """Whether rows of one length have room for a byte after the next one."""
        return self.lengths[0] + 1 < self.max_length

    @property
    def is_done(self) -> bool:
        return None not in self.stops if self.waits else not any(self.active)

    def last_ids(self) -> Tensor:
        """Returns the last byte of each row, int64 `(B, 1)`."""
        return torch.tensor([ids[-1:] for ids in self._new_ids], device=self.device)

    def pad_stopped(self, ids: Tensor) -> Tensor:
        """Puts padding in the place of bytes `(B, 1)` of rows that wait for others."""
        if not self.waits or not any(self.stops):
            return ids
        has_stopped = torch.tensor([[stop is not None] for stop in self.stops], device=ids.device)
        return ids.masked_fill(has_stopped, self.pad_token_id)

    def process(self, logits: Tensor, ahead: int = 0) -> Tensor:
        """Applies the logits processors to fp32 logits `(B, S, V)`, the `i`-th after text and `ahead + i` drafts.

        The processors see each row with its own text, of its own length.
        """
        if not self.logits_processor:
            return logits
        rows, steps, size = logits.shape
        if not self.with_context:
            scores = logits.flatten(0, 1)
            for processor in self.logits_processor:  # each is one of transformers' own, of two arguments
                scores = processor(None, scores)
            return scores.view(rows, steps, size)
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

    def append(self, ids, counts: list[int], logits: Tensor | None = None, scores: Tensor | None = None) -> list[int]:
        """Adds the first `counts[b]` of `ids` `(B, n)` to each row, up to where it stops.

        Args:
            ids: a tensor, or lists.
            logits, scores: fp32 `(B, n, V)`, from which the ids were chosen, kept if `generate` is to return them.
        Returns:
            how many were added to each row.
        """
        values, before = ids.tolist() if isinstance(ids, Tensor) else ids, self.lengths
        added = [min(count, self.max_length - length) for count, length in zip(counts, before)]
        self._keep(before, added, logits, scores)
        for held, new, count in zip(self._new_ids, values, added):
            held += new[:count]
        stopped_at: dict[int, list[bool]] = {}  # results of the criteria for each length
        for row, (new, length) in enumerate(zip(values, before)):
            for index in range(added[row] if self.stops[row] is None else 0):
                length += 1
                is_stop = new[index] in self.eos_token_ids or length >= self.max_length
                if self._criteria:
                    if length not in stopped_at:
                        kept = None if self.scores is None else tuple(self.scores[: length - self._first])
                        stopped_at[length] = self._criteria(self.sequences[:, :length], kept).tolist()
                    is_stop = is_stop or stopped_at[length][row]
                if is_stop:
                    self.stops[row] = length
                    if self.waits:  # bytes behind the stop are not part of the text
                        added[row] = index + 1
                        del self._new_ids[row][length - self._first :]
                        self._written[row] = min(self._written[row], length - self._first)
                    break
        self.lengths = [length + count for length, count in zip(before, added)]
        if self.streamer is not None:
            self._stream()
        return added

    def _keep(self, before: list[int], counts: list[int], logits: Tensor | None, scores: Tensor | None) -> None:
        for kept, new in ((self.logits, logits), (self.scores, scores)):
            if kept is None or new is None:
                continue
            if counts == [1] * len(counts) and before == [self._first + len(kept)] * len(counts):
                kept.append(new[:, 0].clone())  # a CUDA graph writes it over
                continue
            for row, (length, count) in enumerate(zip(before, counts)):
                for index in range(count):
                    column = length + index - self._first
                    while column >= len(kept):
                        kept.append(new.new_zeros(new.shape[0], new.shape[2]))
                    kept[column][row] = new[row, index]

    def _stream(self) -> None:
        """Hands over the columns that every row has reached."""
        reached = [length for length, is_active in zip(self.lengths, self.active) if is_active]
        reached = min(reached) if reached else self.end
        while self._streamed < reached:
            at = self._streamed - self._first
            self.streamer.put(torch.tensor([ids[at] if at < len(ids) else self.pad_token_id for ids in self._new_ids]))
            self._streamed += 1

    @property
    def end(self) -> int:
        """Columns of the result of `generate`."""
        return max(self.lengths) if None in self.stops else max(self.stops)

    def finish(self, cache: BltCache) -> Tensor | GenerateDecoderOnlyOutput:
        """Makes the result of `generate`; rows that ended before others are padded."""
        end = self.end
        for row, length in enumerate(self.lengths):
            if length < end:
                self.sequences[row, length:end] = self.pad_token_id
        sequences = self.sequences[:, :end].clone()
        if self.streamer is not None:
            self.streamer.end()
        if not self.returns_dict:
            return sequences
        new = slice(end - self._first)
        scores, logits = (None if kept is None else tuple(kept[new]) for kept in (self.scores, self.logits))
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, **{CACHE_NAME: cache})


class NextByte:
    """Chooses the next byte of each row.

    Args:
        text: the texts so far, all of one length.
        do_sample: draw the byte.
        draw: draws with numbers that `prepare` makes outside of a CUDA graph; None: torch's `multinomial` draws.
    """

    is_on_device = False  # it asks nothing of the host, so that a CUDA graph can hold it

    def __init__(self, text: RaggedText, do_sample: bool, draw=None):
        self.text, self.do_sample, self.draw = text, do_sample, draw

    def prepare(self, count: int = 1) -> None:
        """Prepares the next `count` choices outside of a CUDA graph."""
        if self.draw is not None:
            self.draw.prepare(count)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses ids `(B, 1)` from fp32 logits `(B, 1, V)`; returns processed scores `(B, 1, V)` with them."""
        scores = self.text.process(logits)
        return self.text.pad_stopped(self.choose(scores)[0]), scores

    def choose(self, scores: Tensor, index: int = 0) -> tuple[Tensor, Tensor | None]:
        """Chooses ids `(B, 1)`; where they are drawn, returns the probabilities of all `(B, V)` with them."""
        if not self.do_sample:
            return scores.argmax(dim=-1), None
        probs = scores[:, 0].softmax(dim=-1)
        return torch.multinomial(probs, num_samples=1) if self.draw is None else self.draw(probs, index), probs


# Fields of the generation configuration that transformers does not have; those that are read here, with their defaults.
_DEFAULTS = {
    "self_speculation_window": None,
    "self_speculation_schedule": "constant",
    "diffusion_block_size": None,
    "verify": False,
}
_OWN_FIELDS = (*_DEFAULTS, "unmasking", "confidence_threshold", "entropy_budget")
_LEAST_PACKED = 8  # new bytes from which packing weights pays
_LEAST_CAPTURED = 16  # the same for capturing CUDA graphs
_SPECIAL_TOKEN_IDS = {"pad_token_id": BOE_TOKEN_ID, "bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID}


def _drafts(generation_config) -> bool:
    fields = generation_config.self_speculation_window, generation_config.diffusion_block_size
    return any(field is not None for field in fields)


def _import_drafts(generation_config) -> ModuleType:
    if generation_config.diffusion_block_size is not None:
        return import_from_package("fast_blt.blocks", "`generate` with `diffusion_block_size`")
    return import_from_package("speculation", "`generate` with `self_speculation_window`")


class BltGenerationMixin(GenerationMixin):
    """Makes every decoding strategy of transformers use a [`BltCache`], which counts bytes and patches.

    Two more fields of the generation configuration (and arguments of `generate`), for greedy decoding and sampling by a
    [`BltForCausalLM`]:

        self_speculation_window (default None): bytes that the local models draft before the whole model verifies
            them. The text is that of normal decoding; sampling keeps its distribution. `"auto"`: as many as pay here,
            by the cost of steps and the share of accepted drafts; one seed then gives another sampled text each time.
        self_speculation_schedule (default `"constant"`): `"heuristic"` adapts the window of each row to the number of
            drafts that it accepts.

    Five fields for a model that was trained with `config.diffusion_block_size`: `blt_hf.fast_blt.blocks` explains them.

    `cache_implementation="static"` compiles the decoding step with `torch.compile`, on any device, as `compile_config`
    says; the first bytes then take as long as compiling does. `disable_compile=True` compiles nothing. On a GPU the
    steps are captured as CUDA graphs either way.
    """

    def _prepare_model_inputs(self, inputs=None, *args, **kwargs):
        if inputs is not None:
            check_tensor("input_ids", inputs, "int64 (rows, bytes)")
        return super()._prepare_model_inputs(inputs, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        own = {name: kwargs.pop(name) for name in _OWN_FIELDS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in {**_DEFAULTS, **own}.items():
            if name in own or not hasattr(generation_config, name):
                setattr(generation_config, name, value)
        if _drafts(generation_config) or generation_config.self_speculation_schedule != "constant":
            _import_drafts(generation_config).check_settings(generation_config, self.config)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError(
                "`assistant_early_exit` drafts with the first layers of a model of one stack, which a BLT is not; got "
                f"{generation_config.assistant_early_exit!r}. Use `self_speculation_window`, whose drafts come from the "
                "local models, or an `assistant_model`."
            )
        for field in ("self_speculation_window", "diffusion_block_size"):
            if getattr(generation_config, field) is None:
                continue
            if generation_mode not in ("greedy_search", "sample"):
                raise ValueError(
                    f"`{field}` drafts for greedy decoding and sampling; got generation mode "
                    f"'{getattr(generation_mode, 'value', generation_mode)}'. Leave out one of the two."
                )
            if not hasattr(self, "make_runner"):
                raise ValueError(f"`{field}` needs a BltForCausalLM; got {type(self).__name__}.")
            if generation_config.use_cache is False:
                raise ValueError(f"`{field}` needs `use_cache=True`; got False.")

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        streamer = kwargs.get("streamer")
        model_kwargs = {n: v for n, v in kwargs.items() if n not in ("streamer", "synced_gpus", "tokenizer")}
        if kwargs.get("synced_gpus") or not self._decodes_itself(generation_config, model_kwargs):
            if generation_config.diffusion_block_size is not None:
                raise ValueError(
                    "`diffusion_block_size` decodes plain byte ids, without hidden states, attentions or other inputs, "
                    "and not under `synced_gpus`; leave out one of the two."
                )
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        speculation = _import_drafts(generation_config) if _drafts(generation_config) else None
        if speculation is not None:
            speculation.check_processors(logits_processor, generation_config, input_ids.shape[0])
        text = RaggedText(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        cache, lacks = model_kwargs[CACHE_NAME], text.max_length - input_ids.shape[1]
        captures = not cache.is_default or (cache.is_empty and lacks >= _LEAST_CAPTURED and self.captures_by_default)
        if cache.is_default and captures:
            cache.fix_steps()
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        logits = outputs.logits[:, -1:].float()
        del outputs  # may be large
        runner = self.make_runner(cache, lacks >= _LEAST_PACKED, captures, text.runs_other_code)
        do_sample = generation_config.do_sample
        choose = None if runner.graphs is None else runner.graphs.next_byte(text, do_sample)
        choose = NextByte(text, do_sample) if choose is None else choose
        with torch.no_grad(), closing(runner):
            if speculation is None:
                self._decode_bytes(runner, text, choose, logits)
            else:
                ids, scores = choose(logits)
                text.append(ids, [1] * len(ids), logits, scores)
                speculation.decode(self, runner, text, generation_config)
        return text.finish(cache)

    @staticmethod
    def _decode_bytes(runner: StepRunner, text: RaggedText, choose: NextByte, logits: Tensor) -> None:
        """Writes texts to their ends, byte by byte."""
        ids, scores = choose(logits)
        values = runner.start(ids) if text.goes_on else ids.flatten().tolist()
        while True:
            text.append([[value] for value in values], [1] * len(values), logits, scores)
            if text.is_done:
                return
            values, logits, scores = runner.next(choose, text.goes_on)

    def _decodes_itself(self, generation_config, model_kwargs: dict) -> bool:
        """Tells whether a loop that looks at nothing but logits gives the result of transformers' loop."""
        config, cache = generation_config, model_kwargs.get(CACHE_NAME)
        if not (isinstance(cache, BltCache) and hasattr(self, "make_runner")):
            return False
        # A replaced `forward` (accelerate's, for autocast or devices) and hooks of the model are called at each byte.
        calls = any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in (self, self.model))
        wants_states = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
        has_own_inputs = "prepare_inputs_for_generation" in vars(self) or (
            type(self).prepare_inputs_for_generation is not BltGenerationMixin.prepare_inputs_for_generation
        )
        plain = {"attention_mask", CACHE_NAME, "use_cache", "position_ids", "logits_to_keep"}
        return (
            bool(model_kwargs.get("use_cache"))
            and not (wants_states or has_own_inputs or config.is_assistant or (calls and not _drafts(config)))
            and set(model_kwargs) <= plain
        )

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache, attention_mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        if isinstance(cache, BltCache) and not cache.is_empty:
            known = (
                getattr(generation_config, "_mask_length", -1) if attention_mask is None else attention_mask.shape[1]
            )
            if known == input_ids.shape[1]:  # the whole text was passed, so its cached part must not be fed again
                kwargs["num_cached_columns"] = cache.get_seq_length()
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    @property
    def captures_by_default(self) -> bool:
        """Whether steps are captured as CUDA graphs unless `cache_implementation="dynamic"`."""
        return captures_by_default(self.device)

    def make_cache(self, **kwargs) -> BltCache:
        """Makes an empty cache for this model; arguments as [`BltCache`]."""
        return BltCache(self.config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            implementation = generation_config.cache_implementation
            if implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    f"`cache_implementation` must be None, 'dynamic' or 'static'; got {implementation!r}, which cannot "
                    "hold bytes and patches."
                )
            # An assistant of a model with other tokens is taken back to wherever the two texts part.
            slack = {"slack": max(max_cache_length, 256)} if generation_config.is_assistant else {}
            cache = model_kwargs[CACHE_NAME] = self.make_cache(**slack)
            if implementation == "static":
                compile_config = generation_config.compile_config or generation.CompileConfig()
                cache.fix_steps(None if generation_config.disable_compile else compile_config, max_cache_length)
            cache.is_default = implementation is None
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return
        if type(model_kwargs.get(CACHE_NAME)) is DynamicCache and generation_config.use_cache is not False:
            cache_to_write(model_kwargs[CACHE_NAME], self.config)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,  # `generate` looks here for whether it may hand embeddings on
        is_first_iteration=False,
        num_cached_columns=None,
        **kwargs,
    ):
        if is_first_iteration and num_cached_columns is not None and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - num_cached_columns
        # New bytes always continue their rows, so mask and positions are not read again at each step.
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        if continues and next_sequence_length is not None and not is_first_iteration:
            attention_mask = position_ids = None
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE_NAME: past_key_values},
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        embeds = model_inputs.get("inputs_embeds")
        if embeds is not None and hasattr(self, "embed_bytes") and input_ids.shape == embeds.shape[:2]:
            model_inputs["input_ids"] = input_ids  # which hashes and rules read
        return model_inputs

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """Makes a manager that requests join and leave while others run; see `blt_hf.serving.continuous`.

        Raises:
            ValueError: the model is not a [`BltForCausalLM`].
            ImportError: this code came with a checkpoint, and `blt_hf` is not installed.
        """
        serving = import_where_installed("serving.continuous", "continuous batching")
        return serving.manager_of(self, generation_config, continuous_batching_config, workload_hints)

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self.fill_special_token_ids()

    def fill_special_token_ids(self) -> None:
        """Sets special ids, which real files lack and which are the same in all BLTs."""
        generation_config = getattr(self, "generation_config", None)
        if generation_config is None:
            return
        for name, token_id in _SPECIAL_TOKEN_IDS.items():
            if getattr(generation_config, name, None) is None:
                setattr(generation_config, name, token_id)
        # Marked as edited. Else `save_pretrained` would derive it from the model's configuration again, without the ids.
        generation_config._from_model_config = None
