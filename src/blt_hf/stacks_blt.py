"""The three stacks of a BLT: local encoder, global transformer, local decoder."""

import torch
from torch import Tensor, nn

from .attention_blt import AttentionSpan
from .cache_blt import BltCache
from .chunk_blt import ByteChunk, PatchRouting
from .configuration_blt import BltGlobalTransformerConfig, BltLocalDecoderConfig, BltLocalEncoderConfig
from .layers_blt import (
    BltByteCrossAttention,
    BltPatchCrossAttention,
    BltRMSNorm,
    BltRotaryEmbedding,
    BltTransformerLayer,
    StateTrace,
    run_layers,
)
from .modeling_base_blt import BltPreTrainedModel


_NO_PATCH = -(2**31)  # index of the patch that holds a column without a byte


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
            latents = latents + self.cross_attn_layers[cross_index](
                latents, byte_states, segment, segment >= -self._reach
            )
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
        pooled = pooled.scatter_reduce(
            1, index[..., None].expand_as(byte_states), byte_states, mode, include_self=False
        )
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


__all__ = ["BltGlobalTransformer", "BltLocalDecoder", "BltLocalEncoder"]
