"""Stacks with packed weights: the same numbers by fewer operations, for the steps of one call of `generate`.

A decoding step on small models spends its time on starting operations. In the local stacks, which run for every byte,
query, key and value come from one product, and so do gate and up; in fp32 the weights of a norm are part of the product
behind it. In all stacks keys and values are written at once, queries and keys rotated at once, and residuals added inside
products.

Packed weights are copies. They are made when a call of `generate` begins and are gone when it ends, which costs less time
than one byte does. So they never go stale: an assignment through `.data`, which no version counter shows, is seen by the
next call. Modules that do more than their weights say (adapters, quantizers, hooks, a replaced `forward`, offloaded
weights) are not packed; they run as they are.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.activations import SiLUActivation

from .attention_blt import AttentionSpan
from .cache_blt import BltCache, BltCacheLayer, SlotIndex
from .layers_blt import (
    BltByteCrossAttention,
    BltMLP,
    BltRMSNorm,
    BltRotaryEmbedding,
    BltSelfAttention,
    BltTransformerLayer,
    LatentIndex,
    rotate_pairs,
    rotates_complex,
)
from .names_blt import import_where_installed


# The function that a call of a module of each class runs, unless somebody replaces it.
_FORWARDS = {
    cls: cls.forward
    for cls in (
        BltTransformerLayer,
        BltSelfAttention,
        BltMLP,
        BltRMSNorm,
        BltRotaryEmbedding,
        BltByteCrossAttention,
        nn.Linear,
        nn.Dropout,
        SiLUActivation,
    )
}


# Down projections of at least so many weights are not copied; copies of released shapes then add less than 5 % of memory.
_LARGE = 2**20


class PackedLayer(NamedTuple):
    """Holds weights of a transformer layer, `(in, out)` each; those of norms are None where they are part of a product.

    Query, key and value are one weight with copies, and three without; gate and up are one, and two.
    """

    query_key_value: tuple[Tensor, ...]
    output: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor
    attention_norm: Tensor | None
    mlp_norm: Tensor | None


def _multiply(mm: Callable, states: Tensor, weights: tuple, memory: tuple | None, view: Callable) -> object:
    """Multiplies by joined weights, into `memory` if there is some; see [`PackedStack._reserve`].

    Returns:
        result of `view` for the joined product `(N, out)`.
    """
    if memory is None:
        products = [mm(states, weight) for weight in weights]
        return view(products[0] if len(products) == 1 else torch.cat(products, dim=-1))
    parts, views = memory
    for weight, part in zip(weights, parts):
        mm(states, weight, out=part)
    return views


def _make_memory(states: Tensor, weights: tuple, view: Callable) -> tuple:
    """Makes memory for the joined product of `states` `(N, in)`; returns its parts for each weight, and all views."""
    sizes = [weight.shape[1] for weight in weights]
    joined = states.new_empty(states.shape[0], sum(sizes))
    return joined.split(sizes, dim=-1), view(joined)


def _view_gates(joined: Tensor) -> tuple[Tensor, Tensor]:
    return joined.chunk(2, dim=-1)


def _multiply_one_row(states: Tensor, weight: Tensor) -> Tensor:
    """Computes `torch.mm` of one row `(1, in)` as a sum, which the compiler fuses with its neighbours."""
    # `as_strided` needs a tensor in memory. Otherwise, each column of the product would compute the states anew.
    states = states.as_strided(states.shape, states.stride())
    return (states * weight.t()).sum(dim=-1)[None]


def _add_one_row(other: Tensor, states: Tensor, weight: Tensor, beta: int = 1) -> Tensor:
    """Computes `torch.addmm` of one row in the same way."""
    return beta * other + _multiply_one_row(states, weight)


class PackedStack:
    """Runs the layers of a stack on packed weights.

    Args:
        stack: its layers, and the norm behind them if there is one, are plain.
        cross_layers: the decoder's cross attentions, in front of the first layers.
        copies: join weights in copies of them. False for the global transformer, whose copies would be large: its products
            stay apart, and all else is as in the local stacks.
        turns: store copies contiguous as `(in, out)`: faster for one row on a CPU in eager mode, while compiled code is
            faster with the original layout.
    """

    def __init__(self, stack: nn.Module, cross_layers: Sequence = (), copies: bool = True, turns: bool = True) -> None:
        layers, attention = stack.layers, stack.layers[0].self_attn
        weight = attention.q_proj.weight
        width = weight.shape[1]
        self.copies, self.eps = copies, layers[0].input_layernorm.eps
        # x / sqrt(mean(x * x) + eps) = sqrt(W) * x / hypot(|x|, sqrt(W * eps)): three operations, `sqrt(W)` in the weights
        self.is_exact = weight.dtype == torch.float32 and weight.device.type == "cpu"
        self.turns = turns and copies and self.is_exact
        self.root, self.root_eps = width**0.5, weight.new_tensor((width * self.eps) ** 0.5)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_kv_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.num_heads = attention.q_proj.weight.shape[0] // self.head_dim
        self.is_grouped = self.num_heads != self.num_kv_heads  # attention takes no bool of symbolic sizes
        silu = _FORWARDS[SiLUActivation]  # calling the module takes six more calls of functions
        activations = [layer.mlp.act_fn for layer in layers]
        self.activations = [torch._C._nn.silu if type(act).forward is silu else act for act in activations]
        self._memory: dict[tuple[int, ...], tuple] = {}
        packed, packed_cross = tuple(map(self._pack_layer, layers)), tuple(map(self._pack_cross, cross_layers))
        self.products = import_where_installed("products") if self.is_exact else None
        self.held_patch = keys_values = None  # a `blt_hf.products.HeldPatch`, for bytes that read the same patch
        if cross_layers:
            cross = cross_layers[0]
            self.cross_head_dim, self.cross_scaling = cross.head_dim, cross.scaling
            if self.turns and self.products is not None:
                self.held_patch = self.products.HeldPatch(packed_cross, cross)
                packed_cross, self.cross_scaling = self.held_patch.cross_layers, 1.0
            self.is_cross_grouped = cross.num_key_value_groups > 1
            self.cross_kv_heads, self.num_latents = cross.k_proj.weight.shape[0] // cross.head_dim, cross.num_latents
            # Latents are normed once for all layers, so only where the weights of norms are part of products.
            pairs = [self._join([layer.k_proj, layer.v_proj], layer.k_norm.weight)[0] for layer in cross_layers]
            keys_values = torch.cat(pairs, dim=1) if self.is_exact else None
        self.weights = packed, packed_cross, keys_values
        self.least_rows = math.inf if self.products is None else self.products.least_rows(layers[0], copies)
        self.transposed = None if self.least_rows == math.inf else self.products.transpose(self.weights)
        self.norm = self._scaled(stack.norm.weight) if hasattr(stack, "norm") else None
        self.inv_freq = stack.rotary_emb.inv_freq
        self.rotary_scaling = self.inv_freq.new_tensor(float(stack.rotary_emb.attention_scaling))

    def _pack_layer(self, layer: BltTransformerLayer) -> PackedLayer:
        attention, mlp, down = layer.self_attn, layer.mlp, layer.mlp.down_proj.weight
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        return PackedLayer(
            self._join([attention.q_proj, attention.k_proj, attention.v_proj], before),
            self._turned(attention.o_proj.weight),
            self._join([mlp.gate_proj, mlp.up_proj], between),
            self._turned(down) if down.numel() < _LARGE else down.detach().t(),
            *(None if self.is_exact and self.copies else self._scaled(norm) for norm in (before, between)),
        )

    def _pack_cross(self, cross: BltByteCrossAttention) -> tuple[Tensor, Tensor, Tensor | None]:
        (query,), norm = self._join([cross.q_proj], cross.q_norm.weight), self._scaled(cross.q_norm.weight)
        return query, self._turned(cross.o_proj.weight), None if self.is_exact else norm

    def _scaled(self, norm: Tensor) -> Tensor:
        return norm.detach() * self.root if self.is_exact else norm.detach()

    def _join(self, linears: list[nn.Linear], norm: Tensor) -> tuple[Tensor, ...]:
        """Joins the weights of several products of a normed state to one `(in, out)`; without copies they stay apart."""
        weights = tuple(linear.weight.detach() for linear in linears)
        if not self.copies:
            return tuple(weight.t() for weight in weights)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return (self._turned(weight * self._scaled(norm) if self.is_exact else weight),)

    def _turned(self, weight: Tensor) -> Tensor:
        weight = weight.detach().t()
        return weight.contiguous() if self.turns else weight

    def _normed(self, states: Tensor, weight: Tensor | None) -> Tensor:
        if not self.is_exact:
            return nn.functional.rms_norm(states, weight.shape, weight, self.eps)
        states = states / torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True), self.root_eps)
        return states if weight is None else states * weight

    def run(
        self, states: Tensor, positions: Tensor, span: AttentionSpan, cache_layers: list[BltCacheLayer],
        latents: Tensor | None = None, latent_index: LatentIndex | None = None,
    ) -> Tensor:  # fmt: skip
        """Runs the layers on `(B, S, W)`, as the stack's modules do.

        Args:
            positions: int64 `(B, S)`, of each byte (or patch) in its row.
            span: slots that each of them sees, and where its keys and values go.
            cache_layers: a [`BltCacheLayer`] for each layer.
            latents, latent_index: as [`BltLocalDecoder.forward`] takes them.
        """
        shape, slot_index = states.shape, span.slot_index
        states = states.reshape(-1, shape[-1])  # (N, W)
        rotation, mask = self._rotation(positions, states, span), span.mask(states)
        products, (layers, cross_layers, _) = self._choose_products(states.shape[0])
        mm, addmm = products
        view_heads = partial(self._view_heads, shape)
        of_heads, of_gates = self._reserve(states, shape, view_heads)
        held = self.held_patch.pairs if self.held_patch is not None and states.shape[0] == 1 else None
        kept = None if held or not cross_layers else self._gather(latents, latent_index, states)
        if held == [] and kept[1] is None:
            self.held_patch.take(kept[0])
        for number, (layer, activation, cache_layer) in enumerate(zip(layers, self.activations, cache_layers)):
            if number < len(cross_layers):
                if held:
                    states = self.held_patch.attend(number, states, self._normed(states, None))
                else:
                    states = self._cross_attend(cross_layers[number], states, number, products, *kept)
            normed = self._normed(states, layer.attention_norm)
            heads = _multiply(mm, normed, layer.query_key_value, of_heads, view_heads)
            attended = self._attend(heads, rotation, mask, slot_index, cache_layer)
            states = addmm(states, attended.reshape(states.shape[0], -1), layer.output)
            normed = self._normed(states, layer.mlp_norm)
            gate, up = _multiply(mm, normed, layer.gate_up, of_gates, _view_gates)
            states = addmm(states, activation(gate) * up, layer.down)
        if self.norm is not None:
            states = self._normed(states, self.norm)
        return states.view(shape)

    def _choose_products(self, num_rows: int) -> tuple[tuple[Callable, Callable], tuple]:
        """Chooses `torch.mm` and `torch.addmm`, or faster substitutes for so many rows, and the weights for them."""
        if torch.compiler.is_compiling():
            return (_multiply_one_row, _add_one_row) if num_rows == 1 else (torch.mm, torch.addmm), self.weights
        if num_rows < self.least_rows:
            return (torch.mm, torch.addmm), self.weights
        return self.products.choose(num_rows), self.transposed

    def _reserve(self, states: Tensor, shape: torch.Size, view_heads: Callable) -> tuple:
        """Makes memory for the joined products of a layer, which the next layer overwrites; once for each shape.

        Returns:
            for attention and feed-forward, parts for each weight and all views: a step makes none. None: each layer makes
            its own, as compiled steps do, and those on a GPU.
        """
        if torch.compiler.is_compiling() or states.device.type != "cpu":
            return None, None
        if shape not in self._memory:
            layer = self.weights[0][0]
            # Memory that is made in inference mode could not be written to by a later step outside of it.
            with torch.inference_mode(False):
                self._memory[shape] = (
                    _make_memory(states, layer.query_key_value, view_heads),
                    _make_memory(states, layer.gate_up, _view_gates),
                )
        return self._memory[shape]

    def _view_heads(self, shape: torch.Size, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views the joined query, key and value `(N, out)` of bytes `(B, S)`.

        Returns:
            query `(B, H, S, D)`; keys and values `(2 * H_kv, N, D)`; the queries and keys to rotate, complex
            `(N, H + H_kv, D/2)` or real `(B, S, H + H_kv, D)`.
        """
        heads = joined.view(*shape[:2], -1, self.head_dim)
        rotated = heads
        if rotates_complex(joined):
            rotated = torch.view_as_complex(joined.view(joined.shape[0], -1, self.head_dim // 2, 2))
        query, keys_values = heads.split_with_sizes([self.num_heads, 2 * self.num_kv_heads], 2)
        rotated = rotated[..., : -self.num_kv_heads, :]
        return query.transpose(1, 2), keys_values.flatten(0, 1).transpose(0, 1), rotated

    def _attend(
        self, heads: tuple, rotation: Tensor, mask: Tensor | None, slot_index: SlotIndex, cache_layer: BltCacheLayer
    ) -> Tensor:
        """Rotates, writes keys and values, and attends; returns `(B, S, H, D)`."""
        query, keys_values, rotated = heads
        if rotation.is_complex():
            rotated.mul_(rotation)
        else:
            rotated.copy_(rotate_pairs(rotated, rotation))
        slots, seen, keys, values = cache_layer.slot_views(slot_index.seen)
        slots.index_copy_(1, slot_index.index, keys_values)
        if slot_index.rows is not None:
            keys, values = seen.index_select(2, slot_index.rows).transpose(1, 2).unbind()
        attended = nn.functional.scaled_dot_product_attention(
            query, keys, values, mask, scale=self.scaling, enable_gqa=self.is_grouped
        )
        return attended.transpose(1, 2)

    def _cross_attend(
        self, cross: tuple, states: Tensor, number: int, products, latents: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Adds the output of a cross attention to twice `states`, as the modules do."""
        (mm, addmm), (weight, output, norm) = products, cross
        query = mm(self._normed(states, norm), weight).view(states.shape[0], -1, 1, self.cross_head_dim)
        keys, values = (
            part.reshape(states.shape[0], -1, self.cross_kv_heads, self.cross_head_dim).transpose(1, 2)
            for part in latents[:, :, number].unbind(2)
        )
        attended = nn.functional.scaled_dot_product_attention(
            query, keys, values, mask, scale=self.cross_scaling, enable_gqa=self.is_cross_grouped
        )
        return addmm(states, attended.view(states.shape[0], -1), output, beta=2)

    def project_latents(self, latents: Tensor) -> Tensor:
        """Projects latents `(B, P, K, W)` to keys and values `(B, P, L, 2, F)`, for all cross attentions."""
        rows, num_patches, num_latents, width = latents.shape
        states = self._normed(latents.reshape(-1, width), None)
        (mm, _), (*_, keys_values) = self._choose_products(states.shape[0])
        states = mm(states, keys_values).view(rows, num_patches, num_latents, len(self.weights[1]), 2, -1)
        return states.permute(0, 1, 3, 4, 2, 5).flatten(-2)

    def _gather(self, latents: Tensor, latent_index: LatentIndex, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Takes keys and values that each byte reads `(N, window, L, 2, F)`, of all cross attentions; a mask over them."""
        rows, size = latents.shape[:2]
        index = latent_index.index
        if rows > 1:
            index = index + torch.arange(0, rows * size, size, device=index.device)[:, None, None]
        taken = latents.flatten(0, 1).index_select(0, index.flatten())
        mask = None
        if latent_index.hidden is not None:
            hidden = latent_index.hidden.flatten(0, 1).repeat_interleave(self.num_latents, dim=-1)[:, None, None]
            mask = hidden.to(states.dtype) * torch.finfo(states.dtype).min
        return taken.view(states.shape[0], -1, *latents.shape[2:]), mask

    def _rotation(self, positions: Tensor, states: Tensor, span: AttentionSpan) -> Tensor:
        """Computes the rotation of queries and keys: complex `(N, 1, D/2)`, or cosines and sines `(2, B, S, 1, D)`."""
        if self.rotation_key not in span.rotations:
            span.rotations[self.rotation_key] = self.make_rotation(positions, states)
        return span.rotations[self.rotation_key]

    rotation_key = 0  # stacks with the same one share their rotations of a span

    def make_rotation(self, positions: Tensor, states: Tensor) -> Tensor:
        """Computes the rotation for positions `(B, S)`, in the dtype of `states`."""
        if rotates_complex(states):
            angles = positions.reshape(-1, 1, 1) * self.inv_freq
            return torch.polar(self.rotary_scaling, angles)
        angles = positions[..., None, None].float() * self.inv_freq.float()
        cos, sin = angles.cos() * self.rotary_scaling, angles.sin() * self.rotary_scaling
        cos, sin = torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
        return torch.stack([cos, sin]).to(states.dtype)


class PackedStacks:
    """Holds the packed stacks of a model; None: the modules of this stack run.

    Args:
        model: a [`BltModel`].
        cache: of the steps; a stack is packed only if its keys and values there have the dtype of its weights.
    """

    def __init__(self, model: nn.Module, cache: BltCache) -> None:
        encoder, decoder, patcher, global_ = (
            model.local_encoder, model.local_decoder, model.patcher, model.global_transformer
        )  # fmt: skip
        self.encoder = self.decoder = self.patcher = self.global_transformer = None
        turns = cache.compile_config is None
        if len(encoder.cross_attn_layers) == 1 and _can_pack(encoder, cache.encoder):
            self.encoder = PackedStack(encoder, turns=turns)
        if _can_pack(decoder, cache.decoder, *decoder.cross_attn_layers):
            self.decoder = PackedStack(decoder, decoder.cross_attn_layers, turns=turns)
        if cache.patcher and _can_pack(patcher, cache.patcher):
            self.patcher = PackedStack(patcher, turns=turns)
            self.patcher.rotation_key = 1
        if _can_pack(global_, cache.global_transformer):
            self.global_transformer = PackedStack(global_, copies=False)
        if self.encoder and self.decoder and not self.encoder.inv_freq.equal(self.decoder.inv_freq):
            self.decoder.rotation_key = 2


def _can_pack(stack: nn.Module, cache_layers: list, *parts: nn.Module) -> bool:
    """Tells whether the layers of a stack and other `parts` are plain, and the cache holds their dtype."""
    weight = getattr(stack.layers[0].self_attn.q_proj, "weight", None)
    rope_type = getattr(stack.rotary_emb, "rope_type", "default")
    if stack.config._attn_implementation != "sdpa" or weight is None or weight.is_meta or type(rope_type) is not str:
        return False
    if torch.is_autocast_enabled(weight.device.type) or "dynamic" in rope_type or "longrope" in rope_type:
        return False  # the angles of these rotary embeddings change with the length
    held = (layer.states.values for layer in cache_layers)
    others = [getattr(stack, name) for name in ("norm", "dropout") if hasattr(stack, name)]
    parts = (*stack.layers, stack.rotary_emb, *parts, *others)
    return all(is_plain(part, weight) for part in parts) and all(
        values is not None and (values.dtype, values.device) == (weight.dtype, weight.device) for values in held
    )


def is_plain(module: nn.Module, like: Tensor) -> bool:
    """Tells whether a module, and each below it, runs its own forward on plain weights: no adapter, hook or quantizer.

    Args:
        like: a weight whose dtype and device all others have.
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        return False
    parts = list(module.modules())
    # Activations are called, so any will do.
    activations = {id(part.act_fn) for part in parts if type(part) is BltMLP and not any(part.act_fn.parameters())}
    for part in parts:
        fields = vars(part)
        is_known = type(part).forward is _FORWARDS.get(type(part)) or id(part) in activations
        if not is_known or part.training or "forward" in fields or part._forward_hooks or part._forward_pre_hooks:
            return False
        for weight in fields["_parameters"].values():
            if weight is not None and (
                type(weight) is not nn.Parameter or (weight.dtype, weight.device) != (like.dtype, like.device)
            ):
                return False
        if type(part) is nn.Linear and part.bias is not None:
            return False
    return True


__all__ = ["PackedStack", "PackedStacks", "is_plain"]
