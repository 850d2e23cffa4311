"""Counts weights and memory from a configuration."""

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


def cache_bytes(config: BltConfig, num_bytes: float, num_patches: float, dtype: str | torch.dtype) -> int:
    """Computes the memory, in bytes, of the keys and values that a cache keeps for one text.

    The local models keep a window of bytes, the global transformer every patch. What else a cache holds (the open
    patch, the last ids, room to grow) does not depend on the length of the text.

    Args:
        config: of a BLT.
        num_bytes, num_patches: of the text.
        dtype: of the model; the entropy model's cache is in fp32, as it is.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def layers(part, positions: float, item_size: int) -> float:
        head_dim = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
        heads = part.num_key_value_heads or part.num_attention_heads
        return 2 * part.num_hidden_layers * heads * head_dim * positions * item_size

    def seen(window: int | None) -> float:
        return num_bytes if window is None else min(num_bytes, window - 1)

    local = seen(config.local_attention_window_len)
    total = sum(layers(part, local, dtype.itemsize) for part in (config.encoder_config, config.decoder_config))
    total += layers(config.global_config, num_patches, dtype.itemsize)
    if config.uses_patcher:
        total += layers(config.patcher_config, seen(config.patcher_config.sliding_window), 4)
    return round(total)


__all__ = ["cache_bytes", "count_parameters"]
