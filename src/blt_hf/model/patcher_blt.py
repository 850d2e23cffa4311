"""The entropy model, whose surprise at the next byte says where patches start."""

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .cache_blt import BltCache
from .checks_blt import check_inputs, check_labels
from .chunk_blt import ByteChunk, make_chunk, number_patches
from .configuration_blt import BltPatcherConfig
from .generation_blt import BltGenerationMixin
from .layers_blt import (
    BltRMSNorm,
    BltRotaryEmbedding,
    BltSelfAttention,
    BltTransformerLayer,
    StateTrace,
    run_layers,
)
from .modeling_base_blt import (
    BltCausalLMOutput,
    BltPreTrainedModel,
    embed_inputs,
    keep_positions,
    keeps_all,
)
from .names_blt import CACHE_NAME, takes_cache
from .patching_blt import entropy_from_logits


class BltPatcher(BltPreTrainedModel, BltGenerationMixin):
    """The entropy model: a small causal byte LM. Inside a BLT it is frozen; by itself it trains and generates."""

    config_class = BltPatcherConfig
    config: BltPatcherConfig
    base_model_prefix = ""
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _can_record_outputs = {"hidden_states": BltTransformerLayer, "attentions": BltSelfAttention}
    _auto_map = {
        "AutoConfig": "configuration_blt.BltPatcherConfig",
        "AutoModelForCausalLM": "patcher_blt.BltPatcher",
    }

    def __init__(self, config: BltPatcherConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_emb = BltRotaryEmbedding(config)
        self.vocab_size = config.vocab_size
        self.loss_type = "ForCausalLM"  # which transformers would otherwise guess from the name of the class
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def entropies(self, input_ids: Tensor, chunk: ByteChunk, cache: BltCache | None) -> Tensor:
        """Nats of the byte after each byte, fp32 `(B, S)`, for a [`BltModel`] that has made a chunk of `(B, S)` ids.

        The cache gets the keys and values; the caller counts the bytes.
        """
        return entropy_from_logits(self.lm_head(self._run(self.embed_tokens(input_ids), chunk, cache)))

    def _run(
        self, hidden_states: Tensor, chunk: ByteChunk, cache: BltCache | None, trace: StateTrace | None = None
    ) -> Tensor:
        """The layers and the norm, on byte embeddings `(B, S, W)`."""
        if trace is not None:
            trace.add(hidden_states)
        span = chunk.span(
            cache,
            None if cache is None else cache.patcher_slots,
            self.config.sliding_window,
            chunk.context_start,
            self.config._attn_implementation,
            trace is not None and trace.attentions is not None,
        )
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        layers = None if cache is None else cache.patcher
        return self.norm(run_layers(self.layers, hidden_states, position_embeddings, span, layers, trace))

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        output_patches: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> BltCausalLMOutput:
        """Predicts the next byte.

        Args:
            input_ids: int64 `(B, S)`; or `inputs_embeds` `(B, S, W)`.
            attention_mask: `(B, S)` or `(B, past + S)`; 0 is padding, on either side.
            position_ids: `(B, S)`; where they restart, another text begins.
            labels: int64 `(B, S)`, -100 is ignored; shifted inside.
            output_patches: also return `entropies`.
            logits_to_keep: as in transformers.
        Returns:
            [`BltCausalLMOutput`].
        """
        shape, device = check_inputs(input_ids, inputs_embeds, self.config.vocab_size, self.config.hidden_size)
        cache = self._start_cache(past_key_values, use_cache, self.config)
        trace = StateTrace(
            self._wants("output_hidden_states", output_hidden_states),
            self._wants("output_attentions", output_attentions),
        )
        chunk = make_chunk(
            input_ids, attention_mask, position_ids, cache, shape, device,
            mask_documents=self.config.mask_documents, eos_token_id=self.config.eos_token_id,
            in_order=trace.attentions is not None,
        )  # fmt: skip
        if cache is not None:
            cache.begin(shape[0], shape[1], chunk.is_small, device)
        inputs_embeds = None if inputs_embeds is None else chunk.pack(inputs_embeds)
        hidden_states = self._run(embed_inputs(self.embed_tokens, chunk.input_ids, inputs_embeds), chunk, cache, trace)
        if cache is not None:
            ends = torch.ones_like(chunk.row_positions, dtype=torch.bool)
            numbers = number_patches(chunk, ends, self.config.mask_documents, self.config.eos_token_id)
            if not chunk.is_small:
                cache.reserve_open(0, chunk.num_columns)
            cache.log.write(numbers.log, None, chunk.access(cache.recent_slots, 0))
            cache.commit(chunk)
            cache.count_chunk(chunk)
        hidden_states = chunk.unpack(hidden_states)
        states, attentions = trace.unpacked(chunk, last=chunk.pack(hidden_states))
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep)).float()
        entropies = None
        if output_patches:
            entropies = entropy_from_logits(logits if keeps_all(logits_to_keep) else self.lm_head(hidden_states))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return BltCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache},
            hidden_states=states,
            attentions=attentions,
            entropies=entropies,
        )


__all__ = ["BltPatcher"]
