"""Tells of fields of a configuration that are not there. The configuration's code may have come with a checkpoint."""

import difflib
from collections.abc import Iterable

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Keys of components in files that older releases of transformers wrote, or that the release in use reads by itself.
_COMPONENT_KEYS = frozenset(
    (
        "norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor", "encoder_cross_output_size",
        "model_type", "auto_map", "use_cache", "torch_dtype", "name_or_path", "num_labels", "attn_implementation",
        "experts_implementation", "output_attentions", "per_layer_config", "quantization_config", "torchscript",
        "use_bfloat16", "tf_legacy_loss", "pruned_heads", "is_decoder", "cross_attention_hidden_size",
        "add_cross_attention", "tie_encoder_decoder", "tie_word_embeddings", "finetuning_task", "task_specific_params",
        "tokenizer_class", "prefix", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
        "decoder_start_token_id",
    )
)  # fmt: skip


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    return [name for name in config_class.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]


def warn_of_unknown_fields(config: PreTrainedConfig, given: dict, ignored: Iterable[str]) -> None:
    """Warns of names in `given`, the further arguments of a constructor, that nothing reads, but for `ignored` ones.

    Users may keep values of their own in a `BltConfig`, so there only likely mistakes are told; not in a component.
    """
    known, name_of_class = _own_fields(type(config)), type(config).__name__
    components = config.sub_configs
    generation = GenerationConfig._get_default_generation_params()
    for name in given:
        if name.startswith("_") or name in _COMPONENT_KEYS or name in ignored or name in generation:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if components else 0.6)
        owners = [f"`{part}`" for part, part_class in components.items() if name in _own_fields(part_class)]
        if close:
            hint = f"did you mean `{close[0]}`?"
        elif owners:
            hint = f"it belongs into {', '.join(owners)}."
        elif components:
            continue
        else:
            hint = f"its fields are {', '.join(known)}."
        logger.warning_once(f"`{name_of_class}` has no field `{name}`, so it is not used; {hint}")


__all__ = ["warn_of_unknown_fields"]
