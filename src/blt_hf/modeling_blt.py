"""Byte Latent Transformer (arXiv 2412.09871): entropy patcher, local encoder, global transformer, local decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .attention_blt import AttentionSpan
from .cache_blt import BltCache
from .chunk_blt import ByteChunk, PatchRouting, make_chunk, route_patches
from .configuration_blt import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from .embedding_blt import BltHashEmbedding, ngram_hashes
from .generation_blt import BltGenerationMixin
from .layers_blt import (
    BltByteCrossAttention,
    BltPatchCrossAttention,
    BltRMSNorm,
    BltRotaryEmbedding,
    BltSelfAttention,
    BltTransformerLayer,
    StateTrace,
    run_layers,
)
from .patching_blt import (
    BYTE_OFFSET,
    PatchingRule,
    entropy_from_logits,
    find_patch_ends,
    patch_ends_from_lengths,
    patch_lengths_from_ends,
)


logger = logging.get_logger(__name__)

_BOS_TOKEN_ID = 1
_NO_PATCH = -(2**31)  # index of the patch that holds a column without a byte


@dataclass
class BltModelOutput(ModelOutput):
    """What [`BltModel`] returns.

    Attributes:
        last_hidden_state: `(B, S, W)`, byte states after the decoder's norm.
        past_key_values: a [`BltCache`], with `use_cache`.
        hidden_states: with `output_hidden_states`, the decoder's: its input, then each layer's output (the last one
            after the norm).
        attentions: with `output_attentions`, the decoder's self-attention weights, `(B, H, S, T)` a layer.
        encoder_hidden_states, encoder_attentions: the same for the local encoder (its last states are the decoder's
            input).
        global_hidden_states, global_attentions: the same for the global transformer, `(B, P, W)` over the patches
            closed in this call.
        entropies: with `output_patches` and an entropy model, fp32 `(B, S)`: nats of the byte after each byte.
        patch_lengths: with `output_patches`, int64 `(B, P)`: bytes of each patch, the next, unknown byte included;
            after a cache, the first one holds what this call added to the open patch.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: BltCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    global_hidden_states: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None
    entropies: Tensor | None = None
    patch_lengths: Tensor | None = None


@dataclass
class BltCausalLMOutput(ModelOutput):
    """As [`BltModelOutput`], with `loss` (a scalar, with `labels`) and `logits` `(B, S, vocabulary)` in fp32."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: BltCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    global_hidden_states: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None
    entropies: Tensor | None = None
    patch_lengths: Tensor | None = None


class BltPreTrainedModel(PreTrainedModel):
    """Base of all models here: loading, saving, initialisation."""

    config_class = BltConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BltTransformerLayer", "BltPatchCrossAttention", "BltByteCrossAttention"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def post_init(self):
        super().post_init()
        if isinstance(self, BltGenerationMixin):
            self.fill_special_token_ids()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals of standard deviation `fan_in ** -0.5` (an embedding's fan-in is its width); norms are 1.

        Source: the reference's initialisation, with its depth factors switched off as in the released models.
        """
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = module.weight.shape[-1] ** -0.5
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-3 * std, b=3 * std)

    _auto_map = {
        "AutoConfig": "configuration_blt.BltConfig",
        "AutoModel": "modeling_blt.BltModel",
        "AutoModelForCausalLM": "modeling_blt.BltForCausalLM",
        "AutoModelForSequenceClassification": "modeling_blt.BltForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_blt.BltForTokenClassification",
    }

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code that travels along serves every Auto class, not only the one saved."""
        if self._auto_class is not None:
            self.config.auto_map = dict(self._auto_map)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _wants(self, name: str, value: bool | list[int] | None) -> bool | list[int]:
        """An `output_*` argument, or what the config says of it; hidden states may be chosen by index."""
        value = bool(getattr(self.config, name, False)) if value is None else value
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if value and name == "output_attentions" and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"`output_attentions=True` needs `attn_implementation='eager'`; it is "
                f"{self.config._attn_implementation!r}, which computes no weights, so `attentions` will be None."
            )
            return False
        return value

    def _start_cache(self, cache, use_cache: bool | None, config) -> BltCache | None:
        """The cache to write to: the caller's, a new one, or None."""
        if use_cache is None:
            use_cache = cache is not None or (config.use_cache and not self.training)
        if use_cache and self.training and self.is_gradient_checkpointing:
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing; setting `use_cache=False`.")
            use_cache = False
        if not use_cache:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("`past_key_values` holds bytes, so `use_cache=False` cannot be honoured.")
            return None
        if cache is None:
            return BltCache(config)
        if isinstance(cache, BltCache):
            return cache
        if hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0:
            return BltCache(config)  # a placeholder that some callers make without asking the model
        raise ValueError(f"`past_key_values` must be a BltCache (as a forward returns it); got {type(cache).__name__}.")


def _embed(module: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    return module(input_ids) if inputs_embeds is None else inputs_embeds


def _check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[tuple[int, int], torch.device]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "exactly one of `input_ids` and `inputs_embeds` is needed; got "
            f"{'neither' if input_ids is None else 'both'}."
        )
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must be two-dimensional (rows, bytes); got shape {tuple(input_ids.shape)}.")
        return tuple(input_ids.shape), input_ids.device
    return tuple(inputs_embeds.shape[:2]), inputs_embeds.device


class BltPatcher(BltPreTrainedModel, BltGenerationMixin):
    """The entropy model: a small causal byte LM. Inside a BLT it is frozen; by itself it trains and generates."""

    config_class = BltPatcherConfig
    config: BltPatcherConfig
    base_model_prefix = ""
    _can_record_outputs = {"hidden_states": BltTransformerLayer, "attentions": BltSelfAttention}
    _auto_map = {
        "AutoConfig": "configuration_blt.BltPatcherConfig",
        "AutoModelForCausalLM": "modeling_blt.BltPatcher",
    }

    def __init__(self, config: BltPatcherConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_emb = BltRotaryEmbedding(config)
        self.vocab_size = config.vocab_size
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

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
        chunk: ByteChunk | None = None,
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
            chunk: what a [`BltModel`] has already made of these arguments; it also ends the cache's step.
        Returns:
            [`BltCausalLMOutput`]; with `chunk`, entropies fp32 `(B, S)` alone.
        """
        cache = past_key_values
        is_part = chunk is not None
        if not is_part:
            shape, device = _check_inputs(input_ids, inputs_embeds)
            cache = self._start_cache(cache, use_cache, self.config)
            chunk = make_chunk(
                input_ids, attention_mask, position_ids, cache, shape, device,
                mask_documents=self.config.mask_documents, eos_token_id=self.config.eos_token_id,
            )  # fmt: skip
            inputs_embeds = None if inputs_embeds is None else chunk.pack(inputs_embeds)
        hidden_states = _embed(self.embed_tokens, input_ids if is_part else chunk.input_ids, inputs_embeds)
        trace = StateTrace(
            self._wants("output_hidden_states", output_hidden_states), self._wants("output_attentions", output_attentions)
        )
        trace.add(hidden_states)
        num_past = cache.patcher[0].num_visible if cache is not None else 0
        span = AttentionSpan(
            num_past,
            chunk.num_columns,
            self.config.sliding_window,
            chunk.first_key(chunk.context_start, num_past, cache.min_bytes if cache is not None else 0),
            self.config._attn_implementation,
            wants_weights=trace.attentions is not None,
        )
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        cache_layers = None if cache is None else cache.patcher
        hidden_states = run_layers(self.layers, hidden_states, position_embeddings, span, cache_layers, trace)
        hidden_states = self.norm(hidden_states)
        if is_part:
            return entropy_from_logits(self.lm_head(hidden_states))
        if cache is not None:
            routing = route_patches(
                chunk, torch.ones_like(chunk.row_positions, dtype=torch.bool), self.config.mask_documents,
                self.config.eos_token_id,
            )  # fmt: skip
            cache.log.integers.append(routing.log)
            cache.log.entropies.append(routing.log.new_zeros(routing.log.shape[0], chunk.num_columns, 1).float())
            cache.commit(chunk)
        hidden_states = chunk.unpack(hidden_states)
        states, attentions = trace.unpacked(chunk, last=chunk.pack(hidden_states))
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep)).float()
        entropies = None
        if output_patches:
            entropies = entropy_from_logits(logits if _keeps_all(logits_to_keep) else self.lm_head(hidden_states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return BltCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=states,
            attentions=attentions,
            entropies=entropies,
        )


def _keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The last `logits_to_keep` positions of `(B, S, W)` (0: all), or those of an index tensor, as in transformers."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


class BltLocalEncoder(BltPreTrainedModel):
    """Bytes to byte states and to the latents of the patches that they close."""

    config_class = BltLocalEncoderConfig
    config: BltLocalEncoderConfig

    def __init__(self, config: BltLocalEncoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = BltRotaryEmbedding(config)
        self.patch_embedding_projection = nn.Linear(
            config.hidden_size, config.hidden_size * config.cross_attn_k, bias=False
        )
        num_cross = config.num_hidden_layers if config.cross_attn_all_layers else 1
        self.cross_attn_layers = nn.ModuleList([BltPatchCrossAttention(config, i) for i in range(num_cross)])
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        chunk: ByteChunk,
        routing: PatchRouting,
        span: AttentionSpan,
        past_key_values: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            inputs_embeds: `(B, S, W)`, byte embeddings with their hash embeddings.
            chunk, routing: what the bytes are, and which patches they close.
            span: keys of each byte.
        Returns:
            byte states `(B, S, W)`, and latents `(B, P, K, W)` of the `P = routing.max_new` patches closed (None for 0).
        """
        cache = past_key_values
        hidden_states = self.dropout(inputs_embeds)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        byte_patch = routing.byte_patch
        if chunk.is_text is not None:
            byte_patch = torch.where(chunk.is_text, byte_patch, _NO_PATCH)
        if cache is not None:
            byte_patch = self._with_open_patch(chunk, routing, cache, byte_patch)
        segment = byte_patch - chunk.previous["num_patches"][:, None]
        latents = None
        first_cross_layer = 0 if self.config.cross_attn_all_layers else len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            cache_layer = None if cache is None else cache.encoder[index]
            hidden_states, weights = layer(hidden_states, position_embeddings, span, past_key_values=cache_layer)
            if trace is not None:
                trace.add(hidden_states, weights)
            if index < first_cross_layer:
                continue
            cross_index = index - first_cross_layer
            byte_states = hidden_states
            if cache is not None:
                byte_states = cache.byte_states[cross_index].append(hidden_states)
            if routing.max_new == 0:
                continue
            if latents is None:
                latents = self._pool(byte_states, segment, routing.max_new)
            latents = latents + self.cross_attn_layers[cross_index](latents, byte_states, segment, segment >= -self._reach)
        return hidden_states, latents

    @property
    def _reach(self) -> int:
        """How many patches back a byte may still be read."""
        return (self.config.cross_attn_window or 1) - 1

    def _with_open_patch(self, chunk: ByteChunk, routing: PatchRouting, cache: BltCache, byte_patch: Tensor) -> Tensor:
        """Patches of the bytes whose states the cache holds, followed by those of the chunk, `(B, T)`."""
        held = cache.byte_patches.values
        if held is not None:
            held = held[..., 0]
            # Rows reach back differently far, and a text that begins here leaves the open patch unread.
            age = torch.arange(held.shape[1], 0, -1, device=held.device)
            is_read = age <= cache.needed_byte_states()[:, None]
            if chunk.text_starts is not None:
                is_read = is_read & ~chunk.text_starts[:, :1]
            held = torch.where(is_read, held, _NO_PATCH)
        cache.byte_patches.append(byte_patch[..., None])
        return byte_patch if held is None else torch.cat([held, byte_patch], dim=1)

    def _pool(self, byte_states: Tensor, segment: Tensor, num_patches: int) -> Tensor:
        """Pools the bytes of each patch and projects the pool to its `K` queries, `(B, P, K, W)`."""
        rows, _, width = byte_states.shape
        index = torch.where((segment >= 0) & (segment < num_patches), segment, num_patches)
        mode = {"max": "amax", "min": "amin", "mean": "mean"}[self.config.patch_pooling]
        pooled = byte_states.new_zeros(rows, num_patches + 1, width)
        pooled = pooled.scatter_reduce(1, index[..., None].expand_as(byte_states), byte_states, mode, include_self=False)
        queries = self.patch_embedding_projection(pooled[:, :num_patches])
        return queries.view(rows, num_patches, self.config.cross_attn_k, width)


class BltGlobalTransformer(BltPreTrainedModel):
    """The transformer over patches; one position a patch, full causal attention."""

    config_class = BltGlobalTransformerConfig
    config: BltGlobalTransformerConfig

    def __init__(self, config: BltGlobalTransformerConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = BltRotaryEmbedding(config)
        input_size = getattr(config, "encoder_cross_output_size", None)
        self.token_embedding_projection = (
            nn.Identity() if input_size is None else nn.Linear(input_size, config.hidden_size, bias=False)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        routing: PatchRouting,
        past_key_values: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """Runs the patches that were closed: latents `(B, P, K*W_local)` to `(B, P, W)`.

        With a cache, rows that closed none are left out (0 in the result). Columns past a row's own patches hold
        values that nothing reads.
        """
        rows, old_counts, first_key = None, routing.old_counts, routing.first_patch
        if past_key_values is not None and 0 in routing.new_counts:
            rows = [row for row, count in enumerate(routing.new_counts) if count]
            selected = torch.tensor(rows, device=inputs_embeds.device)
            old_counts = [old_counts[row] for row in rows]
            inputs_embeds = inputs_embeds.index_select(0, selected)
            first_key = None if first_key is None else first_key.index_select(0, selected)
        hidden_states = self.dropout(self.token_embedding_projection(inputs_embeds))
        if trace is not None:
            trace.add(hidden_states)
        num_new = hidden_states.shape[1]
        positions = torch.tensor(old_counts, device=hidden_states.device)[:, None]
        positions = positions + torch.arange(num_new, device=hidden_states.device)
        is_ragged = len(set(old_counts)) > 1
        span = AttentionSpan(
            max(old_counts),
            num_new,
            None,
            first_key,
            self.config._attn_implementation,
            wants_weights=trace is not None and trace.attentions is not None,
            last_key=positions if is_ragged else None,
        )
        position_embeddings = self.rotary_emb.for_heads(hidden_states, positions)
        cache_layers, cache_kwargs = None, {}
        if past_key_values is not None:
            cache_layers = past_key_values.global_transformer
            cache_kwargs = {"counts": old_counts, "rows": rows, "total_rows": len(routing.new_counts)}
        hidden_states = run_layers(
            self.layers, hidden_states, position_embeddings, span, cache_layers, trace, **cache_kwargs
        )
        if rows is None:
            return hidden_states
        complete = hidden_states.new_zeros(len(routing.new_counts), *hidden_states.shape[1:])
        return complete.index_copy(0, selected, hidden_states)


class BltLocalDecoder(BltPreTrainedModel):
    """Byte states and patch latents to the states that predict the next bytes."""

    config_class = BltLocalDecoderConfig
    config: BltLocalDecoderConfig

    def __init__(self, config: BltLocalDecoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = BltRotaryEmbedding(config)
        self.patch_embedding_projection = nn.Linear(
            config.hidden_size_global, config.hidden_size * config.cross_attn_k, bias=False
        )
        self.norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        num_cross = config.num_hidden_layers if config.cross_attn_all_layers else 1
        self.cross_attn_layers = nn.ModuleList([BltByteCrossAttention(config, i) for i in range(num_cross)])
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        byte_states: Tensor,
        global_states: Tensor | None,
        chunk: ByteChunk,
        routing: PatchRouting,
        span: AttentionSpan,
        past_key_values: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """Byte states `(B, S, W)` and states of new patches `(B, P, W_global)` (None for 0) to `(B, S, W)`."""
        cache = past_key_values
        latents = None
        if global_states is not None:
            latents = self.patch_embedding_projection(global_states)
            latents = latents.view(*latents.shape[:2], self.config.cross_attn_k, -1)
        hidden_states = self.dropout(byte_states)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        first = -chunk.previous["num_patches"][:, None]
        if trace is not None:
            trace.add(hidden_states)
        for index, layer in enumerate(self.layers):
            if index < len(self.cross_attn_layers):
                kept = None if cache is None else cache.latents[index]
                cross = self.cross_attn_layers[index](hidden_states, latents, routing.read, first, kept)
                hidden_states = hidden_states + cross
            cache_layer = None if cache is None else cache.decoder[index]
            hidden_states, weights = layer(hidden_states, position_embeddings, span, past_key_values=cache_layer)
            if trace is not None:
                trace.add(hidden_states, weights)
        return self.norm(hidden_states)


class BltModel(BltPreTrainedModel):
    """The Byte Latent Transformer without a head."""

    config: BltConfig
    _can_record_outputs = {"hidden_states": BltTransformerLayer, "attentions": BltSelfAttention}

    def __init__(self, config: BltConfig):
        super().__init__(config)
        self.local_encoder = BltLocalEncoder(config.encoder_config)
        self.global_transformer = BltGlobalTransformer(config.global_config)
        self.local_decoder = BltLocalDecoder(config.decoder_config)
        num_tables = config.encoder_hash_byte_group_nb_functions * len(config.encoder_hash_byte_group_size)
        self.encoder_hash_tok_embedding = BltHashEmbedding(
            num_tables * config.encoder_hash_byte_group_vocab, config.encoder_config.hidden_size
        )
        self.patcher = BltPatcher(config.patcher_config) if config.patch_in_forward else None
        self.freeze_patcher()
        self.post_init()

    def freeze_patcher(self) -> None:
        """Takes the entropy model out of training; it is part of the input, not of what is learned."""
        if self.patcher is not None:
            self.patcher.requires_grad_(False)
            self.patcher.eval()

    def set_patcher(self, patcher: BltPatcher) -> None:
        """Swaps in another entropy model, frozen.

        Args:
            patcher: any [`BltPatcher`] that knows all bytes; its configuration becomes part of this model's. Ids that
                this model has and it lacks (added tokens) read as BOS to it.
        Raises:
            ValueError: it is not a [`BltPatcher`], or knows fewer ids than there are bytes and special tokens.
        """
        if not isinstance(patcher, BltPatcher):
            raise ValueError(f"`patcher` must be a BltPatcher; got {type(patcher).__name__}.")
        if patcher.config.vocab_size < BYTE_OFFSET + 256:
            raise ValueError(
                f"`patcher` has a vocabulary of {patcher.config.vocab_size}; {BYTE_OFFSET + 256} ids or more are needed."
            )
        patcher.config.mask_documents = self.config.mask_documents
        self.patcher = patcher.to(self.device)
        self.config.patcher_config = patcher.config
        self.config.patch_in_forward = True
        self.freeze_patcher()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.patcher is not None:
            self.patcher.eval()
        return self

    def get_input_embeddings(self):
        return self.local_encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.local_encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
        inputs_embeds: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        output_patches: bool | None = None,
        **kwargs,
    ) -> BltModelOutput:
        """Byte states from bytes.

        Args:
            input_ids: int64 `(B, S)`, ids in `[0, vocab_size)`.
            attention_mask: `(B, S)` or `(B, past + S)`; 0 is padding, which may stand on either side of a text.
            position_ids: `(B or 1, S)`; where they restart inside a row, another text begins that sees nothing of
                those before it (as in transformers' padding-free batches). Their offset does not matter.
            past_key_values: what an earlier call returned, to continue from.
            inputs_embeds: `(B, S, W)` instead of `input_ids`: the sum of byte and hash embeddings. The hashes and the
                rules `entropy` and `space` read ids, so these rules then need `patch_lengths`.
            patch_lengths: int64 `(B, P)`, zeros on the right: patches to use instead of the rule's, on the bytes of
                the text (padding not counted). Each row sums to its bytes plus 1 (the next byte, which tells whether
                the last patch is complete) or to its bytes. Not after a cache that holds bytes.
            use_cache: return a cache; None: the config's `use_cache`, but never in training.
            output_patches: also return `entropies` and `patch_lengths`.
        Returns:
            [`BltModelOutput`].
        Raises:
            ValueError: an argument that cannot be honoured.
        """
        shape, device = _check_inputs(input_ids, inputs_embeds)
        config = self.config
        cache = self._start_cache(past_key_values, use_cache, config)
        chunk = make_chunk(
            input_ids, attention_mask, position_ids, cache, shape, device,
            mask_documents=config.mask_documents, newline_reset=config.patching_newline_reset,
            eos_token_id=config.eos_token_id,
        )  # fmt: skip
        if chunk.has_documents and max(self._cross_windows) > 1:
            raise ValueError(
                "`position_ids` restart inside a row, and `cross_attn_window` is larger than 1: cross attention over "
                "several patches would cross texts. Pass one text a row."
            )
        entropies, ends = self._find_patches(chunk, cache, patch_lengths)
        routing = route_patches(chunk, ends, config.mask_documents, config.eos_token_id)
        if routing.max_new == 0 and cache is None:
            raise ValueError("`attention_mask` leaves no text in any row.")

        wants_states = self._wants("output_hidden_states", output_hidden_states)
        wants_weights = self._wants("output_attentions", output_attentions)
        traces = [StateTrace(wants_states, wants_weights) for _ in range(3)]
        embeds = self._embed_bytes(chunk) if inputs_embeds is None else chunk.pack(inputs_embeds)
        traces[0].add(embeds)
        span = self._local_span(chunk, cache, wants_weights)
        byte_states, latents = self.local_encoder(embeds, chunk, routing, span, cache, traces[0])
        global_states = None
        if latents is not None:
            global_states = self.global_transformer(latents.flatten(2), routing, cache, traces[1])
        hidden_states = self.local_decoder(byte_states, global_states, chunk, routing, span, cache, traces[2])
        if cache is not None:
            self._end_step(cache, chunk, routing, entropies)
        return self._make_output(chunk, routing, hidden_states, cache, entropies, traces, output_patches)

    @torch.no_grad()
    def draft(self, input_ids: Tensor, past_key_values: BltCache) -> Tensor:
        """Byte states `(B, S, W)` of the local models alone, that read the last closed patch and close none.

        The cache takes the bytes in; undo that with its `snapshot` and `restore`.
        """
        config, cache = self.config, past_key_values
        chunk = make_chunk(
            input_ids, None, None, cache, tuple(input_ids.shape), input_ids.device,
            mask_documents=config.mask_documents, eos_token_id=config.eos_token_id,
        )  # fmt: skip
        no_ends = torch.zeros_like(input_ids, dtype=torch.bool)
        routing = route_patches(chunk, no_ends, config.mask_documents, config.eos_token_id)
        span = self._local_span(chunk, cache)
        byte_states, _ = self.local_encoder(self._embed_bytes(chunk), chunk, routing, span, cache)
        hidden_states = self.local_decoder(byte_states, None, chunk, routing, span, cache)
        self._end_step(cache, chunk, routing, None)
        return hidden_states

    def _local_span(self, chunk: ByteChunk, cache: BltCache | None, wants_weights: bool = False) -> AttentionSpan:
        """Keys of the self-attention of encoder and decoder."""
        num_past = cache.encoder[0].num_visible if cache is not None else 0
        return AttentionSpan(
            num_past,
            chunk.num_columns,
            self.config.local_attention_window_len,
            chunk.first_key(chunk.document_start, num_past, cache.min_bytes if cache is not None else 0),
            self.config._attn_implementation,
            wants_weights=wants_weights,
        )

    @property
    def _cross_windows(self) -> tuple[int, int]:
        return tuple(c.cross_attn_window or 1 for c in (self.config.encoder_config, self.config.decoder_config))

    def _embed_bytes(self, chunk: ByteChunk) -> Tensor:
        embeds = self.local_encoder.embed_tokens(chunk.input_ids)
        config = self.config
        if config.encoder_hash_byte_group_nb_functions:
            hashes = ngram_hashes(
                chunk.input_ids,
                chunk.history,
                chunk.text_positions,
                config.encoder_hash_byte_group_size,
                config.encoder_hash_byte_group_nb_functions,
                config.encoder_hash_byte_group_vocab,
            )
            embeds = embeds + self.encoder_hash_tok_embedding(hashes).to(embeds.device)
        return embeds

    def _find_patches(
        self, chunk: ByteChunk, cache: BltCache | None, patch_lengths: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Entropies `(B, S)` where the entropy model ran, and patch ends `(B, S)`."""
        config = self.config
        entropies = None
        # Checked before anything is written to the cache.
        given_ends = None if patch_lengths is None else self._given_ends(chunk, patch_lengths)
        # With given patches the entropy model only runs to leave its state in the cache.
        if config.uses_patcher and (patch_lengths is None or cache is not None) and self.patcher is not None:
            if chunk.input_ids is None:
                if patch_lengths is None:
                    raise ValueError(
                        "`inputs_embeds` hide the bytes that `patching_mode='entropy'` reads; pass `patch_lengths`."
                    )
            else:
                with torch.no_grad():
                    known_ids = self._ids_known_to_patcher(chunk.input_ids)
                    entropies = self.patcher(known_ids, chunk=chunk, past_key_values=cache)
        if given_ends is not None:
            return entropies, given_ends
        if config.uses_patcher and entropies is None:
            raise ValueError(
                "`patching_mode='entropy'` needs an entropy model, and this model was built with "
                "`patch_in_forward=False`: pass `patch_lengths`, or give it one with `set_patcher`."
            )
        if config.patching_mode == "space" and chunk.input_ids is None:
            raise ValueError("`inputs_embeds` hide the bytes that `patching_mode='space'` reads; pass `patch_lengths`.")
        ends = find_patch_ends(
            PatchingRule.from_config(config),
            chunk.input_ids,
            entropies,
            chunk.text_positions,
            chunk.previous["input_id"],
            chunk.previous_entropy,
            chunk.previous["open_bytes"],
        )
        return entropies, ends

    def _ids_known_to_patcher(self, input_ids: Tensor) -> Tensor:
        """Tokens that were added to this model's vocabulary read as a beginning of text to the frozen entropy model."""
        size = self.patcher.config.vocab_size
        return input_ids if self.config.vocab_size <= size else torch.where(input_ids < size, input_ids, _BOS_TOKEN_ID)

    def _given_ends(self, chunk: ByteChunk, patch_lengths: Tensor) -> Tensor:
        rows = chunk.num_bytes.shape[0]
        if chunk.cached_bytes is not None:
            raise ValueError("`patch_lengths` describe whole texts; they cannot be given after a cache that holds bytes.")
        if patch_lengths.dim() != 2 or patch_lengths.shape[0] != rows:
            raise ValueError(
                f"`patch_lengths` has shape {tuple(patch_lengths.shape)}; one row of lengths for each of the {rows} "
                "rows of the input is accepted."
            )
        excess = patch_lengths.sum(dim=1) - chunk.num_bytes
        wrong = ((excess != 0) & (excess != 1)) | (patch_lengths < 0).any(dim=1) | (patch_lengths[:, 0] > 1)
        wrong = wrong & (chunk.num_bytes > 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"row {row} of `patch_lengths` is {patch_lengths[row].tolist()}, for {int(chunk.num_bytes[row])} bytes: "
                "lengths must not be negative, begin with a patch of 1 byte, and sum to the bytes of the text, or to "
                "one more (the next byte)."
            )
        ends = patch_ends_from_lengths(patch_lengths, chunk.num_columns)
        return ends | (chunk.text_positions == 0)

    def _end_step(self, cache: BltCache, chunk: ByteChunk, routing: PatchRouting, entropies: Tensor | None) -> None:
        if entropies is None:
            entropies = torch.zeros(routing.ends.shape, device=routing.ends.device)
        cache.log.integers.append(routing.log)
        cache.log.entropies.append(entropies[..., None])
        patch_shift = None
        if min(routing.new_counts) < routing.max_new:
            patch_shift = routing.max_new - routing.num_new
        cache.commit(chunk, patch_shift, routing.max_open_bytes)

    def _make_output(self, chunk, routing, hidden_states, cache, entropies, traces, output_patches) -> BltModelOutput:
        encoder_states, encoder_weights = traces[0].unpacked(chunk)
        states, weights = traces[2].unpacked(chunk, last=hidden_states)
        patch_lengths = None
        if output_patches:
            patch_lengths = patch_lengths_from_ends(routing.ends, chunk.num_bytes)
            entropies = None if entropies is None else chunk.unpack(entropies)
        return BltModelOutput(
            last_hidden_state=chunk.unpack(hidden_states),
            past_key_values=cache,
            hidden_states=states,
            attentions=weights,
            encoder_hidden_states=encoder_states,
            encoder_attentions=encoder_weights,
            global_hidden_states=traces[1].selected(traces[1].hidden_states),
            global_attentions=traces[1].attentions or None,
            entropies=entropies if output_patches else None,
            patch_lengths=patch_lengths,
        )


class BltForCausalLM(BltPreTrainedModel, BltGenerationMixin):
    """The Byte Latent Transformer with a head over the next byte."""

    config: BltConfig
    # As in-tree: with `tie_word_embeddings`, files hold the head alone.
    _tied_weights_keys = {"model.local_encoder.embed_tokens.weight": "lm_head.weight"}

    def __init__(self, config: BltConfig):
        super().__init__(config)
        self.model = BltModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.decoder_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def set_patcher(self, patcher: BltPatcher) -> None:
        """See [`BltModel.set_patcher`]."""
        self.model.set_patcher(patcher)

    def draft_logits(self, input_ids: Tensor, past_key_values: BltCache) -> Tensor:
        """Logits `(B, vocabulary)`, fp32, after the last byte, by [`BltModel.draft`]."""
        return self.lm_head(self.model.draft(input_ids, past_key_values)[:, -1]).float()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        output_patches: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> BltCausalLMOutput:
        """Predicts the next byte; arguments as [`BltModel.forward`], and:

        Args:
            labels: int64 `(B, S)`, -100 is ignored; shifted inside. `num_items_in_batch` is honoured.
            logits_to_keep: the last so many positions get logits (0: all), or those of an index tensor.
        Returns:
            [`BltCausalLMOutput`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            patch_lengths=patch_lengths,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_patches=output_patches,
            return_dict=True,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return BltCausalLMOutput(loss=loss, logits=logits, **fields)


class _BltClassifier(BltPreTrainedModel):
    """What the two classifiers share."""

    config: BltConfig

    def __init__(self, config: BltConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BltModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.decoder_config.hidden_size, config.num_labels, bias=self._score_bias)
        self.post_init()

    _score_bias = False

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def set_patcher(self, patcher: BltPatcher) -> None:
        """See [`BltModel.set_patcher`]."""
        self.model.set_patcher(patcher)


class BltForSequenceClassification(_BltClassifier):
    """A label for each row, from the state of its last byte."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels: int64 `(B,)` (classes), or floats `(B,)` / `(B, num_labels)` (regression, several labels).
        Returns:
            `logits` `(B, num_labels)`; other arguments as [`BltModel.forward`]. The last byte is told by
            `attention_mask`: without one, every column is text.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, patch_lengths, use_cache,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        states = outputs.last_hidden_state
        last = torch.full((states.shape[0],), states.shape[1] - 1, device=states.device)
        if attention_mask is not None:
            columns = torch.arange(states.shape[1], device=states.device)
            last = ((attention_mask[:, -states.shape[1] :] != 0) * columns).argmax(dim=1)
        logits = self.score(self.dropout(states[torch.arange(states.shape[0], device=states.device), last]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BltForTokenClassification(_BltClassifier):
    """A label for each byte."""

    _score_bias = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """`logits` `(B, S, num_labels)`; `labels` int64 `(B, S)`, -100 is ignored; the rest as [`BltModel.forward`]."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, patch_lengths, use_cache,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "BltCausalLMOutput",
    "BltForCausalLM",
    "BltForSequenceClassification",
    "BltForTokenClassification",
    "BltModel",
    "BltModelOutput",
    "BltPatcher",
    "BltPreTrainedModel",
]
