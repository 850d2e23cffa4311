"""Byte Latent Transformers on the Hugging Face stack. Importing this package makes the Auto classes know them."""

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
from .model.tokenization_blt import BltTokenizer


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
    "BltTokenizer",
]

register()
