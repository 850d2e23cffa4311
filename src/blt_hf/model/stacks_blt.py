"""The four stacks of a BLT: local encoder, global transformer, local decoder; and the entropy model."""

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .attention_blt import AttentionSpan, SlotSpan, hidden_bytes, reads_under_mask
from .cache_blt import BltCache, RowState, SlotIndex
from .checks_blt import check_byte_inputs, check_labels
from .chunk_blt import (
    ByteChunk,
    ClosingInputs,
    DocumentRules,
    PatchAssignment,
    assign_patches,
    first_visible_patches,
    make_chunk,
)
from .configuration_blt import (
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from .generation_blt import BltGenerationMixin
from .layers_blt import (
    BltByteCrossAttention,
    BltLexicon,
    BltPatchCrossAttention,
    BltRMSNorm,
    BltRotaryEmbedding,
    BltSelfAttention,
    BltTransformerLayer,
    LatentIndex,
    OutputCollector,
    last_ids,
    make_rotation,
    project,
    run_layers,
    wants_weights,
)
from .modeling_base_blt import BltCausalLMOutput, BltPreTrainedModel, keep_positions
from .names_blt import CACHE_NAME, is_exporting, kept_arange, take_columns, take_rows, takes_cache
from .packed_blt import PackedStacks
from .patching_blt import BOS_TOKEN_ID, entropy_from_logits, shift_right


NO_PATCH = -(2**31)  # index of the patch that holds a column without a byte


class BltLocalEncoder(BltPreTrainedModel):
    """Turns bytes into byte states, and into the latents of the patches that they close."""

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
        self.cross_attn_layers = nn.ModuleList(
            [BltPatchCrossAttention(config, i) for i in range(config.num_cross_attention_layers)]
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self, inputs_embeds: Tensor, chunk: ByteChunk, span: AttentionSpan, cache: BltCache | None = None,
        collector: OutputCollector | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Runs the layers over byte embeddings `(B, S, W)`, those of hashes included.

        Returns:
            states `(B, S, W)` that each cross attention reads; the last are the encoder's own.
        """
        if chunk.packed is not None and chunk.packed.encoder is not None:
            return [chunk.packed.encoder.run(inputs_embeds, chunk.row_positions, span, cache.encoder)]
        hidden_states = self.dropout(inputs_embeds)
        rotation = make_rotation(*self.rotary_emb(hidden_states, chunk.row_positions))
        states = []
        for index, layer in enumerate(self.layers):
            kept = None if cache is None else cache.encoder[index]
            hidden_states, weights = layer(hidden_states, rotation, span, kept)
            states.append(hidden_states)
            if collector is not None:
                collector.add(hidden_states, weights)
        return states[-len(self.cross_attn_layers) :]

    def patch_bytes(
        self, chunk: ByteChunk, patches: PatchAssignment, states: list[Tensor], cache: BltCache | None
    ) -> tuple[list[Tensor], Tensor]:
        """Finds the bytes that new patches may read: those of a large chunk, and those that the cache holds before it.

        Returns:
            states `(B, T, W)` that each cross attention reads; int64 `(B, T)`: new patch of each byte (negative: older).
        """
        old = chunk.previous.num_patches[:, None]
        segment = patches.field("byte_patch") - old
        if chunk.is_text is not None:
            segment = torch.where(chunk.is_text, segment, NO_PATCH)
        if chunk.cached_bytes is None:
            return states, segment
        length = min(cache.needed_states(cache.max_open_bytes), max(cache.row_bytes))
        byte_offsets = torch.arange(-length, 0, device=old.device)
        held, held_segment = self.held_bytes(cache, chunk, byte_offsets)
        states = [torch.cat([before.to(new.dtype), new], dim=1) for before, new in zip(held, states)]
        return states, torch.cat([held_segment, segment], dim=1)

    def held_bytes(
        self, cache: BltCache, chunk: ByteChunk, byte_offsets: Tensor, rows: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Reads the last bytes that the cache holds; results as `patch_bytes`.

        `byte_offsets`: int64 `(T,)`, their places, counted from the first byte of the chunk.
        """
        num_patches = take_rows(chunk.previous.num_patches, rows)
        positions = take_rows(chunk.cached_bytes, rows)[:, None] + byte_offsets
        index = cache.recent_slots.find(positions, rows)
        held = RowState(*cache.history.entries.read(index).unbind(-1))
        # The slot is valid unless the byte lies before the text, or this chunk wrote padding there.
        is_lost = (held.num_bytes != positions + 1) | (positions < 0)
        if chunk.num_bytes is not None:
            end = chunk.cached_bytes + chunk.num_bytes
            is_lost = is_lost | (positions >= take_rows(end, rows)[:, None])
        if chunk.text_starts is not None:  # a text that begins here leaves the open patch unread
            first = torch.where(chunk.text_starts[:, 0], chunk.cached_bytes, 0)
            is_lost = is_lost | (positions < take_rows(first, rows)[:, None])
        segment = held.byte_patch - num_patches[:, None]
        states = [kept.read(index.to(kept.values.device)) for kept in cache.byte_states]
        return states, segment.masked_fill(is_lost, NO_PATCH)

    def make_latents(self, byte_states: list[Tensor], segment: Tensor, num_patches: int) -> Tensor:
        """Makes latents `(B, P, K, W)` of patches from the states `(B, T, W)` that each cross attention reads.

        `segment`: int64 `(B, T)`, patch of each byte among the `P`.
        """
        latents = self._pool(byte_states[0], segment, num_patches)
        for cross_attention, states in zip(self.cross_attn_layers, byte_states):
            latents = latents + cross_attention(latents, states, segment)
        return latents

    def _pool(self, byte_states: Tensor, segment: Tensor, num_patches: int) -> Tensor:
        """Pools the bytes of each patch and projects the pool to its `K` queries, `(B, P, K, W)`."""
        rows, _, width = byte_states.shape
        mode = {"max": "amax", "min": "amin", "mean": "mean"}[self.config.patch_pooling]
        if reads_under_mask(num_patches):
            pooled = self._pool_under_mask(byte_states, hidden_bytes(segment, num_patches)[..., None], mode)
        else:
            index = torch.where((segment >= 0) & (segment < num_patches), segment, num_patches)
            pooled = byte_states.new_zeros(rows, num_patches + 1, width)
            index = index[..., None].expand_as(byte_states)
            if mode == "mean" and is_exporting():  # ONNX has no such mode
                total = pooled.scatter_add(1, index, byte_states)
                pooled = total / pooled.scatter_add(1, index, torch.ones_like(byte_states)).clamp_min(1)
            else:
                pooled = pooled.scatter_reduce(1, index, byte_states, mode, include_self=False)
            pooled = take_columns(pooled, 0, num_patches)
        queries = project(self.patch_embedding_projection, pooled)
        return queries.view(rows, num_patches, self.config.cross_attn_k, width)

    @staticmethod
    def _pool_under_mask(byte_states: Tensor, hidden: Tensor, mode: str) -> Tensor:
        """Pools the bytes of few patches, `(B, P, W)`; `hidden` `(B, P, T, 1)`: bytes that a patch does not hold."""
        states = byte_states[:, None]
        if mode == "mean":
            return (states * ~hidden).sum(dim=2) / (~hidden).sum(dim=2).clamp_min(1)
        limits = torch.finfo(states.dtype)
        pooled = getattr(states.masked_fill(hidden, limits.min if mode == "amax" else limits.max), mode)(dim=2)
        return pooled.masked_fill(hidden.all(dim=2), 0)  # a patch without bytes


class BltGlobalTransformer(BltPreTrainedModel):
    """Runs the transformer over patches: one position a patch, full causal attention."""

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
        self, inputs_embeds: Tensor, chunk: ByteChunk, patches: PatchAssignment, inputs: ClosingInputs,
        cache: BltCache | None = None, collector: OutputCollector | None = None,
    ) -> Tensor:  # fmt: skip
        """Runs the patches that were closed: latents `(R, P, K*W_local)` to `(R, P, W)`.

        Columns past a row's own patches hold values that nothing reads.

        Args:
            chunk, patches: the bytes that closed them.
            inputs: the patches, and the slots that they see.
        """
        new_patches, seen_slots, _, rows, sees_all, words = inputs
        first_patch = None
        if chunk.document_start is not None:
            first_patch = take_rows(first_visible_patches(patches, new_patches), rows)
        positions = take_rows(chunk.previous.num_patches, rows)[:, None] + new_patches
        implementation = self.config._attn_implementation
        slot_index = None
        if cache is not None:
            index = cache.patch_slots.find(positions, rows).flatten()
            slot_index = SlotIndex(index=index, rows=rows, seen=seen_slots.shape[0])
        if seen_slots.shape[0] == 0:
            in_one_piece = wants_weights(collector)
            span = AttentionSpan(0, new_patches.shape[0], None, first_patch, implementation, in_one_piece, slot_index)
        else:
            span = SlotSpan(seen_slots.shape[0], positions, None, first_patch, implementation, slot_index)
            if sees_all and first_patch is None:
                span.sees_all = True
        hidden_states = self.embed_patches(inputs_embeds, words)
        if chunk.packed is not None and chunk.packed.global_transformer is not None:
            return chunk.packed.global_transformer.run(hidden_states, positions, span, cache.global_transformer)
        hidden_states = self.dropout(hidden_states)
        if collector is not None:
            collector.add(hidden_states)
        rotation = make_rotation(*self.rotary_emb(hidden_states, positions))
        layers = None if cache is None else cache.global_transformer
        return run_layers(self.layers, hidden_states, rotation, span, layers, collector)

    def embed_patches(self, inputs_embeds: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
        """Makes the input of the layers `(R, P, W)`; `words` as [`BltLexicon.read`] gives them."""
        hidden_states = self.token_embedding_projection(inputs_embeds)
        if words is None:
            return hidden_states
        keys, is_whole = (tensor.to(hidden_states.device) for tensor in words)
        return keys.to(hidden_states) + hidden_states.masked_fill(is_whole, 0.0)


class BltLocalDecoder(BltPreTrainedModel):
    """Turns byte states and patch latents into the states that predict the next bytes."""

    config_class = BltLocalDecoderConfig
    config: BltLocalDecoderConfig

    def __init__(self, config: BltLocalDecoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([BltTransformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = BltRotaryEmbedding(config)
        self.patch_embedding_projection = nn.Linear(
            config.hidden_size_global, config.hidden_size * config.cross_attn_k, bias=False
        )
        self.lexicon = BltLexicon(config) if config.lexicon_size else None
        self.norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_layers = nn.ModuleList(
            [BltByteCrossAttention(config, i) for i in range(config.num_cross_attention_layers)]
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self, byte_states: Tensor, latents: Tensor | None, chunk: ByteChunk, latent_index: LatentIndex,
        span: AttentionSpan, cache: BltCache | None = None, collector: OutputCollector | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Turns byte states `(B, S, W)` into those that predict the next bytes, `(B, S, W)`.

        Args:
            latents: `(B, P, L, 2, F)`, keys and values of patches for each cross attention. None: there are no patches.
            latent_index: patches that each byte reads, among `latents`.
            positions: int64 `(B, S)`, of each byte in its row; None: those of the chunk. Bytes of corrupted blocks may
                follow those of the chunk; their states are not collected.
        """
        if chunk.packed is not None and chunk.packed.decoder is not None:
            return chunk.packed.decoder.run(
                byte_states, chunk.row_positions, span, cache.decoder, latents, latent_index
            )
        hidden_states = self.dropout(byte_states)
        rotation = make_rotation(
            *self.rotary_emb(hidden_states, chunk.row_positions if positions is None else positions)
        )
        if collector is not None:
            collector.add(hidden_states if positions is None else hidden_states[:, : chunk.num_columns])
        # All views at once: the gradient of a view that is made by itself would be a tensor of the size of all.
        keys_values = [] if latents is None else [pair.unbind(2) for pair in latents.unbind(2)]
        for index, layer in enumerate(self.layers):
            if index < len(self.cross_attn_layers):
                hidden_states = hidden_states + self.cross_attn_layers[index](
                    hidden_states, *keys_values[index], latent_index
                )
            cache_layer = None if cache is None else cache.decoder[index]
            hidden_states, weights = layer(hidden_states, rotation, span, cache_layer)
            if collector is not None:
                of_bytes = hidden_states if positions is None else hidden_states[:, : chunk.num_columns]
                collector.add(of_bytes, weights)
        return self.norm(hidden_states)

    def project_latents(self, global_states: Tensor, packed: PackedStacks | None = None) -> Tensor:
        """Projects patches `(B, P, W_global)` to keys and values `(B, P, L, 2, F)` of `L` cross attentions.

        With a lexicon, `L` is one more: the last holds the entries that it ranks first.
        """
        latents = self.split_latents(global_states)
        if packed is not None and packed.decoder is not None and packed.decoder.is_exact:
            states = packed.decoder.project_latents(latents)
        else:
            states = [torch.stack(cross(latents=latents), dim=-2) for cross in self.cross_attn_layers]
            states = torch.stack([layer_states.to(states[0].device) for layer_states in states], dim=2)
        if self.lexicon is None:
            return states
        ranked = self.lexicon.rank(global_states).to(states)
        size = states[0, 0, 0].numel()
        ranked = nn.functional.pad(ranked, (0, size - ranked.shape[-1])).unflatten(-1, states.shape[3:])
        return torch.cat([states, ranked[:, :, None]], dim=2)

    def read_lexicon(
        self, chunk: ByteChunk, patches: PatchAssignment, latents: Tensor, latent_index: LatentIndex, is_draft: bool
    ) -> Tensor:
        """Embeds the lexicon's predictions of the byte after each byte, `(B, S, W)`.

        Args:
            latents: as `project_latents` gives them.
            is_draft: `patches` are those of the draft's first byte.
        """
        open_bytes = patches.field("open_bytes")
        if is_draft:
            open_bytes = open_bytes + chunk.row_positions - patches.field("num_bytes") + 1
        if chunk.text_starts is not None:
            # The last byte of a text closes a patch that it does not read.
            longer = shift_right(open_bytes, chunk.previous.open_bytes) + 1
            open_bytes = torch.where(patches.closes & ~patches.ends, longer, open_bytes)
        ids = last_ids(chunk.input_ids, chunk.history, self.config.lexicon_length + 1)
        ranked = latents[:, :, -1].flatten(2)[..., : 4 * self.lexicon.top_k]
        index = latent_index.index[..., :1].to(ranked.device).expand(-1, -1, ranked.shape[-1])
        return self.lexicon(ranked.gather(1, index), ids.to(ranked.device), open_bytes.to(ranked.device))

    def read_words(
        self, chunk: ByteChunk, patches: PatchAssignment, num_patches: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads the patches that a chunk closed, up to `num_patches` of a row, through the lexicon.

        `rows`: int64 `(R,)`, rows to read; None: all. Results as those of [`BltLexicon.read`].
        """
        count = 2 * self.config.lexicon_length + 1
        ids, previous_open = last_ids(chunk.input_ids, chunk.history, count), chunk.previous.open_bytes
        if not chunk.is_small or chunk.text_starts is not None:  # else the history holds zeros before the text
            ids = ids * (chunk.text_positions[..., None] >= kept_arange(0, count, chunk.device).flip(0))
        if chunk.text_starts is not None:
            previous_open = torch.where(chunk.text_starts[:, 0], torch.zeros_like(previous_open), previous_open)
        open_bytes, is_step = previous_open[:, None], chunk.num_columns == 1 and chunk.is_small
        if not is_step:
            open_bytes = shift_right(patches.field("open_bytes"), previous_open)
        found = self.lexicon.index(ids, open_bytes + 1).to(chunk.device)
        if not is_step:
            number = patches.field("num_patches") - chunk.previous.num_patches[:, None] - 1
            number = torch.where(patches.closes & (number < num_patches), number, num_patches)
            found = found.new_full((found.shape[0], num_patches + 1), -1).scatter(1, number, found)[:, :num_patches]
        return self.lexicon.read(take_rows(found, rows))

    def split_latents(self, global_states: Tensor) -> Tensor:
        """Projects patches `(B, P, W_global)` to `K` latents each, `(B, P, K, W)`."""
        latents = project(self.patch_embedding_projection, global_states)
        return latents.unflatten(-1, (self.config.cross_attn_k, -1))


class BltPatcher(BltPreTrainedModel, BltGenerationMixin):
    """Predicts the next byte as the entropy model, a small byte LM: frozen inside a BLT; alone it trains and generates."""

    config_class = BltPatcherConfig
    config: BltPatcherConfig
    base_model_prefix = ""
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _can_record_outputs = {"hidden_states": BltTransformerLayer, "attentions": BltSelfAttention}
    _auto_map = {
        "AutoConfig": "configuration_blt.BltPatcherConfig",
        "AutoModelForCausalLM": "stacks_blt.BltPatcher",
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

    def known_ids(self, input_ids: Tensor) -> Tensor:
        """Reads ids that this model lacks, of tokens that were added to a [`BltModel`], as a beginning of text."""
        return torch.where(input_ids < self.config.vocab_size, input_ids, BOS_TOKEN_ID)

    def entropies(self, input_ids: Tensor, chunk: ByteChunk, cache: BltCache | None) -> Tensor:
        """Computes nats of the byte after each byte, fp32 `(B, S)`, for a [`BltModel`] that has made the chunk.

        The cache gets the keys and values; the caller counts the bytes.
        """
        return entropy_from_logits(self.lm_head(self._run(self.embed_tokens(input_ids), chunk, cache)))

    def _run(
        self, hidden_states: Tensor, chunk: ByteChunk, cache: BltCache | None, collector: OutputCollector | None = None
    ) -> Tensor:
        """Runs the layers and the norm on byte embeddings `(B, S, W)`."""
        if collector is not None:
            collector.add(hidden_states)
        attention = self.config._attn_implementation
        span = chunk.span(cache, self.config.sliding_window, attention, collector, of_patcher=True)
        if chunk.packed is not None and chunk.packed.patcher is not None:
            return chunk.packed.patcher.run(hidden_states, chunk.row_positions, span, cache.patcher)
        rotation = make_rotation(*self.rotary_emb(hidden_states, chunk.row_positions))
        layers = None if cache is None else cache.patcher
        return self.norm(run_layers(self.layers, hidden_states, rotation, span, layers, collector))

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
            input_ids, attention_mask, position_ids, past_key_values, use_cache: as in [`BltModel.forward`].
            inputs_embeds: `(B, S, W)`, in the place of `input_ids`.
            labels: int64 `(B, S)`, -100 is ignored; shifted inside.
            output_patches: also return `entropies`.
        Returns:
            [`BltCausalLMOutput`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of `input_ids` and `inputs_embeds` is needed; got {got}.")
        size, width = self.config.vocab_size, self.config.hidden_size
        shape, device = check_byte_inputs(input_ids, inputs_embeds, None, size, width)
        cache = self._start_cache(past_key_values, use_cache)
        collector = OutputCollector(
            self._resolve_output("output_hidden_states", output_hidden_states),
            self._resolve_output("output_attentions", output_attentions),
        )
        rules, in_order = DocumentRules.of(self.config), collector.attentions is not None
        chunk = make_chunk(input_ids, attention_mask, position_ids, cache, shape, device, rules, in_order)
        if cache is not None:
            cache.begin(shape[0], shape[1], chunk.is_small, device)
        embeds = self.embed_tokens(chunk.input_ids) if inputs_embeds is None else chunk.pack(inputs_embeds)
        hidden_states = self._run(embeds, chunk, cache, collector)
        if cache is not None:
            ends = torch.ones_like(chunk.row_positions, dtype=torch.bool)
            patches = assign_patches(chunk, ends, rules)
            if not chunk.is_small:
                cache.reserve_open(0, chunk.num_columns)
            cache.history.write(patches.entries, None, chunk.slot_index(cache.recent_slots, 0))
            cache.history.advance_on_device(chunk, patches)
            cache.advance_chunk_on_host(chunk)
        states, attentions = collector.collected(chunk, last=hidden_states)
        hidden_states = chunk.unpack(hidden_states)
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep)).float()
        entropies = None
        if output_patches:
            is_whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
            entropies = entropy_from_logits(logits if is_whole else self.lm_head(hidden_states))
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
