"""Layers over rows of states, in few calls, for engines whose weights do not change while they serve.

An engine brings its own operations ([`RowKernels`]): it gets the weights that multiply the same states together, so that
it can join them, and lay them out as its kernels read them fastest.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.attention_blt import gathered_attention
from ..model.layers_blt import BltByteCrossAttention, BltRotaryEmbedding, BltTransformerLayer, rotate_pairs
from ..model.packed_blt import is_plain


Product = Callable[[Tensor], Tensor]
"""States `(T, in)` times some weights, `(T, out)` in a tensor that nothing else uses."""


class RowKernels:
    """The operations of a layer, by torch. An engine overrides those for which it has something faster."""

    def make_product(self, weights: Sequence[nn.Parameter]) -> Product:
        """Makes the product of weights `(out, in)` that multiply the same states; the results stand side by side."""
        if len(weights) == 1:
            return lambda states: nn.functional.linear(states, weights[0])
        return lambda states: torch.cat([nn.functional.linear(states, weight) for weight in weights], dim=-1)

    def norm(self, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Computes the root-mean-square norm of `(T, W)`."""
        return nn.functional.rms_norm(states, weight.shape, weight, eps)


class _Layer(NamedTuple):
    query_key_value: Product
    output: Product
    gate_up: Product
    down: Product
    attention_norm: Tensor
    mlp_norm: Tensor
    activation: nn.Module


class RowStack:
    """Transformer layers over rows `(T, W)`, whose attention somebody else runs.

    Args:
        layers: [`BltTransformerLayer`]s in evaluation mode.
        rotary: the stack's rotary embedding.
        kernels: operations.
    Raises:
        ValueError: modules that do more than their weights say.
    """

    def __init__(self, layers: Sequence[BltTransformerLayer], rotary: BltRotaryEmbedding, kernels: RowKernels):
        check_plain(layers)
        attention = layers[0].self_attn
        self.kernels, self.rotary = kernels, rotary
        self.head_dim, self.eps = attention.head_dim, layers[0].input_layernorm.eps
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        rope_type = getattr(rotary, "rope_type", None)
        self.has_fixed_angles = type(rope_type) is str and "dynamic" not in rope_type and "longrope" not in rope_type
        self.layers = [self._make_layer(layer) for layer in layers]

    def _make_layer(self, layer: BltTransformerLayer) -> _Layer:
        attention, mlp, make_product = layer.self_attn, layer.mlp, self.kernels.make_product
        return _Layer(
            make_product([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            make_product([attention.o_proj.weight]),
            make_product([mlp.gate_proj.weight, mlp.up_proj.weight]),
            make_product([mlp.down_proj.weight]),
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            mlp.act_fn,
        )

    def run(
        self, number: int, states: Tensor, rotation: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Runs layer `number` on `(T, W)`.

        Args:
            rotation: of [`rotation`](RowStack.rotation), for these rows.
            attend: `(layer, query, key, value)` of `(T, H, D)` each, views of one tensor, to `(T, H, D)`.
        """
        layer, kernels = self.layers[number], self.kernels
        joined = layer.query_key_value(kernels.norm(states, layer.attention_norm, self.eps))
        heads = joined.view(len(states), -1, self.head_dim)
        _rotate(heads[:, : -self.num_kv_heads], rotation)
        sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
        attended = attend(number, *heads.split_with_sizes(sizes, dim=1))
        states = layer.output(attended.flatten(1)).add_(states)
        gate, up = layer.gate_up(kernels.norm(states, layer.mlp_norm, self.eps)).chunk(2, dim=-1)
        return layer.down(layer.activation(gate) * up).add_(states)

    def rotation(self, positions: Tensor, states: Tensor) -> Tensor:
        """Computes the rotations of queries and keys at `positions` `(T,)`.

        Complex factors `(T, 1, D / 2)` for `states` in fp32, else cosines and sines `(2, T, 1, D)`.
        """
        is_exact = states.dtype == torch.float32
        if is_exact and self.has_fixed_angles:
            scaling = self.rotary.inv_freq.new_tensor(self.rotary.attention_scaling)
            return torch.polar(scaling, positions[:, None, None] * self.rotary.inv_freq)
        cos, sin = (part[0] for part in self.rotary(states, positions[None]))
        return torch.complex(cos[..., ::2], sin[..., 1::2]) if is_exact else torch.stack([cos, sin])


class RowCrossAttention:
    """A cross attention of the decoder: the latents of one patch for each byte.

    Args:
        cross: a [`BltByteCrossAttention`] in evaluation mode.
        kernels: operations.
    """

    def __init__(self, cross: BltByteCrossAttention, kernels: RowKernels):
        check_plain([cross])
        self.kernels = kernels
        self.query = kernels.make_product([cross.q_proj.weight])
        self.output = kernels.make_product([cross.o_proj.weight])
        self.keys_values = kernels.make_product([cross.k_proj.weight, cross.v_proj.weight])
        self.query_norm, self.key_norm, self.eps = cross.q_norm.weight, cross.k_norm.weight, cross.q_norm.eps
        self.head_dim, self.num_latents, self.scaling = cross.head_dim, cross.num_latents, cross.scaling

    def project(self, latents: Tensor) -> Tensor:
        """Computes keys and values `(P, 2, F)` of latents `(P, K, W)`."""
        both = self.keys_values(self.kernels.norm(latents.flatten(0, 1), self.key_norm, self.eps))
        return both.view(*latents.shape[:2], 2, -1).transpose(1, 2).flatten(2)

    def run(self, states: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> Tensor:
        """Adds to states `(T, W)` what they read of the patches `index` `(T,)` among keys and values `(P, F)`."""
        query = self.query(self.kernels.norm(states, self.query_norm, self.eps))
        query = query.view(1, len(states), -1, self.head_dim)
        keys, values = (part.view(1, len(part), self.num_latents, -1, self.head_dim) for part in (keys, values))
        attended = gathered_attention(query, keys, values, index[None, :, None], None, self.scaling)
        return self.output(attended[0].flatten(1)).add_(states, alpha=2)  # the released weights need both


def _rotate(heads: Tensor, rotation: Tensor) -> None:
    """Rotates `(T, H, D)` in place."""
    if rotation.is_complex():
        torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(rotation)
    else:
        heads.copy_(rotate_pairs(heads, *rotation))


def check_plain(modules: Sequence[nn.Module]) -> None:
    """Refuses modules that do more than their weights say: adapters, quantizers, hooks, training mode.

    Raises:
        ValueError: names the class of the module.
    """
    for module in modules:
        if not is_plain(module, next(module.parameters())):
            raise ValueError(
                f"`model` must be plain weights in evaluation mode to be served so; a {type(module).__name__} of it has "
                "an adapter, a hook, a forward of its own, a bias or weights of several dtypes, or is in training mode. "
                "Merge adapters (`merge_and_unload()` of PEFT) and call `model.eval()`."
            )


__all__ = ["Product", "RowCrossAttention", "RowKernels", "RowStack", "check_plain"]
