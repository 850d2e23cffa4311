"""Byte Latent Transformer (arXiv 2412.09871): from bytes to patches, through the latent transformer, and back."""

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .attention_blt import AttentionSpan
from .cache_blt import BltCache
from .chunk_blt import ByteChunk, PatchRouting, make_chunk, route_patches
from .configuration_blt import BltConfig
from .embedding_blt import BltHashEmbedding, ngram_hashes
from .generation_blt import BltGenerationMixin
from .layers_blt import BltSelfAttention, BltTransformerLayer, StateTrace
from .modeling_base_blt import BltCausalLMOutput, BltModelOutput, BltPreTrainedModel, check_inputs, keep_positions
from .patcher_blt import BltPatcher
from .patching_blt import (
    BYTE_OFFSET,
    PatchingRule,
    find_patch_ends,
    patch_ends_from_lengths,
    patch_lengths_from_ends,
)
from .stacks_blt import BltGlobalTransformer, BltLocalDecoder, BltLocalEncoder
from .step_blt import can_step, take_step


_BOS_TOKEN_ID = 1
# transformers 5.17 has no style for embeddings split by columns.
_TABLE_STYLE = "embedding_colwise" if "embedding_colwise" in ALL_PARALLEL_STYLES else "colwise_gather_output"


class BltModel(BltPreTrainedModel):
    """The Byte Latent Transformer without a head."""

    config: BltConfig
    _tp_plan = {"encoder_hash_tok_embedding": _TABLE_STYLE}
    # Entropies decide where patches start, so no quantization and no half precision may change them.
    _keep_in_fp32_modules = ["patcher"]
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
        patcher.config._name_or_path = ""  # where it came from is not to be published with this model
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
        shape, device = check_inputs(input_ids, inputs_embeds)
        config = self.config
        cache = self._start_cache(past_key_values, use_cache, config)
        self._check_history(cache, inputs_embeds)
        wants_states = self._wants("output_hidden_states", output_hidden_states)
        wants_weights = self._wants("output_attentions", output_attentions)
        is_plain = attention_mask is position_ids is inputs_embeds is patch_lengths is None
        is_plain = is_plain and not (wants_states or wants_weights or output_patches)
        if is_plain and cache is not None and shape[1] == 1 and can_step(self, cache, input_ids):
            return BltModelOutput(last_hidden_state=take_step(self, cache, input_ids), past_key_values=cache)
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

        traces = [StateTrace(wants_states, wants_weights) for _ in range(3)]
        embeds = self._embed_bytes(chunk) if inputs_embeds is None else chunk.pack(inputs_embeds)
        traces[0].add(embeds)
        span = self._local_span(chunk, cache, wants_weights)
        byte_states, latents = self.local_encoder(embeds, chunk, routing, span, cache, traces[0])
        global_states = None
        if latents is not None:
            global_states = self.global_transformer(latents.flatten(2), routing, cache, traces[1])
        hidden_states = self.local_decoder(byte_states, global_states, chunk, routing.read, span, cache, traces[2])
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
        hidden_states = self.local_decoder(byte_states, None, chunk, routing.read, span, cache)
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

    def _check_history(self, cache: BltCache | None, inputs_embeds: Tensor | None) -> None:
        """Refuses to continue from bytes that only their embeddings told of, if something here reads ids."""
        if cache is None or not cache.hides_ids or inputs_embeds is not None:
            return
        if self.config.encoder_hash_byte_group_nb_functions or self.config.patching_mode in ("entropy", "space"):
            raise ValueError(
                "`past_key_values` holds bytes that were passed as `inputs_embeds`, and the hashes and the patching rule "
                "of later bytes read ids: pass `input_ids` from the start, or `inputs_embeds` and no cache."
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
        self,
        chunk: ByteChunk,
        cache: BltCache | None,
        patch_lengths: Tensor | None,
        patcher_span: AttentionSpan | None = None,
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
                    entropies = self.patcher(known_ids, chunk=chunk, past_key_values=cache, span=patcher_span)
        if given_ends is not None:
            return entropies, given_ends
        if config.uses_patcher and entropies is None:
            raise ValueError(
                "`patching_mode='entropy'` needs an entropy model, and this model was built with "
                "`patch_in_forward=False`: pass `patch_lengths`, or give it one with `set_patcher`."
            )
        if config.patching_mode == "space" and chunk.input_ids is None:
            raise ValueError(
                "`inputs_embeds` hide the bytes that `patching_mode='space'` reads; pass `patch_lengths`."
            )
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
            raise ValueError(
                "`patch_lengths` describe whole texts; they cannot be given after a cache that holds bytes."
            )
        if patch_lengths.dim() != 2 or patch_lengths.shape[0] != rows:
            raise ValueError(
                f"`patch_lengths` has shape {tuple(patch_lengths.shape)}; one row of lengths for each of the {rows} "
                "rows of the input is accepted."
            )
        if patch_lengths.shape[1] == 0 or patch_lengths.dtype.is_floating_point:
            raise ValueError(
                f"`patch_lengths` has shape {tuple(patch_lengths.shape)} and dtype {patch_lengths.dtype}; at least one "
                "whole number for each row is accepted."
            )
        excess = patch_lengths.sum(dim=1) - chunk.num_bytes
        wrong = ((excess != 0) & (excess != 1)) | (patch_lengths < 0).any(dim=1) | (patch_lengths[:, 0] > 1)
        wrong = wrong | ((patch_lengths[:, 1:] > 0) & (patch_lengths[:, :-1] == 0)).any(dim=1)
        wrong = wrong & (chunk.num_bytes > 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"row {row} of `patch_lengths` is {patch_lengths[row].tolist()}, for {int(chunk.num_bytes[row])} bytes: "
                "lengths must not be negative, begin with a patch of 1 byte, have zeros on the right alone, and sum to "
                "the bytes of the text, or to one more (the next byte)."
            )
        ends = patch_ends_from_lengths(patch_lengths, chunk.num_columns)
        return ends | (chunk.text_positions == 0)

    def _end_step(self, cache: BltCache, chunk: ByteChunk, routing: PatchRouting, entropies: Tensor | None) -> None:
        if entropies is None:
            entropies = torch.zeros(routing.ends.shape, device=routing.ends.device)
        cache.hides_ids |= chunk.input_ids is None
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
    _keep_in_fp32_modules = ["model.patcher"]  # names are matched from their beginning
    _tp_plan = {"lm_head": "colwise_gather_output"}
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
    _keep_in_fp32_modules = ["model.patcher"]

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
    "BltForCausalLM",
    "BltForSequenceClassification",
    "BltForTokenClassification",
    "BltModel",
    "BltPatcher",
]
