"""Generation hooks: `generate()` makes a [`BltCache`] and hands the model its next bytes; all else is transformers'."""

from transformers.generation import CompileConfig, GenerationMixin

from .cache_blt import BltCache
from .speculation_blt import BltSelfSpeculator


_OWN_FIELDS = ("self_speculation_window", "self_speculation_schedule")
_SCHEDULES = ("constant", "heuristic")
_SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class BltGenerationMixin(GenerationMixin):
    """Makes every decoding strategy of transformers use the cache with two clocks.

    Two more fields of the generation configuration (and arguments of `generate`), for greedy decoding and sampling of
    one row by a [`BltForCausalLM`]:

        self_speculation_window (default None): bytes that the local models draft before the whole model verifies
            them. The text is that of normal decoding; sampling keeps its distribution.
        self_speculation_schedule (default `"constant"`): `"heuristic"` adapts the window to what is accepted.

    `cache_implementation="static"` compiles the decoding step with `torch.compile`, on any device, as `compile_config`
    says; `disable_compile=True` leaves it as it is. The first bytes then take as long as compiling does.
    """

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
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if getattr(generation_config, "self_speculation_window", None) is None:
            return
        if generation_mode not in ("greedy_search", "sample"):
            raise ValueError(
                "`self_speculation_window` drafts for greedy decoding and sampling; got generation mode "
                f"'{getattr(generation_mode, 'value', generation_mode)}'. Leave out one of the two."
            )
        if not hasattr(self, "draft_logits"):
            raise ValueError(f"`self_speculation_window` needs a BltForCausalLM; got {type(self).__name__}.")
        if generation_config.use_cache is False:
            raise ValueError("`self_speculation_window` needs `use_cache=True`; got False.")

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        if getattr(generation_config, "self_speculation_window", None) is None:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        if input_ids.shape[0] > 1:
            raise ValueError(
                "`self_speculation_window` decodes one row at a time, because rows would accept differently many "
                f"drafts; got {input_ids.shape[0]} rows."
            )
        return self._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache, attention_mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, BltCache) and not cache.is_empty:
            known = (
                getattr(generation_config, "_mask_length", -1) if attention_mask is None else attention_mask.shape[1]
            )
            if known == input_ids.shape[1]:  # the whole text was passed, so its cached part must not be fed again
                kwargs["num_cached_columns"] = cache.get_seq_length()
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        if getattr(generation_config, "self_speculation_window", None) is not None:
            cache = kwargs["model_kwargs"]["past_key_values"]
            return BltSelfSpeculator(self, cache, generation_config, kwargs["logits_processor"])
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            implementation = generation_config.cache_implementation
            if implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    f"`cache_implementation` must be None, 'dynamic' or 'static'; got {implementation!r}, which cannot "
                    "hold bytes and patches."
                )
            cache = model_kwargs["past_key_values"] = BltCache(self.config)
            if implementation == "static" and not generation_config.disable_compile:
                cache.compile_steps(generation_config.compile_config or CompileConfig(), max_cache_length)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
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
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            is_first_iteration=is_first_iteration,
            **kwargs,
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
