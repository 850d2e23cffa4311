"""Counts weights from a configuration alone; `BltCache.memory` counts the memory of a text."""

import torch

from ..model.configuration_blt import BltConfig
from ..model.modeling_blt import BltForCausalLM


def count_parameters(config: BltConfig) -> dict[str, int]:
    """Counts the weights of each part of a [`BltForCausalLM`], by name, without allocating them.

    Returns:
        `patcher` (if there is one), `hash_tables`, `encoder`, `global_transformer`, `decoder`, `head`.
    """
    with torch.device("meta"):
        model = BltForCausalLM(config)
    parts = {
        "patcher": model.model.patcher,
        "hash_tables": model.model.encoder_hash_tok_embedding,
        "encoder": model.model.local_encoder,
        "global_transformer": model.model.global_transformer,
        "decoder": model.model.local_decoder,
        "head": model.lm_head,
    }
    return {
        name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items() if part is not None
    }


__all__ = ["count_parameters"]
