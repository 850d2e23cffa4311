"""Byte Latent Transformer (arXiv 2412.09871): from bytes to patches, through the latent transformer, and back."""

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple

from .cache_blt import BltCache
from .checks_blt import check_byte_inputs, check_labels, check_patch_lengths, check_row_labels
from .chunk_blt import ByteChunk, make_chunk
from .configuration_blt import BltConfig
from .forward_blt import ForwardInputs, ForwardSettings, embed_bytes, run_chunk
from .generation_blt import BltGenerationMixin
from .layers_blt import BltHashEmbedding, BltSelfAttention, BltTransformerLayer, OutputCollector
from .modeling_base_blt import BltCausalLMOutput, BltKwargs, BltModelOutput, BltPreTrainedModel, keep_positions
from .names_blt import CACHE_NAME, check_patcher, import_from_package, takes_cache
from .patching_blt import VOCAB_SIZE, patch_ends_from_lengths, patch_lengths_from_ends
from .stacks_blt import BltGlobalTransformer, BltLocalDecoder, BltLocalEncoder, BltPatcher
from .step_blt import CompiledSteps, StepRunner, make_runner


# transformers 5.17 has no style for embeddings split by columns.
_TABLE_STYLE = "embedding_colwise" if "embedding_colwise" in ALL_PARALLEL_STYLES else "colwise_gather_output"


class BltModel(BltPreTrainedModel):
    """Computes byte states: the Byte Latent Transformer without a head."""

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
        self.compiled_steps = CompiledSteps()
        self.freeze_patcher()
        self.post_init()

    def freeze_patcher(self) -> None:
        """Takes the entropy model out of training; it prepares the input and is not learned."""
        if self.patcher is not None:
            self.patcher.requires_grad_(False)
            self.patcher.eval()

    def set_patcher(self, patcher: BltPatcher) -> None:
        """Swaps in another entropy model, frozen.

        Args:
            patcher: any [`BltPatcher`] that knows all bytes; its configuration becomes part of this model's. Ids that
                it lacks (tokens that were added to this model) are read as BOS.
        Raises:
            ValueError: it is not a [`BltPatcher`], or knows fewer ids than there are bytes and special tokens.
        """
        if not isinstance(patcher, BltPatcher):
            raise ValueError(f"`patcher` must be a BltPatcher; got {type(patcher).__name__}.")
        if patcher.config.vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"`patcher` has a vocabulary of {patcher.config.vocab_size}; {VOCAB_SIZE} ids or more are needed."
            )
        patcher.config.mask_documents = self.config.mask_documents
        patcher.config._name_or_path = ""  # where it came from is not to be published with this model
        self.patcher = patcher.to(self.device)
        self.config.patcher_config = patcher.config
        self.config.patch_in_forward = True
        self.freeze_patcher()

    def train(self, mode: bool = True) -> "BltModel":
        super().train(mode)
        if self.patcher is not None:
            self.patcher.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.local_encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.local_encoder.embed_tokens = value

    @takes_cache
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
        byte_embeds: Tensor | None = None,
        block_noise=None,
        **kwargs,
    ) -> BltModelOutput:
        """Computes byte states.

        Args:
            input_ids: int64 `(B, S)`, ids in `[0, vocab_size)`.
            attention_mask: `(B, S)` or `(B, past + S)`; 0 is padding, which may stand on either side of a text.
            position_ids: `(B or 1, S)`; where they restart inside a row, another text begins that sees nothing of
                those before it (as in transformers' padding-free batches). Their offset does not matter.
            past_key_values: the cache that an earlier call returned, to continue from.
            inputs_embeds: `(B, S, W)`, byte embeddings in the place of those that `get_input_embeddings()` gives. Hashes
                and the rules `entropy` and `space` read `input_ids`, which are given beside them; without ids a model
                has no hashes, and these rules need `patch_lengths`.
            byte_embeds: `(B, S, W)`, sums of byte and hash embeddings as [`~BltModel.embed_bytes`] gives them. (The
                in-tree class calls these `inputs_embeds`.) Without `input_ids`, patches as with `inputs_embeds`.
            patch_lengths: int64 `(B, P)`, zeros on the right: patches to use instead of the rule's, on the bytes of
                the text (padding not counted). Each row sums to its bytes plus 1 (the next byte, which tells whether
                the last patch is complete) or to its bytes. Not after a cache that holds bytes.
            use_cache: return a cache; None: the config's `use_cache`, but never in training.
            output_patches: also return `entropies` and `patch_lengths`.
            block_noise: a `BlockNoise` of `blt_hf.fast_blt.masked`, which makes the decoder read corrupted blocks beside
                the text, for the masked loss of BLT-D; not with a cache.
        Returns:
            [`BltModelOutput`].
        Raises:
            ValueError: an argument that cannot be honoured.
        """
        config = self.config
        if self.training and self.patcher is not None:
            check_patcher(self.patcher)
        width = config.encoder_config.hidden_size
        adds_hashes = config.encoder_hash_byte_group_nb_functions > 0
        shape, device = check_byte_inputs(input_ids, inputs_embeds, byte_embeds, config.vocab_size, width, adds_hashes)
        if input_ids is None and self.local_decoder.lexicon is not None:
            raise ValueError(
                "`input_ids` are needed, as the decoder's lexicon (`decoder_config.lexicon_size`) compares its entries "
                "with them; got embeddings alone. Pass both."
            )
        cache = self._start_cache(past_key_values, use_cache)
        if input_ids is not None and cache is not None and cache.hides_ids:
            self._check_hidden_ids()
        wants_states = self._resolve_output("output_hidden_states", output_hidden_states)
        wants_weights = self._resolve_output("output_attentions", output_attentions)
        # Plain bytes behind a text, as transformers' own loops of `generate` pass them, take the way of `StepRunner`.
        is_plain = attention_mask is position_ids is inputs_embeds is byte_embeds is patch_lengths is None
        is_plain = is_plain and not (wants_states or wants_weights or output_patches or torch.is_grad_enabled())
        if is_plain and cache is not None and cache.is_small(shape[1]) and len(cache.row_bytes) == shape[0]:
            states = StepRunner(self, cache).step(input_ids)
            return BltModelOutput(last_hidden_state=states, **{CACHE_NAME: cache})
        settings = ForwardSettings.of(config)
        chunk = make_chunk(
            input_ids, attention_mask, position_ids, cache, shape, device, settings.documents, bool(wants_weights)
        )
        if chunk.text_starts is not None and max(settings.encoder_window, settings.decoder_window) > 1:
            verb = "may restart (a traced forward does not look)" if chunk.is_symbolic else "restart"
            raise ValueError(
                f"`position_ids` {verb} inside a row, and `cross_attn_window` is larger than 1: cross attention over "
                "several patches would cross texts. Pass one text a row."
            )
        inputs = ForwardInputs(
            embeds=None if inputs_embeds is None else chunk.pack(inputs_embeds),
            byte_embeds=None if byte_embeds is None else chunk.pack(byte_embeds),
            given_ends=None if patch_lengths is None else self._given_ends(chunk, patch_lengths),
            block_noise=block_noise,
        )
        if wants_states is not False or wants_weights:
            inputs.collectors = tuple(OutputCollector(wants_states, wants_weights) for _ in range(3))
        hidden_states, read = run_chunk(self, settings, chunk, cache, inputs)
        fields = {CACHE_NAME: cache, "last_hidden_state": chunk.unpack(hidden_states), "blocks": read.blocks}
        of_encoder, of_global, of_decoder = inputs.collectors
        if of_decoder is not None:
            fields["encoder_hidden_states"], fields["encoder_attentions"] = of_encoder.collected(chunk)
            fields["global_hidden_states"], fields["global_attentions"] = of_global.collected()
            fields["hidden_states"], fields["attentions"] = of_decoder.collected(chunk, last=hidden_states)
        if output_patches:
            fields["entropies"] = None if read.entropies is None else chunk.unpack(read.entropies)
            fields["patch_lengths"] = patch_lengths_from_ends(read.patches.ends, chunk.num_bytes)
        return BltModelOutput(**fields)

    @takes_cache
    def embed_bytes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BltCache | None = None,
    ) -> Tensor:
        """Sums byte and hash embeddings, as the encoder reads them; a forward takes the sum as `byte_embeds`.

        Args:
            input_ids, attention_mask, position_ids, past_key_values: as in [`~BltModel.forward`]; the cache is only read.
        Returns:
            `(B, S, W)`; 0 at padding.
        """
        config, settings = self.config, ForwardSettings.of(self.config)
        width = config.encoder_config.hidden_size
        shape, device = check_byte_inputs(input_ids, None, None, config.vocab_size, width)
        chunk = make_chunk(input_ids, attention_mask, position_ids, past_key_values, shape, device, settings.documents)
        return chunk.unpack(embed_bytes(self, settings, chunk))

    def _check_hidden_ids(self) -> None:
        """Refuses to continue from bytes that came as embeddings alone, if something here reads ids."""
        if self.config.encoder_hash_byte_group_nb_functions or self.config.patching_mode not in ("static", "byte"):
            raise ValueError(
                "`past_key_values` holds bytes that were passed as embeddings without `input_ids`, and the hashes and the "
                "patching rule of later bytes read ids: pass `input_ids` from the start, or embeddings and no cache."
            )

    def _given_ends(self, chunk: ByteChunk, patch_lengths: Tensor) -> Tensor:
        if chunk.cached_bytes is not None:
            raise ValueError(
                "`patch_lengths` describe whole texts; they cannot be given after a cache that holds bytes."
            )
        check_patch_lengths(patch_lengths, chunk.lengths, chunk.is_symbolic)
        return patch_ends_from_lengths(patch_lengths, chunk.num_columns) | (chunk.text_positions == 0)


class _BltWithHead(BltPreTrainedModel):
    """Holds a [`BltModel`], `self.model`, for classes that add a head."""

    config: BltConfig
    _keep_in_fp32_modules = ["model.patcher"]  # names are matched from their beginning

    def set_patcher(self, patcher: BltPatcher) -> None:
        """See [`BltModel.set_patcher`]."""
        self.model.set_patcher(patcher)

    def embed_bytes(self, input_ids: Tensor, **kwargs) -> Tensor:
        """See [`BltModel.embed_bytes`]."""
        return self.model.embed_bytes(input_ids, **kwargs)


class BltForCausalLM(_BltWithHead, BltGenerationMixin):
    """Predicts the next byte: a [`BltModel`] with a language-model head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    # As in-tree: with `tie_word_embeddings`, files hold the head alone.
    _tied_weights_keys = {"model.local_encoder.embed_tokens.weight": "lm_head.weight"}

    def __init__(self, config: BltConfig):
        super().__init__(config)
        self.model = BltModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.decoder_config.hidden_size, config.vocab_size, bias=False)
        # The decoder's input at a masked byte. A class without this weight loads the file as an ordinary BLT.
        self.mask_embedding = (
            None if config.diffusion_block_size is None else nn.Embedding(1, config.decoder_config.hidden_size)
        )
        self.post_init()

    make_runner = make_runner  # a method, defined beside the runner

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
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        noise_generator: torch.Generator | None = None,
        **kwargs: Unpack[BltKwargs],
    ) -> BltCausalLMOutput:
        """Predicts the next byte; arguments as [`BltModel.forward`], and:

        Args:
            labels: int64 `(B, S)`, -100 is ignored; shifted inside. `num_items_in_batch` is honoured.
            logits_to_keep: the last so many positions get logits (0: all), or those of an index tensor.
            noise_generator: where the noise of the masked loss comes from, if `config.diffusion_block_size` is set;
                None: torch's own generator in training, and no masked loss otherwise.
        Returns:
            [`BltCausalLMOutput`].
        """
        noise = None
        # In an evaluation the loss is the text's own, and the same each time, unless the caller gives a generator.
        learns_blocks = self.mask_embedding is not None and self.config.diffusion_loss_weight > 0
        if noise_generator is not None or (self.training and labels is not None and learns_blocks):
            masked = import_from_package("fast_blt.masked", "the masked loss (`config.diffusion_block_size`)")
            noise = masked.make_noise(
                self, labels, noise_generator, input_ids=input_ids, past_key_values=past_key_values,
                use_cache=bool(use_cache) and self._resolve_use_cache(past_key_values, use_cache),
            )  # fmt: skip
            use_cache = False
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, patch_lengths=patch_lengths, use_cache=use_cache,
            block_noise=noise, return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep)).float()
        loss = of_blocks = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if noise is not None:
            of_blocks = masked.masked_loss(outputs.blocks, self.lm_head, labels, kwargs.get("num_items_in_batch"))
            loss = loss + self.config.diffusion_loss_weight * of_blocks
        elif self.training and loss is not None and self.mask_embedding is not None:
            loss = loss + 0.0 * self.mask_embedding.weight.sum()  # DDP wants a gradient for every parameter
        fields = {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "blocks")}
        return BltCausalLMOutput(loss=loss, logits=logits, masked_loss=of_blocks, **fields)


class _BltClassifier(_BltWithHead):
    """Adds a linear head over labels; `_classify` of a subclass chooses the states, and makes the output."""

    _score_bias = False

    def __init__(self, config: BltConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BltModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.decoder_config.hidden_size, config.num_labels, bias=self._score_bias)
        self.post_init()

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
        patch_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[BltKwargs],
    ) -> SequenceClassifierOutputWithPast | TokenClassifierOutput:
        """Classifies rows or bytes; other arguments as [`BltModel.forward`].

        Args:
            labels: of rows, int64 `(B,)` (classes), or floats `(B,)` / `(B, num_labels)` (regression, several labels);
                of bytes, int64 `(B, S)`, -100 is ignored.
        Returns:
            `logits` `(B, num_labels)` of rows, `(B, S, num_labels)` of bytes.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, patch_lengths=patch_lengths, use_cache=use_cache,
            return_dict=True, **kwargs,
        )  # fmt: skip
        return self._classify(outputs, attention_mask, labels, **kwargs)


class BltForSequenceClassification(_BltClassifier):
    """Classifies each row by the state of its last byte, which `attention_mask` tells (None: the last column)."""

    def _classify(
        self, outputs: BltModelOutput, attention_mask: Tensor | None, labels: Tensor | None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        states = outputs.last_hidden_state
        last = torch.full((states.shape[0],), states.shape[1] - 1, device=states.device)
        if attention_mask is not None:
            columns = torch.arange(states.shape[1], device=states.device)
            last = ((attention_mask[:, -states.shape[1] :] != 0) * columns).argmax(dim=1)
        logits = self.score(self.dropout(states[torch.arange(states.shape[0], device=states.device), last]))
        loss = None
        if labels is not None:
            check_row_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )  # fmt: skip


class BltForTokenClassification(_BltClassifier):
    """Classifies each byte by its state."""

    _score_bias = True

    def _classify(
        self, outputs: BltModelOutput, attention_mask: Tensor | None, labels: Tensor | None, **kwargs
    ) -> TokenClassifierOutput:
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits, labels, self.config)
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
