"""What this package relies on in transformers and torch, so that a new release that changes it says which file to look at.

What is overridden here must still be there, and ask for no more; what is imported, in functions too, must be there; and
the protocol of caches must have no part that nobody has looked at. Each message names the file of `src/blt_hf`.
"""

import ast
import importlib
import importlib.util
import inspect
import pathlib

import pytest
import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin

import blt_hf


SOURCE = pathlib.Path(blt_hf.__file__).parent
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"
# A class of ours, the class of theirs that has the names, and names that ours gives another value. A name that theirs no
# longer has is no hook any more: nothing calls it, and nothing says so.
OVERRIDDEN = {
    "BltAdamW": {
        "torch.optim.optimizer.Optimizer": "zero_grad",
        "torch.optim.adam.Adam": "step",
    },
    "BltCache": {
        "transformers.cache_utils.Cache": """
            batch_repeat_interleave batch_select_indices batch_size crop get_mask_sizes get_seq_length is_compileable
            is_initialized reorder_cache reset""",
    },
    "BltCacheLayer": {
        "transformers.cache_utils.CacheLayerMixin": """
            get_mask_sizes get_max_length get_seq_length is_croppable lazy_initialization reset
            supports_early_init update""",
    },
    "BltConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "_auto_class model_type sub_configs validate",
        "transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin": "default_theta",
    },
    "BltContinuousBatchingManager": {
        "transformers.generation.continuous_batching.continuous_api.ContinuousBatchingManager": """
            _run_generation_loop add_request warmup""",
    },
    "BltForCausalLM": {
        "transformers.modeling_utils.PreTrainedModel": "_auto_class _tied_weights_keys config_class",
        "transformers.distributed.mixin.DistributedMixin": "_tp_plan",
    },
    "BltForSequenceClassification": {
        "transformers.modeling_utils.PreTrainedModel": "_auto_class config_class",
    },
    "BltForTokenClassification": {
        "transformers.modeling_utils.PreTrainedModel": "_auto_class config_class",
    },
    "BltGenerationMixin": {
        "transformers.generation.utils.GenerationMixin": """
            _assisted_decoding _prepare_cache_for_generation _prepare_generation_config _prepare_model_inputs
            _sample _validate_generation_mode adjust_generation_fn prepare_inputs_for_generation""",
        "transformers.generation.continuous_batching.continuous_api.ContinuousMixin": """init_continuous_batching""",
    },
    "BltGlobalTransformer": {
        "transformers.modeling_utils.PreTrainedModel": "config_class",
    },
    "BltGlobalTransformerConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "model_type validate",
        "transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin": "default_theta",
    },
    "BltLocalDecoder": {
        "transformers.modeling_utils.PreTrainedModel": "config_class",
    },
    "BltLocalDecoderConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "model_type validate",
    },
    "BltLocalEncoder": {
        "transformers.modeling_utils.PreTrainedModel": "config_class",
    },
    "BltLocalEncoderConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "model_type validate",
    },
    "BltModel": {
        "transformers.distributed.mixin.DistributedMixin": "_tp_plan",
        "transformers.modeling_utils.PreTrainedModel": """
            _auto_class _can_record_outputs _keep_in_fp32_modules config_class train""",
        "transformers.modeling_utils.EmbeddingAccessMixin": "get_input_embeddings set_input_embeddings",
    },
    "BltPatcher": {
        "transformers.modeling_utils.PreTrainedModel": """
            _auto_class _can_record_outputs base_model_prefix config_class""",
        "transformers.distributed.mixin.DistributedMixin": "_tp_plan",
    },
    "BltPatcherConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "_auto_class model_type validate",
    },
    "BltPreTrainedModel": {
        "transformers.modeling_utils.PreTrainedModel": """
            _can_compile_fullgraph _init_weights _no_split_modules _set_gradient_checkpointing
            _skip_keys_device_placement _supports_attention_backend _supports_flash_attn _supports_flex_attn
            _supports_sdpa base_model_prefix config_class from_pretrained input_modalities post_init
            resize_token_embeddings save_pretrained supports_gradient_checkpointing""",
    },
    "BltTokenizer": {
        "transformers.tokenization_utils_tokenizers.TokenizersBackend": """
            _add_tokens _decode _encode_plus _save_pretrained convert_to_native_format convert_tokens_to_string
            save_vocabulary train_new_from_iterator vocab_files_names""",
        "transformers.tokenization_utils_base.PreTrainedTokenizerBase": """
            _from_pretrained decode get_special_tokens_mask model_input_names padding_side""",
    },
    "_BltClassifier": {
        "transformers.modeling_utils.PreTrainedModel": "config_class",
    },
    "_BltWithHead": {
        "transformers.modeling_utils.PreTrainedModel": "_keep_in_fp32_modules config_class",
    },
    "_BltComponentConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "base_model_tp_plan",
    },
    "_BltLocalConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "base_model_tp_plan",
        "transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin": "default_theta",
    },
    "_SavedConfig": {
        "transformers.configuration_utils.PreTrainedConfig": "save_pretrained",
    },
}
# Names that some of the supported releases do not have.
NOT_EVERYWHERE = {
    "get_max_cache_shape",
    "max_batch_size",
    "keys_to_ignore_at_inference",
    "sub_configs_defaults",
    "_encode_without_added_tokens",
}
# The parts of the protocol that have been looked at, of all supported releases. A new one may need an answer of its own.
PROTOCOL = {
    Cache: """
        activate_past_recording batch_repeat_interleave batch_select_indices batch_size crop early_initialization
        get_conv_state get_mask_sizes get_max_cache_shape get_max_length get_query_offset get_recurrent_state
        get_seq_length has_previous_state is_compileable is_croppable is_dummy is_initialized is_linear
        is_recording_past is_sliding max_batch_size max_cache_len offload prefetch reorder_cache reset update
        update_conv_state update_indexer update_recurrent_state""",
    CacheLayerMixin: """
        get_mask_sizes get_max_cache_shape get_max_length get_seq_length is_compileable is_croppable
        lazy_initialization offload prefetch reorder_cache reset supports_early_init update""",
}


def own_classes() -> dict[str, type]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        try:
            module = importlib.import_module(name)
        except ImportError:  # of a library that is not here
            continue
        found |= {
            cls.__name__: cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == name
        }
    return found


OWN = own_classes()
HOOKS = [(own, base, name) for own, bases in OVERRIDDEN.items() for base in bases for name in bases[base].split()]


def file_of(cls: type) -> str:
    return f"src/{cls.__module__.replace('.', '/')}.py"


@pytest.mark.parametrize(("own", "base", "name"), HOOKS, ids=lambda value: value.rpartition(".")[2])
def test_what_is_overridden_is_still_there(own, base, name):
    module, _, class_name = base.rpartition(".")
    owner, cls = getattr(importlib.import_module(module), class_name), OWN[own]
    where = f"({VERSIONS}): look at {file_of(cls)}"
    assert hasattr(owner, name), f"{base} has no `{name}` any more {where}"
    assert name in vars(cls), f"{own} overrides no `{name}` any more: take it from this table"
    theirs = getattr(owner, name)
    if not inspect.isroutine(theirs):
        return
    ours = inspect.signature(getattr(cls, name)).parameters
    kinds = {parameter.kind for parameter in ours.values()}
    for parameter in inspect.signature(theirs).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
            continue
        accepts_more = parameter.VAR_KEYWORD in kinds or (
            parameter.VAR_POSITIONAL in kinds and parameter.kind is not parameter.KEYWORD_ONLY
        )
        assert parameter.name in ours or accepts_more, (
            f"{base}.{name} has an argument `{parameter.name}` that {own} does not take {where}"
        )


@pytest.mark.parametrize("own", OVERRIDDEN)
def test_the_table_has_every_method_that_others_call(own):
    """A method of ours that a class of transformers has too, and that is not in the table, is new there or here."""
    cls = OWN[own]
    known = {name for names in OVERRIDDEN[own].values() for name in names.split()} | NOT_EVERYWHERE
    bases = [base for base in cls.__mro__ if base.__module__.startswith("transformers.")]
    for name, value in vars(cls).items():
        if name == "forward" or name.startswith("__") or not inspect.isroutine(value):
            continue
        owners = [base.__qualname__ for base in bases if name in vars(base)]
        assert not owners or name in known, (
            f"{file_of(cls)}: {own}.{name} overrides that of {owners[0]}, which this table does not say ({VERSIONS})"
        )


FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_what_is_imported_is_still_there(file):
    """Also by functions that no other test may call."""
    for node in ast.walk(ast.parse((SOURCE / file).read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        package = node.module.partition(".")[0]
        if package not in ("accelerate", "peft", "torch", "transformers", "trl") or not importlib.util.find_spec(
            package
        ):
            continue
        where = f"({VERSIONS}): look at src/blt_hf/{file}, line {node.lineno}"
        try:
            module = importlib.import_module(node.module)
        except ImportError as error:
            raise AssertionError(f"{node.module} cannot be imported {where}") from error
        for alias in node.names:
            if not hasattr(module, alias.name) and importlib.util.find_spec(f"{node.module}.{alias.name}"):
                continue  # a module
            assert hasattr(module, alias.name), f"{node.module} has no `{alias.name}` any more {where}"


@pytest.mark.parametrize("cls", PROTOCOL, ids=lambda cls: cls.__name__)
def test_the_protocol_of_caches_is_known(cls):
    new = {name for name in vars(cls) if not name.startswith("_")} - set(PROTOCOL[cls].split())
    assert not new, (
        f"{cls.__name__} has {sorted(new)} in {VERSIONS}: does src/blt_hf/model/cache_blt.py answer it? Then say so here"
    )


def test_what_is_changed_in_other_libraries_is_still_there():
    """Tables and functions that src/blt_hf/integrations/ writes to by name."""
    from transformers.models.auto import modeling_auto, tokenization_auto

    from blt_hf.model.names_blt import TASK_TABLES

    for table in set(TASK_TABLES.values()):
        assert isinstance(getattr(modeling_auto, table), dict), f"{table} ({VERSIONS}): src/blt_hf/model/names_blt.py"
    for name in ("TOKENIZER_MAPPING_NAMES", "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", "get_tokenizer_config"):
        assert hasattr(tokenization_auto, name), f"{name} ({VERSIONS}): src/blt_hf/integrations/auto.py"
