"""Generation hooks: `generate()` makes a [`BltCache`] and hands the model its next bytes; all else is transformers'."""

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import CompileConfig, ContinuousBatchingConfig, GenerationMixin

from .cache_blt import BltCache, cache_to_write
from .checks_blt import check_tensor
from .compiling_blt import round_up_bytes
from .decoding_blt import RaggedText, check_processors
from .names_blt import CACHE_NAME, import_from_package, import_serving, takes_cache
from .speculation_blt import DraftSource, SelfSpeculation, decode_drafted


_OWN_FIELDS = (
    "self_speculation_window", "self_speculation_schedule", "diffusion_block_size", "unmasking", "confidence_threshold",
    "entropy_budget", "verify",
)  # fmt: skip
_SCHEDULES = ("constant", "heuristic")
_SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class BltGenerationMixin(GenerationMixin):
    """Makes every decoding strategy of transformers use the cache with two clocks.

    Two more fields of the generation configuration (and arguments of `generate`), for greedy decoding and sampling by a
    [`BltForCausalLM`]:

        self_speculation_window (default None): bytes that the local models draft before the whole model verifies
            them. The text is that of normal decoding; sampling keeps its distribution.
        self_speculation_schedule (default `"constant"`): `"heuristic"` adapts the window of each row to what it accepts.

    And five for a model that was trained with `config.diffusion_block_size` (`blt_hf.fast_blt.blocks` says what happens):

        diffusion_block_size (default None): bytes of a block, the first of which is chosen by the whole model and the
            others by the decoder. At least 2; what the model was trained with is the most that it does well.
        unmasking (default `"confidence"`): which bytes of a block are kept each time it was read; or `"entropy"`.
        confidence_threshold (default 0.6): probability from which a byte is kept. Above 1: one byte at a time.
        entropy_budget (default 0.9): nats that the bytes kept at a time may have in sum.
        verify (default False): read each block once and let the whole model verify it: greedy text is that of normal
            decoding, and sampling keeps its distribution. Without it the text depends on block size and thresholds.

    `cache_implementation="static"` compiles the decoding step with `torch.compile`, on any device, as `compile_config`
    says; the first bytes then take as long as compiling does. `disable_compile=True` compiles nothing. On a GPU the
    steps are recorded as CUDA graphs either way.
    """

    def _prepare_model_inputs(self, inputs=None, *args, **kwargs):
        if inputs is not None:
            check_tensor("input_ids", inputs, "int64 (rows, bytes)")
        return super()._prepare_model_inputs(inputs, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        own = {name: kwargs.pop(name) for name in _OWN_FIELDS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in own.items():
            setattr(generation_config, name, value)
        window = getattr(generation_config, "self_speculation_window", None)
        schedule = getattr(generation_config, "self_speculation_schedule", "constant")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"`self_speculation_window` must be None or at least 1 byte; got {window!r}.")
        if schedule not in _SCHEDULES:
            raise ValueError(f"`self_speculation_schedule` must be one of {_SCHEDULES}; got {schedule!r}.")
        if getattr(generation_config, "diffusion_block_size", None) is not None:
            self._import_blocks().check_settings(generation_config, self.config)
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
            if getattr(generation_config, field, None) is None:
                continue
            if generation_mode not in ("greedy_search", "sample"):
                raise ValueError(
                    f"`{field}` drafts for greedy decoding and sampling; got generation mode "
                    f"'{getattr(generation_mode, 'value', generation_mode)}'. Leave out one of the two."
                )
            if not hasattr(self, "draft_logits"):
                raise ValueError(f"`{field}` needs a BltForCausalLM; got {type(self).__name__}.")
            if generation_config.use_cache is False:
                raise ValueError(f"`{field}` needs `use_cache=True`; got False.")

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        streamer = kwargs.get("streamer")
        model_kwargs = {
            name: value for name, value in kwargs.items() if name not in ("streamer", "synced_gpus", "tokenizer")
        }
        if kwargs.get("synced_gpus") or not self._decodes_itself(generation_config, model_kwargs):
            if getattr(generation_config, "diffusion_block_size", None) is not None:
                raise ValueError(
                    "`diffusion_block_size` decodes plain byte ids, without hidden states, attentions or other inputs, "
                    "and not under `synced_gpus`; leave out one of the two."
                )
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        check_processors(logits_processor, generation_config, input_ids.shape[0])
        text = RaggedText(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        cache = model_kwargs[CACHE_NAME]
        logits = outputs.logits[:, -1:].float()
        del outputs  # may be large
        source = self._draft_source(generation_config, len(text.lengths), cache)
        fills_blocks = source is None and getattr(generation_config, "diffusion_block_size", None) is not None
        do_sample = generation_config.do_sample
        with torch.no_grad():
            while True:
                scores = text.process(logits)
                if do_sample:
                    ids = torch.multinomial(scores[:, 0].softmax(dim=-1), num_samples=1)
                else:
                    ids = scores.argmax(dim=-1)
                if text.waits and any(text.stops):
                    has_stopped = torch.tensor([stop is not None for stop in text.stops], device=ids.device)
                    ids = ids.masked_fill(has_stopped[:, None], text.pad_token_id)
                text.append(ids, [1] * ids.shape[0], logits, scores)
                if text.is_done or source is not None or fills_blocks:
                    break
                logits = self._next_logits(ids, cache)
            if source is not None:
                decode_drafted(self, source, text, cache, do_sample)
            elif fills_blocks:
                blocks = self._import_blocks()
                unmasking = blocks.Unmasking.from_config(generation_config)
                blocks.decode_blocks(self, text, cache, generation_config.diffusion_block_size, unmasking, do_sample)
        return text.finish(cache)

    def _import_blocks(self):
        return import_from_package("fast_blt.blocks", "`generate` with `diffusion_block_size`")

    def _decodes_itself(self, generation_config, model_kwargs: dict) -> bool:
        """Whether a loop that looks at nothing but logits gives what transformers' loop gives."""
        config, cache = generation_config, model_kwargs.get(CACHE_NAME)
        wants_states = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
        has_own_inputs = "prepare_inputs_for_generation" in vars(self) or (
            type(self).prepare_inputs_for_generation is not BltGenerationMixin.prepare_inputs_for_generation
        )
        plain = {"attention_mask", CACHE_NAME, "use_cache", "position_ids", "logits_to_keep"}
        return (
            isinstance(cache, BltCache)
            and bool(model_kwargs.get("use_cache"))
            and not (wants_states or has_own_inputs or config.is_assistant)
            and hasattr(self, "step_logits")
            and set(model_kwargs) <= plain
        )

    def _next_logits(self, ids, cache: BltCache):
        """fp32 logits `(B, 1, V)` after one more byte of each row."""
        # Who replaces `forward` (accelerate, for autocast or devices) wants to be asked at each byte.
        is_wrapped = any("forward" in vars(module) for module in (self, self.model))
        if is_wrapped or any(module._forward_hooks or module._forward_pre_hooks for module in (self, self.model)):
            return self(input_ids=ids, past_key_values=cache, use_cache=True).logits.float()
        return self.step_logits(ids, cache)

    def _draft_source(self, generation_config, num_rows: int, cache: BltCache) -> DraftSource | None:
        """Who drafts in this call of `generate`; None: nobody."""
        window = getattr(generation_config, "self_speculation_window", None)
        size = getattr(generation_config, "diffusion_block_size", None)
        if size is not None:
            cache.reserve_slack(round_up_bytes(size + 1))
            is_verified = getattr(generation_config, "verify", False)
            return self._import_blocks().BlockDrafts(self, size, generation_config.do_sample) if is_verified else None
        if window is None:
            return None
        is_adaptive = getattr(generation_config, "self_speculation_schedule", "constant") == "heuristic"
        cache.reserve_slack(round_up_bytes(max(window, 32 if is_adaptive else 0) + 1))
        return SelfSpeculation(self, num_rows, window, is_adaptive, generation_config.do_sample)

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache, attention_mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        if isinstance(cache, BltCache) and not cache.is_empty:
            known = (
                getattr(generation_config, "_mask_length", -1) if attention_mask is None else attention_mask.shape[1]
            )
            if known == input_ids.shape[1]:  # the whole text was passed, so its cached part must not be fed again
                kwargs["num_cached_columns"] = cache.get_seq_length()
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def make_cache(self, **kwargs) -> BltCache:
        """An empty cache for this model; arguments as [`BltCache`]."""
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
                compile_config = generation_config.compile_config or CompileConfig()
                cache.fix_steps(None if generation_config.disable_compile else compile_config, max_cache_length)
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
        # New bytes always continue their rows, so neither mask nor positions need to be read again at each step.
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        if continues and next_sequence_length is not None and not is_first_iteration:
            attention_mask = position_ids = None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE_NAME: past_key_values},
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """A manager that requests join and leave while others run; see `blt_hf.serving.continuous`.

        Args:
            generation_config: settings of all requests; None: the model's.
            continuous_batching_config: a `ContinuousBatchingConfig`; None: its defaults.
            workload_hints: as in transformers; not used.
        Raises:
            ValueError: the model is not a [`BltForCausalLM`].
            ImportError: this code came with a checkpoint, and `blt_hf` is not installed.
        """
        manager_class = import_serving().BltContinuousBatchingManager
        manager = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(manager, manager_class):
            return manager
        if not hasattr(self, "step_logits"):
            raise ValueError(f"continuous batching needs a BltForCausalLM; got {type(self).__name__}.")
        return manager_class(
            self,
            self.generation_config if generation_config is None else generation_config,
            ContinuousBatchingConfig() if continuous_batching_config is None else continuous_batching_config,
            workload_hints,
        )

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self.fill_special_token_ids()

    def fill_special_token_ids(self) -> None:
        """Real files carry no special ids; a BLT's are always the same."""
        generation_config = getattr(self, "generation_config", None)
        if generation_config is None:
            return
        for name, token_id in _SPECIAL_TOKEN_IDS.items():
            if getattr(generation_config, name, None) is None:
                setattr(generation_config, name, token_id)
        # It says more than the model's configuration now; else its own fields would be lost in files.
        generation_config._from_model_config = None


__all__ = ["BltGenerationMixin"]
