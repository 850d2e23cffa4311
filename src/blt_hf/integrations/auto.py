"""The Auto classes: after `import blt_hf` they return this package's classes for `model_type: "blt"`.

Changes, reasons, failures without them, and the test in tests/integrations/test_still_needed.py that fails when
transformers no longer needs it:

- The mappings of the Auto classes: their own `register` replaces the in-tree classes. Without it a BLT does not decode
  with a cache. Test: `in_tree_blt_cannot_decode`.
- The mapping of tokenizers, with `TOKENIZER_MAPPING_NAMES` and `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`: tokenizer
  files name a generic class, and `AutoTokenizer` uses it unless the model type is in both. Without it `AutoTokenizer`
  returns the generic class: the same ids, slower, and no `BltTokenizer`. Test: `auto_tokenizer_believes_the_files`.
- The tables of class names for tasks, `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` and those of the classifiers, get our classes
  (`names_blt.add_tasks`). Without it Trainer does not shift labels for the label smoothing of an entropy model, and model
  cards do not know the task of a classifier. Test: `tables_of_tasks_have_only_the_causal_model`.
- `tokenization_auto.get_tokenizer_config` returns `BltTokenizer` for files that a `BltTokenizer` has saved. Without it a
  folder with a tokenizer and no model, such as an adapter's, gives the generic class. Test: the same.

`register_for_auto_class` changes our own classes only: `save_pretrained` then also writes the code.
"""

import functools

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
from ..model.names_blt import add_tasks
from ..tokenizer.tokenization import BltTokenizer


def _naming_our_tokenizer(get_tokenizer_config):
    @functools.wraps(get_tokenizer_config)
    def wrapper(*args, **kwargs):
        config = get_tokenizer_config(*args, **kwargs)
        if "boe_token" in config and "bpe_token" in config:  # names that no other tokenizer has
            config = {**config, "tokenizer_class": BltTokenizer.__name__}
        return config

    return wrapper


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
    add_tasks()
    for config_class in (BltConfig, BltPatcherConfig):
        AutoTokenizer.register(config_class, fast_tokenizer_class=BltTokenizer, exist_ok=True)
        # Files in the wild name a generic class, which transformers would otherwise believe.
        tokenization_auto.TOKENIZER_MAPPING_NAMES[config_class.model_type] = BltTokenizer.__name__
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)

    tokenization_auto.get_tokenizer_config = _naming_our_tokenizer(tokenization_auto.get_tokenizer_config)

    # `save_pretrained` ships the code, for processes that do not have this package. A tokenizer's files need none.
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


__all__ = ["register_auto_classes"]
