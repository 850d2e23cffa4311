"""The decoder of Fast BLT by its definition, slowly, and models with blocks to compare it with."""

import torch

from blt_hf import BltForCausalLM
from helpers.models import make_model, tiny_config


SIZE = 5


def diffusion_model(seed: int = 0, **overrides) -> BltForCausalLM:
    return make_model(tiny_config(diffusion_block_size=SIZE, **overrides), seed=seed)


@torch.no_grad()
def seen_keys(model, span) -> torch.Tensor:
    """Bool `(S + N*K, S + N*K)`, whose value reaches whom in the first of the decoder's attentions; of one row.

    Equal queries and keys give each visible key the same weight, and the value of a key says which it is.
    """
    attention, total = model.model.local_decoder.layers[0].self_attn, span.num_queries + span.blocks.ids[0].numel()
    states = torch.zeros(1, model.config.decoder_config.num_attention_heads, total, total)
    output, _ = span.attend(attention, states, states, states + torch.eye(total))
    return output[0, :, 0] > 0


def softmax_attention(query, key, value, visible, scaling):
    """`(S, H, D)` over `(T, H, D)`, what `visible` `(S, T)` says."""
    scores = torch.einsum("shd,thd->hst", query, key) * scaling
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hst,thd->shd", weights, value)


def rotate(states, positions, theta):
    """Rotary embedding of neighbouring pairs, by complex numbers: `(S, H, D)`."""
    size = states.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, size, 2, dtype=states.dtype) / size)
    turned = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )[:, None].to(torch.complex64 if states.dtype == torch.float32 else torch.complex128)
    return torch.view_as_real(turned).flatten(-2)


def slow_decoder(model, states, latents, read, positions, visible):
    """The decoder on one row `(S, W)`, by its definition: everybody's keys at once, and a mask for who sees whom."""
    decoder = model.model.local_decoder
    theta = model.config.decoder_config.rope_parameters["rope_theta"]

    def heads(projected, module):
        projected = projected.unflatten(-1, (-1, module.head_dim))
        return projected.repeat_interleave(module.q_proj.out_features // module.head_dim // projected.shape[-2], -2)

    for index, layer in enumerate(decoder.layers):
        if index < len(decoder.cross_attn_layers):
            cross = decoder.cross_attn_layers[index]
            query = heads(cross.q_proj(cross.q_norm(states)), cross)
            seen = cross.k_norm(latents.flatten(0, 1))
            patch = torch.arange(len(latents)).repeat_interleave(latents.shape[1])
            is_read = (patch <= read[:, None]) & (patch > read[:, None] - cross.window)
            key, value = heads(cross.k_proj(seen), cross), heads(cross.v_proj(seen), cross)
            attended = softmax_attention(query, key, value, is_read, cross.scaling)
            states = 2 * states + cross.o_proj(attended.flatten(1))
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        query, key, value = (
            heads(proj(normed), attention) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, positions, theta), rotate(key, positions, theta)
        attended = softmax_attention(query, key, value, visible, attention.scaling)
        states = states + attention.o_proj(attended.flatten(1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return decoder.norm(states)
