"""Base of all BLT models: outputs, loading and saving, initialisation, and the reading of common arguments."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, TransformersKwargs, logging

from .cache_blt import BltCache, cache_to_write
from .configuration_blt import BltConfig
from .generation_blt import BltGenerationMixin
from .layers_blt import NO_SPELLING, BltLexicon
from .names_blt import (
    AUTO_CLASSES,
    CACHE_NAME,
    CACHE_NAMES,
    add_default_targets,
    import_from_package,
    is_compiling,
    is_exporting,
)


logger = logging.get_logger(__name__)

MODEL_TAGS = ("blt", "byte-level", "tokenizer-free")


@dataclass
class BltModelOutput(ModelOutput):
    """Holds the results of a [`BltModel`].

    Attributes:
        last_hidden_state: `(B, S, W)`, byte states after the decoder's norm.
        past_key_values: a [`BltCache`], with `use_cache`; transformers calls it `cache` from 5.24 on.
        hidden_states: with `output_hidden_states`, the decoder's input and each layer's output, the last after the norm.
        attentions: with `output_attentions`, the decoder's self-attention weights, `(B, H, S, T)` a layer.
        encoder_hidden_states, encoder_attentions: the same for the local encoder; the decoder starts from its last states.
        global_hidden_states, global_attentions: the same for the global transformer, `(B, P, W)` over the patches
            closed in this call.
        entropies: with `output_patches` and an entropy model, fp32 `(B, S)`: nats of the byte after each byte.
        patch_lengths: with `output_patches`, int64 `(B, P)`: bytes of each patch, the next, unknown byte included;
            after a cache, the first one counts the bytes that this call added to the open patch.
        blocks: with `block_noise`, the corrupted blocks that the decoder read beside the text.
    """

    last_hidden_state: Tensor | None = None
    if CACHE_NAME == "cache":  # alone, when transformers 5.24 is the oldest supported
        cache: BltCache | None = None
    else:
        past_key_values: BltCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    global_hidden_states: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None
    entropies: Tensor | None = None
    patch_lengths: Tensor | None = None
    blocks: Any = None


@dataclass
class BltCausalLMOutput(ModelOutput):
    """Holds a [`BltModelOutput`]'s fields, `loss` (a scalar, with `labels`) and `logits` `(B, S, vocabulary)` in fp32.

    `masked_loss`, a scalar, is the loss of corrupted blocks; `loss` contains it times `config.diffusion_loss_weight`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE_NAME == "cache":  # alone, when transformers 5.24 is the oldest supported
        cache: BltCache | None = None
    else:
        past_key_values: BltCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    global_hidden_states: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None
    entropies: Tensor | None = None
    patch_lengths: Tensor | None = None
    masked_loss: Tensor | None = None


class BltKwargs(TransformersKwargs, total=False):
    """Lists the arguments of every `forward` here that the signatures leave out.

    Attributes:
        output_hidden_states: states of all layers, or those of the given indices; None: as the configuration says.
        output_attentions: weights of self-attention, with `attn_implementation="eager"`.
        output_patches: also `entropies` and `patch_lengths`.
        byte_embeds: `(B, S, W)`, sums of byte and hash embeddings in the place of those of `input_ids`.
        num_items_in_batch: divides a loss, instead of the number of labels of this batch.
    """

    output_patches: bool | None
    byte_embeds: Tensor | None


class BltPreTrainedModel(PreTrainedModel):
    """Loads, saves and initialises all models here."""

    config_class = BltConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BltTransformerLayer", "BltPatchCrossAttention", "BltByteCrossAttention"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def post_init(self) -> None:
        super().post_init()
        self.model_tags = [*MODEL_TAGS]  # of this instance: trainers append to the list
        if isinstance(self, BltGenerationMixin):
            self.fill_special_token_ids()
        add_default_targets()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws truncated normals of standard deviation `fan_in ** -0.5` (an embedding's fan-in is its width).

        Source: the reference's initialisation, with its depth factors switched off as in the released models.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = module.weight.shape[-1] ** -0.5
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-3 * std, b=3 * std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, BltLexicon):
            init.constant_(module.spellings, -1)
            if hasattr(module, "index"):
                init.constant_(module.index.hashes, NO_SPELLING)
                init.constant_(module.index.entries, 0)
                init.constant_(module.key_scales.weight[0], 0.0)
                init.constant_(module.key_scales.weight[1], 1.0)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resizes the embeddings as transformers does, and a lexicon's embedding, which has a column for each id."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, BltLexicon):
                module.resize(self.config.vocab_size)
        return embeddings

    _auto_map = {"AutoConfig": "configuration_blt.BltConfig"} | {
        auto_class: f"modeling_blt.{name}" for name, auto_class in AUTO_CLASSES.items() if name != "BltPatcher"
    }

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads as transformers does; the entropy model is frozen once more, since loading makes new parameters."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if hasattr(module, "freeze_patcher"):
                module.freeze_patcher()
        generation_config = getattr(model, "generation_config", None)
        if "diffusion_block_size" in kwargs and hasattr(generation_config, "diffusion_block_size"):
            # The caller set the configuration's; transformers sets that of `generate` as well, which would use blocks.
            del generation_config.diffusion_block_size
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves as transformers does; the code that travels along serves every Auto class, not only the one saved."""
        if self._auto_class is not None:
            self.config.auto_map = dict(self._auto_map)
        # FSDP2 makes a subclass on the fly, in a file of torch's; the class under it has the files to save.
        current = type(self)
        self.__class__ = next(cls for cls in current.__mro__ if not cls.__module__.startswith("torch."))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current

    def get_patches(self, inputs=None, attention_mask: Tensor | None = None, **settings):
        """Finds patches, entropies and boundaries of texts, as data; see `blt_hf.patches.data.get_patches`.

        Raises:
            ImportError: this code came with a checkpoint.
        """
        data = import_from_package("patches.data", "`get_patches`")
        return data.get_patches(self, inputs, attention_mask, **settings)

    def _resolve_output(self, name: str, value: bool | list[int] | None) -> bool | list[int]:
        """Returns an `output_*` argument, or the config's; hidden states may be chosen by index."""
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

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        function = functools.partial(checkpoint_for_gradients, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    def _resolve_use_cache(self, cache, use_cache: bool | None) -> bool:
        """Decides whether a forward writes to a cache; None: as the config says, but not in training."""
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training and not is_exporting())
        if use_cache and is_exporting():
            raise ValueError(
                "`use_cache=True` cannot be exported, as a cache is no tensor; pass whole texts and `use_cache=False`."
            )
        # Layers that are run again for their gradients may not write to a cache. transformers' own property for that has
        # different names in different releases.
        if (
            use_cache and self.training and torch.is_grad_enabled()
            and any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        ):  # fmt: skip
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing; setting `use_cache=False`."
            )
            return False
        return use_cache

    def _start_cache(self, cache, use_cache: bool | None) -> BltCache | None:
        """Returns the cache to write to: the caller's, a new one, or None."""
        if not self._resolve_use_cache(cache, use_cache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("`past_key_values` holds bytes, so `use_cache=False` cannot be honoured.")
            return None
        if is_compiling():
            torch._dynamo.graph_break(
                "A forward with a cache asks the device which patches ended, so it is not one graph: pass "
                "`use_cache=False` for `fullgraph=True`. (`generate` compiles its steps by itself.)"
            )
        return BltCache(self.config) if cache is None else cache_to_write(cache, self.config)


def checkpoint_for_gradients(checkpoint: Callable, function: Callable, *args) -> Any:
    """Checkpoints where gradients are recorded; elsewhere, as in `generate`, nothing is run again."""
    return checkpoint(function, *args) if torch.is_grad_enabled() else function(*args)


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Takes the last `logits_to_keep` positions of `(B, S, W)` (0: all), or those of an index tensor."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))
