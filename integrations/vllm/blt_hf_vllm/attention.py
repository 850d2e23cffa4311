"""vLLM's attention for the stacks of a BLT: one cache for all layers of a stack, and patches in the place of tokens."""

import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from blt_hf.serving.ragged import NewPatches

from .settings import MemoryPlan


class StackAttention(Attention):
    """Attention of all layers of a stack.

    To the engine it is one layer with the heads of all of them, so that a stack has one table of pages; a layer's kernel
    sees the heads of that layer.

    Args:
        plan: how memory is divided.
        name: of the stack.
        scale: factor of the scores.
        prefix: the name that the engine gives the layer.
    """

    def __init__(self, plan: MemoryPlan, name: str, scale: float, prefix: str):
        shape = plan.stacks[name]
        backend = get_attn_backend(shape.head_dim, shape.dtype, "auto", has_sliding_window=shape.window is not None)
        with set_default_torch_dtype(shape.dtype):
            super().__init__(
                shape.num_heads,
                shape.head_dim,
                scale,
                num_kv_heads=shape.num_kv_heads,
                cache_config=get_current_vllm_config().cache_config,
                per_layer_sliding_window=shape.window,
                prefix=prefix,
                attn_backend=_stack_backend(backend, shape.window is None),
            )
        self.plan, self.name, self.shape = plan, name, shape
        self.kv_cache_torch_dtype = shape.dtype  # the base class takes the model's
        self.layer_caches: list[Tensor] = []
        self._patches: tuple[Any, Tensor] | None = None

    def get_kv_cache_spec(self, vllm_config):
        """Pages of the plan's size: of the last bytes, or with a slot for every `bytes_per_slot` bytes."""
        plan, shape, slots = self.plan, self.shape, self.plan.slots[self.name]
        common = {
            "num_kv_heads": shape.num_layers * shape.num_kv_heads,
            "head_size": shape.head_dim,
            "dtype": shape.dtype,
            "page_size_padded": None if slots * shape.slot_size == plan.page_size else plan.page_size,
        }
        if shape.window is not None:
            return SlidingWindowSpec(block_size=slots, sliding_window=shape.window, **common)
        ratio = plan.bytes_per_slot
        return FullAttentionSpec(block_size=slots * ratio, tokens_per_state=ratio, **common)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Divides `(pages, layers * heads, slots, 2 * D)` among the layers."""
        self.kv_cache = kv_cache
        self.layer_caches = list(kv_cache.split(self.num_kv_heads, dim=1))

    def clear_new_pages(self, slots: Tensor) -> None:
        """Clears the pages whose first slot is among `slots` `(T,)`, those that the next forward writes.

        A page may have belonged to a stack of another precision, or to the state, and what is left there may be NaN as
        another type. The CPU's attention multiplies what is masked by 0. So vLLM clears new pages, but on a CPU only as
        far as a page of the global layers is used.
        """
        page, first = np.divmod(slots.numpy(), self.plan.slots[self.name])
        begun = page[first == 0]
        if len(begun):
            self.kv_cache[torch.from_numpy(begun)] = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps keys and values of a layer and attends, `(T, H, D)` each; over bytes, or the patches that were started."""
        if self._patches is not None:
            metadata, slots = self._patches
        else:
            context = get_forward_context()
            metadata, slots = context.attn_metadata[self.layer_name], context.slot_mapping[self.layer_name]
        cache = self.layer_caches[layer]
        output = query.new_empty(query.shape)
        if not self.attn_backend.forward_includes_kv_cache_update:
            self.impl.do_kv_cache_update(self, key, value, cache, slots)
        self.impl.forward(self, query, key, value, cache, metadata, output=output)
        return output

    def start_patches(self, patches: NewPatches) -> None:
        """Makes the queries of [`attend`] stand for `patches`, until the next call."""
        context = get_forward_context().attn_metadata[self.layer_name]
        self._patches = context.build(patches, self.kv_cache.shape[2])


@dataclass
class PatchContext:
    """What the engine knows of the requests before a forward; their patches are known in the middle of it."""

    builder: Any
    common: CommonAttentionMetadata

    def build(self, patches: NewPatches, slots: int) -> tuple[Any, Tensor]:
        """The backend's metadata, and the slot of each patch; pages have `slots` of them."""
        common, device = self.common, patches.rows.device
        table = common.block_table_tensor[patches.rows].contiguous()
        starts = torch.tensor(list(accumulate(patches.counts_on_host, initial=0)), dtype=torch.int32)
        page = table[patches.row, patches.positions // slots].long()
        where = page * slots + patches.positions % slots
        metadata = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=(patches.before + patches.counts).to(torch.int32),
            num_reqs=len(patches.counts_on_host),
            num_actual_tokens=len(patches.positions),
            max_query_len=max(patches.counts_on_host),
            max_seq_len=common.max_seq_len,  # no text has more patches than bytes
            block_table_tensor=table,
            slot_mapping=where,
        )
        return self.builder.build_patches(metadata), where


def _stack_backend(base: type, is_of_patches: bool) -> type:
    """The platform's attention backend for a stack."""

    class StackMetadataBuilder(base.get_builder_cls()):
        def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            spec = replace(kv_cache_spec, num_kv_heads=layer.num_kv_heads)
            if is_of_patches:
                spec = replace(spec, block_size=layer.plan.slots[layer.name], tokens_per_state=1)
            super().__init__(spec, layer_names, _with_dtype(vllm_config, layer.shape.dtype), device)
            self._layer = layer

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs):
            if is_of_patches:
                return PatchContext(self, common_attn_metadata)
            if current_platform.is_cpu():
                self._layer.clear_new_pages(common_attn_metadata.slot_mapping)
            return super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)

        def build_patches(self, common_attn_metadata):
            return super().build(0, common_attn_metadata)

    class StackBackend(base):
        @staticmethod
        def get_builder_cls():
            return StackMetadataBuilder

    return StackBackend


def _with_dtype(vllm_config, dtype: torch.dtype):
    """The settings as a stack of another precision than the model's sees them."""
    if vllm_config.model_config.dtype == dtype:
        return vllm_config
    vllm_config = copy.copy(vllm_config)
    vllm_config.model_config = copy.copy(vllm_config.model_config)
    vllm_config.model_config.dtype = dtype
    return vllm_config


__all__ = ["PatchContext", "StackAttention"]
