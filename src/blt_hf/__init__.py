"""Byte Latent Transformers on the Hugging Face stack. Importing this package makes the Auto classes know them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_blt import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from .modeling_blt import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
)


def _register() -> None:
    """Puts our classes in the place of transformers' in-tree ones."""
    for config_class in (
        BltConfig,
        BltPatcherConfig,
        BltLocalEncoderConfig,
        BltLocalDecoderConfig,
        BltGlobalTransformerConfig,
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(BltConfig, BltModel, exist_ok=True)
    AutoModelForCausalLM.register(BltConfig, BltForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(BltPatcherConfig, BltPatcher, exist_ok=True)
    AutoModelForSequenceClassification.register(BltConfig, BltForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(BltConfig, BltForTokenClassification, exist_ok=True)


_register()
