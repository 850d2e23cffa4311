"""Layers over rows of states, in few calls, for engines whose weights do not change while they serve.

An engine brings its own operations ([`RowKernels`]): it gets the weights that multiply the same states together, so that
it can join them, and lay them out as its kernels read them fastest.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..model.layers_blt import (
    BltByteCrossAttention,
    BltPatchCrossAttention,
    BltRotaryEmbedding,
    BltTransformerLayer,
    make_rotation,
    rotate_pairs,
    rotates_complex,
)
from ..model.packed_blt import is_plain
from ..model.stacks_blt import BltLocalEncoder


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
    activation: Callable[[Tensor], Tensor]


class RowStack:
    """Transformer layers over rows `(T, W)`, whose attention somebody else runs.

    Args:
        layers: [`BltTransformerLayer`]s in evaluation mode.
        rotary: the stack's rotary embedding.
        kernels: operations.
        num_positions: positions that occur, whose rotations are then computed once. None: not known.
    Raises:
        ValueError: modules that do more than their weights say.
    """

    def __init__(
        self,
        layers: Sequence[BltTransformerLayer],
        rotary: BltRotaryEmbedding,
        kernels: RowKernels,
        num_positions: int | None = None,
    ):
        check_plain(layers)
        attention = layers[0].self_attn
        self.kernels, self.rotary = kernels, rotary
        self.head_dim, self.eps = attention.head_dim, layers[0].input_layernorm.eps
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        rope_type = getattr(rotary, "rope_type", None)
        is_fixed = type(rope_type) is str and "dynamic" not in rope_type and "longrope" not in rope_type
        # What rotations depend on beside positions, if nothing else.
        scaling = rotary.inv_freq.new_tensor(rotary.attention_scaling) if is_fixed else None
        self.angles = None if scaling is None else (rotary.inv_freq, scaling)
        self.dtype = layers[0].input_layernorm.weight.dtype
        self._num_positions = None if self.angles is None else num_positions
        self._rotations: Tensor | None = None
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
            nn.functional.silu if type(mlp.act_fn) is SiLUActivation else mlp.act_fn,  # in fewer calls
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

    def rotates_as(self, other: "RowStack") -> bool:
        """Tells whether [`rotation`](RowStack.rotation) gives the same for both stacks."""
        if self.angles is None or other.angles is None or self.dtype != other.dtype:
            return False
        return all(torch.equal(own, theirs) for own, theirs in zip(self.angles, other.angles))

    def rotation(self, positions: Tensor, states: Tensor) -> Tensor:
        """Computes the rotations of queries and keys at `positions` `(T,)`.

        Complex factors `(T, 1, D / 2)` for `states` in fp32, else cosines and sines `(2, T, 1, D)`.
        """
        if self._num_positions is None:
            return self._compute_rotation(positions, states)
        if self._rotations is None:
            self._rotations = self._compute_rotation(
                torch.arange(self._num_positions, device=positions.device), states
            )
        return self._rotations.index_select(0 if self._rotations.is_complex() else 1, positions)

    def _compute_rotation(self, positions: Tensor, states: Tensor) -> Tensor:
        if self.angles is not None and rotates_complex(states):
            frequencies, scaling = self.angles
            return torch.polar(scaling, positions[:, None, None] * frequencies)
        return make_rotation(*(part[0] for part in self.rotary(states, positions[None])))


class _RowCross:
    """The projections of a cross attention, in either direction."""

    def __init__(self, cross: BltByteCrossAttention | BltPatchCrossAttention, kernels: RowKernels):
        check_plain([cross])
        self.kernels = kernels
        self.query = kernels.make_product([cross.q_proj.weight])
        self.output = kernels.make_product([cross.o_proj.weight])
        self.keys_values = kernels.make_product([cross.k_proj.weight, cross.v_proj.weight])
        self.query_norm, self.key_norm, self.eps = cross.q_norm.weight, cross.k_norm.weight, cross.q_norm.eps
        self.scaling, self.num_latents = cross.scaling, cross.num_latents
        self.heads = -1, cross.num_key_value_groups, cross.head_dim

    def find_queries(self, states: Tensor) -> Tensor:
        """Computes the queries of `(N, W)`, `(N, H_kv, H / H_kv, D)`."""
        return self.query(self.kernels.norm(states, self.query_norm, self.eps)).unflatten(1, self.heads)

    def find_keys_values(self, states: Tensor) -> Tensor:
        """Computes keys and values of `(N, W)` side by side, `(N, 2 * H_kv * D)`."""
        return self.keys_values(self.kernels.norm(states, self.key_norm, self.eps))

    def split(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Splits them, `(N, ..., 2 * H_kv * D)`, to keys and values `(N, ..., H_kv, 1, D)`."""
        return keys_values.unflatten(-1, (2, -1, 1, self.heads[-1])).unbind(dim=-4)


class RowCrossAttention(_RowCross):
    """A cross attention of the decoder: the latents of one patch for each byte.

    Args:
        cross: a [`BltByteCrossAttention`] in evaluation mode.
        kernels: operations.
    """

    def project(self, latents: Tensor) -> Tensor:
        """Computes keys and values `(P, F)` of latents `(P, K, W)`."""
        return self.find_keys_values(latents.flatten(0, 1)).view(len(latents), -1)

    def run(self, states: Tensor, keys_values: Tensor, index: Tensor) -> Tensor:
        """Adds to states `(T, W)` what they read of the patches `index` `(T,)` among keys and values `(P, F)`."""
        query = self.find_queries(states)[:, None]
        key, value = self.split(keys_values.index_select(0, index).unflatten(1, (self.num_latents, -1)))
        scores = (query * key).sum(dim=-1).float().mul_(self.scaling)  # (T, K, H_kv, H / H_kv)
        weights = scores.softmax(dim=1).to(value.dtype)
        attended = (weights[..., None] * value).sum(dim=1)
        return self.output(attended.flatten(1)).add_(states, alpha=2)  # the released weights need both


class RowLatents:
    """What makes the latents of patches from the states of their bytes: the pool, and the encoder's cross attentions.

    Args:
        encoder: in evaluation mode.
        kernels: operations.
    """

    def __init__(self, encoder: BltLocalEncoder, kernels: RowKernels):
        check_plain([encoder.patch_embedding_projection])
        self.queries = kernels.make_product([encoder.patch_embedding_projection.weight])
        self.cross_layers = [_RowPatchCrossAttention(cross, kernels) for cross in encoder.cross_attn_layers]
        self.num_latents = encoder.config.cross_attn_k
        self.pooling, self.least = _POOLINGS[encoder.config.patch_pooling]

    def run(self, byte_states: list[Tensor], patch: Tensor, num_patches: int) -> Tensor:
        """Computes latents `(P, K, W)`.

        Args:
            byte_states: states `(N, W)` that each cross attention reads.
            patch: int64 `(N,)`, patch of each byte, in `[0, P)`; each has a byte.
            num_patches: `P`.
        """
        states = byte_states[0]
        pooled = states.new_full((num_patches, states.shape[1]), self.least)
        index = patch[:, None].expand_as(states)
        pooled.scatter_reduce_(0, index, states, self.pooling, include_self=self.pooling != "mean")
        latents = self.queries(pooled).view(num_patches * self.num_latents, -1)
        for cross, states in zip(self.cross_layers, byte_states):
            latents = cross.run(latents, states, patch, num_patches)
        return latents.view(num_patches, self.num_latents, -1)


_POOLINGS = {"max": ("amax", -math.inf), "min": ("amin", math.inf), "mean": ("mean", 0.0)}


class _RowPatchCrossAttention(_RowCross):
    """A cross attention of the encoder: the bytes of one patch for each latent."""

    def run(self, latents: Tensor, states: Tensor, patch: Tensor, num_patches: int) -> Tensor:
        """Adds to latents `(P * K, W)` what they read of the states `(N, W)` of their bytes."""
        queries = self.find_queries(latents).unflatten(0, (num_patches, self.num_latents)).index_select(0, patch)
        key, value = self.split(self.find_keys_values(states)[:, None])
        scores = (queries * key).sum(dim=-1).float().mul_(self.scaling)  # (N, K, H_kv, H / H_kv)
        flat = scores.flatten(1)
        peak = flat.new_full((num_patches, flat.shape[1]), -math.inf)
        peak.scatter_reduce_(0, patch[:, None].expand_as(flat), flat, "amax")
        weights = (flat - peak.index_select(0, patch)).exp_()
        total = torch.zeros_like(peak).index_add_(0, patch, weights)
        mixed = (weights.view_as(scores)[..., None] * value).flatten(1)  # (N, K * H * D), in fp32 at least
        attended = mixed.new_zeros(num_patches, mixed.shape[1]).index_add_(0, patch, mixed)
        attended = attended.view(*total.shape, -1).div_(total[..., None])
        return self.output(attended.view(len(latents), -1).to(latents.dtype)).add_(latents, alpha=2)


def _rotate(heads: Tensor, rotation: Tensor) -> None:
    """Rotates `(T, H, D)` in place."""
    if rotation.is_complex():
        torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(rotation)
    else:
        heads.copy_(rotate_pairs(heads, rotation))


def check_plain(modules: Sequence[nn.Module]) -> None:
    """Refuses modules that do more than their weights say: adapters, quantizers, hooks, training mode.

    Raises:
        ValueError: names the class of the module.
    """
    for module in modules:
        if not _is_plain(module):
            raise ValueError(
                f"`model` must be plain weights in evaluation mode to be served so; a {type(module).__name__} of it has "
                "an adapter, a hook, a forward of its own, a bias or weights of several dtypes, or is in training mode. "
                "Merge adapters (`merge_and_unload()` of PEFT) and call `model.eval()`."
            )


def _is_plain(module: nn.Module) -> bool:
    like = next(module.parameters())
    if type(module) is not BltPatchCrossAttention:
        return is_plain(module, like)
    # `is_plain` does not know it, as it is never packed.
    is_replaced = module.training or "forward" in vars(module) or type(module).forward is not _FORWARD
    is_hooked = module._forward_hooks or module._forward_pre_hooks
    return not is_replaced and not is_hooked and all(is_plain(part, like) for part in module.children())


_FORWARD = BltPatchCrossAttention.forward  # unless somebody replaces it


__all__ = ["Product", "RowCrossAttention", "RowKernels", "RowLatents", "RowStack", "check_plain"]
