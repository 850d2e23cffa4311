"""The three stacks of a BLT: local encoder, global transformer, local decoder."""

import torch
from torch import Tensor, nn

from .attention_blt import AttentionSpan, SlotSpan
from .cache_blt import BltCache, SlotAccess, SlotTensor, log_field
from .chunk_blt import ByteChunk, PatchNumbers, first_visible_patches
from .configuration_blt import BltGlobalTransformerConfig, BltLocalDecoderConfig, BltLocalEncoderConfig
from .layers_blt import (
    BltByteCrossAttention,
    BltPatchCrossAttention,
    BltRMSNorm,
    BltRotaryEmbedding,
    BltTransformerLayer,
    PatchReads,
    StateTrace,
    run_layers,
)
from .modeling_base_blt import BltPreTrainedModel
from .tracing_blt import is_exporting, take_columns


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
        span: AttentionSpan,
        cache: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> list[Tensor]:
        """The layers over bytes.

        Args:
            inputs_embeds: `(B, S, W)`, byte embeddings with their hash embeddings.
            chunk: what the bytes are.
            span: keys of each byte.
        Returns:
            states `(B, S, W)` that each cross attention reads; the last are the encoder's own.
        """
        hidden_states = self.dropout(inputs_embeds)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, chunk.row_positions)
        states = []
        for index, layer in enumerate(self.layers):
            kept = None if cache is None else cache.encoder[index]
            hidden_states, weights = layer(hidden_states, position_embeddings, span, kept)
            states.append(hidden_states)
            if trace is not None:
                trace.add(hidden_states, weights)
        return states[-len(self.cross_attn_layers) :]

    def patch_bytes(
        self, chunk: ByteChunk, numbers: PatchNumbers, states: list[Tensor], cache: BltCache | None
    ) -> tuple[list[Tensor], Tensor]:
        """The bytes that new patches may read: those of a large chunk, and those that the cache holds before it.

        Returns:
            states `(B, T, W)` that each cross attention reads, and int64 `(B, T)`, the new patch that holds each byte
            (negative for earlier ones).
        """
        old = chunk.previous["num_patches"][:, None]
        segment = numbers.byte_patch - old
        if chunk.is_text is not None:
            segment = torch.where(chunk.is_text, segment, NO_PATCH)
        if chunk.cached_bytes is None:
            return states, segment
        length = min(cache.needed_states(cache.max_open_bytes), max(cache.row_bytes))
        back = torch.arange(-length, 0, device=old.device)
        held, held_segment = self.held_bytes(cache, chunk, chunk.cached_bytes, back)
        states = [torch.cat([before.to(new.dtype), new], dim=1) for before, new in zip(held, states)]
        return states, torch.cat([held_segment, segment], dim=1)

    def held_bytes(
        self, cache: BltCache, chunk: ByteChunk, counts: Tensor, back: Tensor, rows: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The last bytes that the cache holds in rows of `counts` `(B,)` bytes; results as `patch_bytes`.

        `back`: int64 `(T,)`, `-T .. -1`.
        """

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if rows is None else tensor.index_select(0, rows)

        counts = chosen(counts)[:, None]
        entries = counts + back
        index = cache.recent_slots.find(entries, rows)
        log = cache.log.integers.read(index)
        # A slot holds what it should unless that byte does not exist, or is padding of the chunk.
        last = chosen(chunk.num_bytes if chunk.cached_bytes is None else chunk.cached_bytes + chunk.num_bytes)
        is_held = (log_field(log, "row_position") == entries) & (entries >= 0) & (entries < last[:, None])
        if chunk.text_starts is not None:  # a text that begins here leaves the open patch unread
            begins = chosen(chunk.text_starts[:, :1]) & (entries < chosen(chunk.cached_bytes)[:, None])
            is_held = is_held & ~begins
        segment = log_field(log, "byte_patch") - chosen(chunk.previous["num_patches"])[:, None]
        states = [kept.read(index.to(kept.values.device)) for kept in cache.byte_states]
        return states, torch.where(is_held, segment, NO_PATCH)

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
            index = index[..., None].expand_as(byte_states)
            if mode == "mean" and is_exporting():  # ONNX has no such mode
                total = pooled.scatter_add(1, index, byte_states)
                pooled = total / pooled.scatter_add(1, index, torch.ones_like(byte_states)).clamp_min(1)
            else:
                pooled = pooled.scatter_reduce(1, index, byte_states, mode, include_self=False)
            pooled = take_columns(pooled, 0, num_patches)
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
        chunk: ByteChunk,
        numbers: PatchNumbers,
        new: Tensor,
        columns: Tensor,
        rows: Tensor | None = None,
        cache: BltCache | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """Runs the patches that were closed: latents `(R, P, K*W_local)` to `(R, P, W)`.

        Columns past a row's own patches hold values that nothing reads.

        Args:
            chunk, numbers: the bytes that closed them.
            new: `0 .. P - 1`, int64.
            columns: `0, 1, ...`, int64, columns of the cache to read. None of them: the new patches are the first.
            rows: int64 `(R,)`, rows that take part; None: all.
        """
        first_patch, before = first_visible_patches(chunk, numbers, new), chunk.previous["num_patches"]
        if rows is not None:
            first_patch = None if first_patch is None else first_patch.index_select(0, rows)
            before = before.index_select(0, rows)
        positions = before[:, None] + new
        implementation = self.config._attn_implementation
        access = None
        if cache is not None:
            index = cache.patch_slots.find(positions, rows).flatten()
            access = SlotAccess(index=index, rows=rows, seen=columns.shape[0])
        if columns.shape[0] == 0:
            wants_weights = trace is not None and trace.attentions is not None
            span = AttentionSpan(0, new.shape[0], None, first_patch, implementation, wants_weights, access)
        else:
            span = SlotSpan(columns[None], positions, None, first_patch, implementation, access)
        hidden_states = self.dropout(self.token_embedding_projection(inputs_embeds))
        if trace is not None:
            trace.add(hidden_states)
        position_embeddings = self.rotary_emb.for_heads(hidden_states, positions)
        layers = None if cache is None else cache.global_transformer
        return run_layers(self.layers, hidden_states, position_embeddings, span, layers, trace)


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
        latents: Tensor | None,
        chunk: ByteChunk,
        reads: PatchReads,
        span: AttentionSpan,
        cache: BltCache | None = None,
        trace: StateTrace | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Byte states `(B, S, W)` and latents of new patches `(B, P, K, W)` to `(B, S, W)`.

        `latents` is None where none are new, or the cache has them already. `reads`: what each byte reads.
        `positions`: int64 `(B, S)`, of each byte in its row; None: those of the chunk. Behind the chunk's bytes may
        stand those of corrupted blocks, which are not traced.
        """
        hidden_states = self.dropout(byte_states)
        position_embeddings = self.rotary_emb.for_heads(
            hidden_states, chunk.row_positions if positions is None else positions
        )

        def of_bytes(states: Tensor) -> Tensor:
            return states if positions is None else states[:, : chunk.num_columns]

        if trace is not None:
            trace.add(of_bytes(hidden_states))
        for index, layer in enumerate(self.layers):
            if index < len(self.cross_attn_layers):
                cross_attention = self.cross_attn_layers[index]
                kept = None if cache is None else cache.latents[index]
                states = self._patch_states(cross_attention, latents, kept, reads)
                hidden_states = hidden_states + cross_attention(hidden_states, *states, reads)
            cache_layer = None if cache is None else cache.decoder[index]
            hidden_states, weights = layer(hidden_states, position_embeddings, span, cache_layer)
            if trace is not None:
                trace.add(of_bytes(hidden_states), weights)
        return self.norm(hidden_states)

    def _patch_states(
        self,
        cross_attention: BltByteCrossAttention,
        latents: Tensor | None,
        kept: tuple[SlotTensor, SlotTensor] | None,
        reads: PatchReads,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, P, K*H_kv*D)` among which `reads` tells those of each byte."""
        if latents is None:
            return tuple(tensor.values for tensor in kept)
        new = cross_attention(latents=latents)
        if kept is None:
            return new
        states = []
        for tensor, patches in zip(kept, new):
            held = tensor.values
            tensor.write(patches, reads.access.on(patches.device))
            states.append(
                patches if held is None or reads.is_first else torch.cat([held.to(patches.dtype), patches], dim=1)
            )
        return tuple(states)

    def keep_latents(self, latents: Tensor, access: SlotAccess, cache: BltCache) -> None:
        """Writes latents `(R, P, K, W)` of new patches to the cache, as keys and values."""
        for cross_attention, pair in zip(self.cross_attn_layers, cache.latents):
            for tensor, new in zip(pair, cross_attention(latents=latents)):
                tensor.write(new, access.on(new.device), len(cache.row_bytes))

    def split_latents(self, global_states: Tensor) -> Tensor:
        """What bytes read of a patch: `(B, P, W_global)` to `(B, P, K, W)`."""
        latents = self.patch_embedding_projection(global_states)
        return latents.unflatten(-1, (self.config.cross_attn_k, -1))


__all__ = ["NO_PATCH", "BltGlobalTransformer", "BltLocalDecoder", "BltLocalEncoder"]
