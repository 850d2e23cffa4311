"""Byte Latent Transformers on the Hugging Face stack. Importing this package makes the Auto classes know them."""

from typing import TYPE_CHECKING

from .fast_blt import masked as _masked  # noqa: F401 (a compiled forward imports nothing, so it must be there)
from .integrations import register
from .model.cache_blt import BltCache
from .model.configuration_blt import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from .model.modeling_blt import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
)
from .patches.data import BltPatches
from .rules import register_patching_rule
from .tokenizer.tokenization import BltTokenizer


if TYPE_CHECKING:
    from .patches.pictures import plot_patches


__all__ = [
    "BltCache",
    "BltConfig",
    "BltForCausalLM",
    "BltForSequenceClassification",
    "BltForTokenClassification",
    "BltGlobalTransformerConfig",
    "BltLocalDecoderConfig",
    "BltLocalEncoderConfig",
    "BltModel",
    "BltPatcher",
    "BltPatcherConfig",
    "BltPatches",
    "BltTokenizer",
    "plot_patches",
    "register_patching_rule",
]

register()


def __getattr__(name: str):
    if name == "plot_patches":  # no other import waits for measuring and drawing
        from .patches.pictures import plot_patches

        return plot_patches
    raise AttributeError(f"module 'blt_hf' has no attribute {name!r}")
