"""Generation hooks: `generate()` makes a [`BltCache`] and hands the model its next bytes; all else is transformers'."""

from transformers.generation import GenerationMixin

from .cache_blt import BltCache


_SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class BltGenerationMixin(GenerationMixin):
    """Makes every decoding strategy of transformers use the cache with two clocks."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"`cache_implementation={generation_config.cache_implementation!r}` cannot hold bytes and patches; "
                    "leave it out (or pass 'dynamic') to use a BltCache."
                )
            cache = model_kwargs["past_key_values"] = BltCache(self.config)
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
        **kwargs,
    ):
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
        self._fill_special_token_ids()

    def post_init(self):
        super().post_init()
        self._fill_special_token_ids()

    def _fill_special_token_ids(self) -> None:
        """Real files carry no special ids; a BLT's are always the same."""
        generation_config = getattr(self, "generation_config", None)
        for name, token_id in _SPECIAL_TOKEN_IDS.items():
            if generation_config is not None and getattr(generation_config, name, None) is None:
                setattr(generation_config, name, token_id)


__all__ = ["BltGenerationMixin"]
