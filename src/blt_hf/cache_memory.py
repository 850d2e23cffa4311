"""The memory of a row of a cache. Nothing of a model is imported: its code may have come with a checkpoint."""

import torch


def count_row_memory(cache, num_bytes: int, num_patches: int, dtype: torch.dtype, max_open_bytes: int) -> int:
    """Counts the bytes of memory of a row, in a cache whose rows hold up to so many bytes of text and patches.

    Args:
        cache: an empty `BltCache`.
        dtype: of keys and values; those of the entropy model are fp32.
        max_open_bytes: bytes of the longest patch, before the last of them.
    """
    cache.history.row_bytes, cache.history.row_patches = [num_bytes], [num_patches]
    for slots in (cache.patcher_slots, cache.local_slots):
        slots.reserve(num_bytes, cache.slack, None)
    cache.reserve_open(max_open_bytes, 0)
    cache.reserve_patches(0)
    config, size = cache.config, dtype.itemsize
    encoder, decoder = config.encoder_config, config.decoder_config
    heads, kv_heads = decoder.cross_attention_heads
    of_latents = config.cross_attn_k * kv_heads * (decoder.hidden_size // heads)
    of_slots = [  # slots, and bytes of memory of each
        (cache.recent_slots, 8 * cache.history.num_fields + 4 + len(cache.byte_states) * encoder.hidden_size * size),
        (cache.latent_slots, 2 * (cache.num_cross_layers + (decoder.lexicon_size > 0)) * of_latents * size),
    ]
    for layers, part, item in (
        (cache.patcher, config.patcher_config, 4),
        (cache.encoder, encoder, size),
        (cache.decoder, decoder, size),
        (cache.global_transformer, config.global_config, size),
    ):
        of_slots += [(layer.states.slots, 2 * part.num_key_value_heads * part.head_dim * item) for layer in layers]
    return sum(slots.size * memory for slots, memory in of_slots)


__all__ = ["count_row_memory"]
