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


NO_PATCH = -(2**31)  # index of the patch that holds a column without a byte


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
            byte_patch = torch.where(chunk.is_text, byte_patch, NO_PATCH)
        if cache is not None:
            byte_patch = self._with_open_patch(chunk, routing, cache, byte_patch)
        segment = byte_patch - chunk.previous["num_patches"][:, None]
        states = self.run_bytes(
            hidden_states, position_embeddings, span, None if cache is None else cache.encoder, trace
        )
        hidden_states = states[-1]
        if cache is not None:
            states = [kept.append(new) for kept, new in zip(cache.byte_states, states)]
        if routing.max_new == 0:
            return hidden_states, None
        return hidden_states, self.make_latents(states, segment, routing.max_new)

    def run_bytes(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        span: AttentionSpan,
        cache_layers: list | None,
        trace: StateTrace | None = None,
    ) -> list[Tensor]:
        """The layers over bytes: states `(B, S, W)` that each cross attention reads; the last are the encoder's own."""
        states = []
        for layer, cache_layer in zip(self.layers, cache_layers or [None] * len(self.layers)):
            hidden_states, weights = layer(hidden_states, position_embeddings, span, past_key_values=cache_layer)
            states.append(hidden_states)
            if trace is not None:
                trace.add(hidden_states, weights)
        return states[-len(self.cross_attn_layers) :]

    def make_latents(self, byte_states: list[Tensor], segment: Tensor, num_patches: int) -> Tensor:
        """Latents `(B, P, K, W)` of the patches that bytes `(B, T, W)` make up.

        Args:
            byte_states: what each cross attention reads.
            segment: int64 `(B, T)`, patch of each byte among the `P`.
        """
        latents = self._pool(byte_states[0], segment, num_patches)
        for cross_attention, states in zip(self.cross_attn_layers, byte_states):
            latents = latents + cross_attention(latents, states, segment, segment >= -self._reach)
        return latents

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
            held = torch.where(is_read, held, NO_PATCH)
        cache.byte_patches.append(byte_patch[..., None])
        return byte_patch if held is None else torch.cat([held, byte_patch], dim=1)

    def _pool(self, byte_states: Tensor, segment: Tensor, num_patches: int) -> Tensor:
        """Pools the bytes of each patch and projects the pool to its `K` queries, `(B, P, K, W)`."""
        rows, _, width = byte_states.shape
        is_read = (segment >= 0) & (segment < num_patches)
        if num_patches == 1:
            pooled = self._pool_one(byte_states, is_read[..., None])
        else:
            index = torch.where(is_read, segment, num_patches)
            mode = {"max": "amax", "min": "amin", "mean": "mean"}[self.config.patch_pooling]
            pooled = byte_states.new_zeros(rows, num_patches + 1, width)
            pooled = pooled.scatter_reduce(
                1, index[..., None].expand_as(byte_states), byte_states, mode, include_self=False
            )[:, :num_patches]
        queries = self.patch_embedding_projection(pooled)
        return queries.view(rows, num_patches, self.config.cross_attn_k, width)

    def _pool_one(self, byte_states: Tensor, is_read: Tensor) -> Tensor:
        """The same for rows of one patch, `(B, 1, W)`, without a scatter; 0 for a patch without bytes."""
        if self.config.patch_pooling == "mean":
            return (byte_states * is_read).sum(dim=1, keepdim=True) / is_read.sum(dim=1, keepdim=True).clamp_min(1)
        sign = 1 if self.config.patch_pooling == "max" else -1
        lowest = torch.finfo(byte_states.dtype).min
        pooled = (byte_states * sign).masked_fill(~is_read, lowest).amax(dim=1, keepdim=True) * sign
        return pooled * is_read.any(dim=1, keepdim=True)


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
        num_new = inputs_embeds.shape[1]
        positions = torch.tensor(old_counts, device=inputs_embeds.device)[:, None]
        positions = positions + torch.arange(num_new, device=inputs_embeds.device)
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
        cache_layers, cache_kwargs = None, {}
        if past_key_values is not None:
            cache_layers = past_key_values.global_transformer
            cache_kwargs = {"counts": old_counts, "rows": rows, "total_rows": len(routing.new_counts)}
        hidden_states = self.run_patches(inputs_embeds, positions, span, cache_layers, trace, **cache_kwargs)
        if rows is None:
            return hidden_states
        complete = hidden_states.new_zeros(len(routing.new_counts), *hidden_states.shape[1:])
        return complete.index_copy(0, selected, hidden_states)

    def run_patches(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        span: AttentionSpan,
        cache_layers: list | None,
        trace: StateTrace | None = None,
        **cache_kwargs,
    ) -> Tensor:
        """The layers over patches at `positions` `(B, P)`, latents `(B, P, K*W_local)` to `(B, P, W)`."""
        hidden_states = self.dropout(self.token_embedding_projection(inputs_embeds))
        if trace is not None:
            trace.add(hidden_states)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, positions)
        return run_layers(self.layers, hidden_states, position_embeddings, span, cache_layers, trace, **cache_kwargs)


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
        read: Tensor,
        span: AttentionSpan,
        past_key_values: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """Byte states `(B, S, W)` and states of new patches `(B, P, W_global)` (None for 0) to `(B, S, W)`.

        `read`: int64 `(B, S)`, new patch that each byte reads; -1 is the last one closed before the chunk.
        """
        cache = past_key_values
        latents = None if global_states is None else self.split_latents(global_states)
        hidden_states = self.dropout(byte_states)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        first = -chunk.previous["num_patches"][:, None]
        if trace is not None:
            trace.add(hidden_states)
        for index, layer in enumerate(self.layers):
            if index < len(self.cross_attn_layers):
                kept = None if cache is None else cache.latents[index]
                cross = self.cross_attn_layers[index](hidden_states, latents, read, first, kept)
                hidden_states = hidden_states + cross
            cache_layer = None if cache is None else cache.decoder[index]
            hidden_states, weights = layer(hidden_states, position_embeddings, span, past_key_values=cache_layer)
            if trace is not None:
                trace.add(hidden_states, weights)
        return self.norm(hidden_states)

    def split_latents(self, global_states: Tensor) -> Tensor:
        """What bytes read of a patch: `(B, P, W_global)` to `(B, P, K, W)`."""
        return self.patch_embedding_projection(global_states).unflatten(-1, (self.config.cross_attn_k, -1))


__all__ = ["NO_PATCH", "BltGlobalTransformer", "BltLocalDecoder", "BltLocalEncoder"]
