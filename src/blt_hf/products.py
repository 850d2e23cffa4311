"""Fewer and faster matrix products, where torch's first choice is slow.

On a CPU torch multiplies fp32 matrices by MKL, which is slow on some processors. oneDNN, the other library that torch
brings along, then takes half the time or less. Which one is faster here is measured once a process, in hundredths of a
second. oneDNN has no gradients here. The model's code asks this module where it is installed; without it, all products are
torch's own.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


# oneDNN keeps code and memory for each number of rows that it has met. It meets these, and smaller ones than the least.
_BLOCKS = (128, 32)
LEAST_WORK = 400_000  # multiplications of a product from which oneDNN, which starts later than MKL, ends sooner
_LEAST_ROWS = 64  # making code for a first product does not pay for a prompt of fewer
_CLEARLY = 0.8  # of MKL's time is what oneDNN may take to be chosen
_preferred: dict[tuple[int, int], bool] = {}
_call_linear = nn.Linear.forward
multiply_few = _add_pointwise = None
if (_pointwise := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is not None:
    # Multiplies fp32 `(N, in)` by `(out, in)`, which may lie in memory as `(in, out)`, for numbers of rows as above.
    multiply_few = functools.partial(_pointwise.default._op, B=None, attr="none", scalars=[], algorithm="")
    _add_pointwise = _pointwise.binary._op


def prefers_onednn(num_rows: int = _BLOCKS[0]) -> bool:
    """Tells whether oneDNN is there, is not switched off, and multiplies so many rows clearly faster than MKL here.

    The first call for a number of rows and of threads measures it.
    """
    if multiply_few is None or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    key = torch.get_num_threads(), num_rows
    if key not in _preferred:
        if _is_watched():
            return False  # measured when nobody counts operations
        _preferred[key] = _is_faster(num_rows)
    return _preferred[key]


def _is_watched() -> bool:
    """Tells whether somebody counts operations, or transforms functions: both know torch's own products."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.peek_interpreter_stack() is not None


@torch.no_grad()
def _is_faster(num_rows: int, rounds: int = 8) -> bool:
    """Measures both libraries in turns; the best round of each counts, so that a busy neighbour decides nothing.

    For one row the median counts: MKL multiplies it on one core and oneDNN on all, where each product waits for a core
    that a neighbour keeps busy. Each product has a weight of its own, which comes from memory, as in a model. There are
    no random numbers.
    """
    with torch.autocast("cpu", enabled=False):
        states, weights = (
            torch.ones(rows, 768, dtype=torch.float32, device="cpu") for rows in (num_rows, 2 * rounds * 768)
        )
        seconds, weights = ([], []), iter(weights.split(768))
        for _ in range(rounds):
            for taken, function in zip(seconds, (nn.functional.linear, multiply_few)):
                taken.append(_seconds(function, states, next(weights)))
    of_mkl, of_onednn = map(statistics.median if num_rows == 1 else min, seconds)
    return of_onednn < _CLEARLY * of_mkl


def _seconds(function: Callable, *arguments: Tensor) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def multiply(states: Tensor, weight: Tensor) -> Tensor:
    """Multiplies fp32 `(..., in)` by `(out, in)`."""
    return _in_blocks(lambda rows: multiply_few(rows, weight), states)


def least_rows(layer: nn.Module, is_packed: bool) -> float:
    """Counts the rows from which a `PackedStack` of such layers multiplies by oneDNN.

    `is_packed`: weights are joined in copies; one row of these stays with MKL, which does not wait for other threads.
    """
    if not prefers_onednn(16):
        return math.inf
    size = sum(weight.numel() for weight in layer.parameters()) // (4 if is_packed else 7)  # of a product
    fewest = 1 if not is_packed and prefers_onednn(1) else 2
    return max(fewest, -(-LEAST_WORK * (1 + is_packed) // size))


def choose(num_rows: int) -> tuple[Callable, Callable]:
    """Chooses functions for so many rows, in the place of `torch.mm` and `torch.addmm`, for weights `(out, in)`."""
    return (_multiply_few, _add_multiply_few) if num_rows <= _BLOCKS[-1] else (_multiply, _add_multiply)


def transpose(packed):
    """Views tensors in nested tuples as [`choose`] wants them."""
    if packed is None or isinstance(packed, Tensor):
        return packed if packed is None else packed.t()
    return getattr(packed, "_make", tuple)(map(transpose, packed))


def _multiply(states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return _copy_to(out, multiply(states, weight))


def _multiply_few(states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return _copy_to(out, multiply_few(states, weight))


def _copy_to(out: Tensor | None, product: Tensor) -> Tensor:
    """Does what `out=` of `torch.mm` does; oneDNN writes to memory of its own."""
    return product if out is None else out.copy_(product)


def _add_multiply(other: Tensor, states: Tensor, weight: Tensor, beta: int = 1) -> Tensor:
    return multiply(states, weight).add_(other, alpha=beta)


def _add_multiply_few(other: Tensor, states: Tensor, weight: Tensor, beta: int = 1) -> Tensor:
    if beta == 1:
        return _add_pointwise(states, other, weight, None, "add")
    return multiply_few(states, weight).add_(other, alpha=beta)


def multiply_gated(states: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Callable) -> Tensor:
    """Runs a gated feed-forward layer, of three weights `(out, in)`, on `(..., W)`."""

    def run(rows: Tensor) -> Tensor:
        return multiply_few(activation(multiply_few(rows, gate)) * multiply_few(rows, up), down)

    return _in_blocks(run, states)


def _in_blocks(function: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Applies a function of rows to `(..., in)`, in blocks of few sizes."""
    rows = states.reshape(-1, states.shape[-1])
    sizes, rest = [], rows.shape[0]
    for size in _BLOCKS:
        sizes += [size] * (rest // size)
        rest %= size
    blocks = [function(block) for block in rows.split([*sizes, rest] if rest else sizes)]
    return torch.cat(blocks).view(*states.shape[:-1], -1)


def absorb(queries: Tensor, outputs: Tensor, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Multiplies the weights of `L` cross attentions by the keys and values of all that one row reads.

    Args:
        queries, outputs: `(L, H*D, W)`; queries with the factor of scores.
        latents: `(P, L, 2, K, H_kv, D)`, keys and values of the patches that it reads; `T = P * K`.
    Returns:
        for each cross attention `(W, H*T)` and `(H*T, W)`: `softmax(states @ one, over T) @ other` is what it reads.
    """
    layers, width, size = queries.shape[0], queries.shape[2], latents.shape[-1]
    keys, values = latents.permute(2, 1, 4, 0, 3, 5).flatten(3, 4).flatten(1, 2).unbind()  # (L*H_kv, T, D) each
    if (groups := queries.shape[1] // size // latents.shape[4]) > 1:
        keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    queries, outputs = queries.view(-1, size, width), outputs.view(-1, size, width)
    keys, values = torch.bmm(keys, queries).view(layers, -1, width), torch.bmm(values, outputs).view(layers, -1, width)
    return list(zip(keys.transpose(1, 2).unbind(), values.unbind()))


class HeldPatch:
    """The cross attentions of a `PackedStack` for bytes of one row that read the same patch: two small products each.

    Their weights are multiplied by the latents once, not by each state.

    Args:
        cross_layers: packed weights of each cross attention: of queries `(W, H*D)`, of the output `(H*D, W)`.
        like: one of their modules.

    Attributes:
        cross_layers: the same weights, in one piece for [`absorb`]; queries with the factor of scores.
        pairs: what [`absorb`] makes of the patch. Empty: the next byte tells which; None: each byte reads its own.
    """

    def __init__(self, cross_layers: tuple, like: nn.Module):
        queries, outputs, _ = zip(*cross_layers)
        self._queries = torch.stack([query.t() for query in queries]).mul_(like.scaling)
        self._outputs = torch.stack(outputs)
        self._sizes = like.num_latents, -1, like.head_dim
        self._heads = self._queries.shape[1] // like.head_dim
        self.cross_layers = tuple((query.t(), output, None) for query, output in zip(self._queries, self._outputs))
        self.pairs: list[tuple[Tensor, Tensor]] | None = None

    def hold(self, holds: bool) -> None:
        """Says whether the steps of one byte from now on read the patch that the first of them reads."""
        self.pairs = [] if holds else None

    def take(self, latents: Tensor) -> None:
        """Takes the keys and values `(1, P, L, 2, K*H_kv*D)` that the first of these bytes reads."""
        self.pairs += absorb(self._queries, self._outputs, latents[0].unflatten(-1, self._sizes))

    def attend(self, number: int, states: Tensor, normed: Tensor) -> Tensor:
        """Adds twice the queries `(1, W)` and what they read, in the cross attention of that number."""
        keys, values = self.pairs[number]
        weights = torch.mm(normed, keys).view(self._heads, -1).softmax(dim=-1).view(1, -1)
        return torch.addmm(states, weights, values, beta=2)


def can_multiply(states: Tensor, *linears: nn.Module) -> bool:
    """Tells whether oneDNN should multiply `(..., in)`, and does all that calling these linear layers would do."""
    if states.shape[-2] < _LEAST_ROWS or not _may_multiply(states, _BLOCKS[0]):
        return False
    return nn.Linear.forward is _call_linear and all(
        type(linear) is nn.Linear and _is_plain(linear) for linear in linears
    )


def can_multiply_large(states: Tensor, module: nn.Module) -> bool:
    """Tells the same of a module that does nothing but multiply by a large weight, for however many rows."""
    rows = states.numel() // states.shape[-1]
    if rows * module.weight.numel() < LEAST_WORK:
        return False
    return _may_multiply(states, 1 if rows == 1 else 16) and _is_plain(module)


def _may_multiply(states: Tensor, num_rows: int) -> bool:
    if torch.is_grad_enabled() or not prefers_onednn(num_rows):
        return False
    if type(states) is not Tensor or states.dtype != torch.float32 or states.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return not (_is_watched() or _global_forward_hooks or _global_forward_pre_hooks)


def _is_plain(linear: nn.Module) -> bool:
    if "forward" in vars(linear):
        return False
    weight, has_hooks = linear.weight, linear._forward_hooks or linear._forward_pre_hooks
    is_here = type(weight) is nn.Parameter and (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    return is_here and getattr(linear, "bias", None) is None and not has_hooks


__all__ = [
    "HeldPatch",
    "absorb",
    "can_multiply",
    "can_multiply_large",
    "choose",
    "least_rows",
    "multiply",
    "multiply_gated",
    "prefers_onednn",
    "transpose",
]
