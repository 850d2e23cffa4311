"""The Auto classes: after `import blt_hf` they give this package's classes for `model_type: "blt"`."""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import tokenization_auto

from ..model.configuration_blt import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from ..model.modeling_blt import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
)
from ..model.tokenization_blt import BltTokenizer


def register_auto_classes() -> None:
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
    for config_class in (BltConfig, BltPatcherConfig):
        AutoTokenizer.register(config_class, fast_tokenizer_class=BltTokenizer, exist_ok=True)
        # Files in the wild name a generic class, which transformers would otherwise believe.
        tokenization_auto.TOKENIZER_MAPPING_NAMES[config_class.model_type] = BltTokenizer.__name__
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)

    transformers.BltForCausalLM = BltForCausalLM  # for callers that look `architectures` up there, as TRL does

    # Makes `save_pretrained` ship the code, for processes that do not have this package.
    for config_class in (BltConfig, BltPatcherConfig):
        config_class.register_for_auto_class()
    for auto_class, model_class in (
        ("AutoModel", BltModel),
        ("AutoModelForCausalLM", BltForCausalLM),
        ("AutoModelForCausalLM", BltPatcher),
        ("AutoModelForSequenceClassification", BltForSequenceClassification),
        ("AutoModelForTokenClassification", BltForTokenClassification),
    ):
        model_class.register_for_auto_class(auto_class)
    BltTokenizer.register_for_auto_class("AutoTokenizer")


__all__ = ["register_auto_classes"]
