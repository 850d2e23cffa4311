"""Drafts of a window, with what hangs on positions made once for all of them; the cache counts none of them.

A checkpoint's own code drafts byte by byte through its cache, by the same stages and to the same numbers.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .model.attention_blt import SlotSpan
from .model.cache_blt import BltCache
from .model.chunk_blt import assign_patches, next_bytes
from .model.forward_blt import ForwardInputs, ForwardSettings, predict_bytes, read_bytes


def draft_ahead(
    model, settings: ForwardSettings, cache: BltCache, packed, head: nn.Module | None, ids: Tensor, count: int, choose
) -> list[tuple]:
    """Writes drafts as [`StepRunner.draft`] does, in rows that hold one document each.

    Args:
        model: a [`BltModel`].
        cache: has room for the drafts.
        packed: a [`PackedStacks`] of the model; None: the modules run.
        head: computes logits; None: `choose` gets states.
        ids, count, choose: as there.
    """
    is_end = torch.zeros_like(ids, dtype=torch.bool)
    patches = assign_patches(next_bytes(ids, None, cache, settings.documents), is_end, settings.documents)
    whole = next_bytes(ids.expand(-1, count), None, cache, settings.documents)
    whole.packed = packed
    span = whole.span(cache, settings.local_window, settings.attention)
    (key,), inputs = whole.spans, ForwardInputs(is_draft=True, patches=patches)
    like, encoder = model.local_encoder.embed_tokens.weight, None if packed is None else packed.encoder
    history, found = whole.history, []
    for step, one in enumerate(split_span(span, like, encoder)):
        chunk = replace(whole, input_ids=ids, history=history, row_positions=one.query_positions, spans={key: one})
        read = read_bytes(model, settings, chunk, cache, inputs)
        found.append(choose(predict_bytes(model, settings, cache, read, None, head, inputs), step))
        history, ids = torch.cat([history, ids], dim=1)[:, 1:], found[-1][0]
    return found


def split_span(span: SlotSpan, like: Tensor, packed=None) -> list[SlotSpan]:
    """Makes the span of each query alone; masks, and rotations of a `packed` stack, are made for all of them at once.

    `like`: of the dtype and device of queries.
    """
    positions, implementation = span.query_positions, span.implementation
    indices = span.slot_index.index.view(positions.shape).unbind(1)
    parts = [
        SlotSpan(span.num_slots, one, span.window, None, implementation, replace(span.slot_index, index=index))
        for one, index in zip(positions.split(1, dim=1), indices)
    ]
    mask = span.whole_mask(like)
    if isinstance(mask, Tensor):  # not one of flex attention
        for part, own in zip(parts, mask.split(1, dim=2)):
            part.keep_mask(own, like)
    if packed is not None:
        rotation = packed.make_rotation(positions, like)
        by_column = (
            rotation.unflatten(0, positions.shape).unbind(1) if rotation.is_complex() else rotation.split(1, dim=2)
        )
        for part, own in zip(parts, by_column):
            part.rotations[packed.rotation_key] = own
    return parts


__all__ = ["draft_ahead", "split_span"]
