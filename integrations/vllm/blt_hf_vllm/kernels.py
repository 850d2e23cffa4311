"""The operations of layers, by the kernels that vLLM has for its own models."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from blt_hf.serving.row_layers import Product, RowKernels


class VllmKernels(RowKernels):
    """Products of joined weights, without using memory twice: the weights become views of the joined ones."""

    def make_product(self, weights: Sequence[nn.Parameter]) -> Product:
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, joined.split([len(weight) for weight in weights])):
            weight.data = part
        return lambda states: nn.functional.linear(states, joined)


class CpuKernels(RowKernels):
    """Kernels of vLLM's CPU build. Weights have the layout of the processor's; the model's own are empty afterwards."""

    def make_product(self, weights: Sequence[nn.Parameter]) -> Product:
        linear = nn.Module()
        linear.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
        for weight in weights:
            weight.data = weight.new_empty(0)
        product, weight = linear.cpu_linear, linear.weight
        return lambda states: product(states, weight, None)

    def norm(self, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(states)
        ops.rms_norm(output, states, weight, eps)
        return output


def make_kernels() -> RowKernels:
    """Chooses the operations of this platform."""
    return CpuKernels() if current_platform.is_cpu() else VllmKernels()


__all__ = ["CpuKernels", "VllmKernels", "make_kernels"]
