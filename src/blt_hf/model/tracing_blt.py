"""What differs while `torch.compile` or `torch.export` records a forward: neither values nor lengths are known there.

A compiled forward may be recorded anew for other lengths; an exported one serves all of them, so it has no branch on a
length. Both have a symbol for the number of patches, which only the entropies tell.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting  # the second is true for torch.export and torch.onnx alone


def largest_count(counts: Tensor, least: int) -> int:
    """The largest of `counts` `(B,)` on the host, and not less than `least`; a symbol of that range where values are
    not known."""
    largest = counts.max().clamp_min(least).item()
    if is_compiling():
        torch._check(largest >= least)
    return largest


def sliding_windows(values: Tensor, dim: int, size: int, step: int = 1) -> Tensor:
    """`values.unfold(dim, size, step)`, which asks for the number of windows, and which ONNX does not have."""
    if not is_exporting():
        return values.unfold(dim, size, step)
    count = (values.shape[dim] - size) // step + 1
    first = torch.arange(count, device=values.device)[:, None] * step
    index = first + torch.arange(size, device=values.device)
    return values.index_select(dim, index.flatten()).unflatten(dim, (count, size)).movedim(dim + 1, -1)


def running_max(values: Tensor, least: Tensor) -> Tensor:
    """Running maximum along the rows of `values` `(B, S)`, which ONNX does not have.

    Args:
        values: int64; not below `least`, and not falling where they are above it.
        least: int64 `(B,)`.
    """
    if not is_exporting():
        return values.cummax(dim=1).values
    rises = values > least[:, None]
    entry = rises.long().cumsum(dim=1)
    risen = torch.cat([least[:, None], values], dim=1).scatter(1, torch.where(rises, entry, 0), values)
    return risen.gather(1, entry)


def take_columns(values: Tensor, start: int, stop: int) -> Tensor:
    """`values[:, start:stop]` of `(B, S, ...)`; a slice asks whether it is the whole, or a single column."""
    if not is_exporting():
        return values[:, start:stop]
    return values.index_select(1, torch.arange(start, stop, device=values.device))


__all__ = [
    "is_compiling",
    "is_exporting",
    "largest_count",
    "running_max",
    "sliding_windows",
    "take_columns",
]
