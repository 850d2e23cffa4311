"""Patch lengths of whole texts from their ids or entropies, without a model."""

import torch
from torch import Tensor

from ..model.patching_blt import PatchingRule, RowLayout, find_patch_ends, patch_lengths_from_ends


def compute_patch_lengths(
    rule: PatchingRule,
    input_ids: Tensor | None = None,
    entropies: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Computes patch lengths of whole texts, one a row.

    Args:
        rule: the patching rule.
        input_ids: int64 `(B, S)`; needed if the rule reads ids.
        entropies: `(B, S)` nats; needed if it reads entropies.
        attention_mask: `(B, S)`, 0 where there is no text; any padding side. None: no padding.
    Returns:
        int64 `(B, P)` as [`patch_lengths_from_ends`] describes it.
    Raises:
        ValueError: the tensor that the rule reads is missing.
    """
    for name, given, is_read in (
        ("input_ids", input_ids, rule.uses_ids),
        ("entropies", entropies, rule.uses_entropies),
    ):
        if is_read and given is None:
            raise ValueError(f"patching mode {rule.mode!r} needs `{name}`; got None.")
    if input_ids is None and entropies is None:
        raise ValueError(f"patching mode {rule.mode!r} needs `input_ids` (or `entropies`) for the shape; got neither.")
    shape_of = input_ids if input_ids is not None else entropies
    num_bytes = None
    if attention_mask is not None:
        layout = RowLayout.from_mask(attention_mask)
        num_bytes = layout.num_bytes
        input_ids = None if input_ids is None else layout.pack(input_ids)
        entropies = None if entropies is None else layout.pack(entropies)
    positions = torch.arange(shape_of.shape[1], device=shape_of.device).expand(shape_of.shape)
    ends = find_patch_ends(rule, input_ids, entropies, positions)
    return patch_lengths_from_ends(ends, num_bytes)


__all__ = ["compute_patch_lengths"]
