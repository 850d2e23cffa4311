"""Attention over bytes and patches: spans of keys for self-attention, and the two linear cross attentions.

Dimension letters: `B` rows, `S` queries, `T` keys, `P` patches, `K` latents a patch, `H` heads, `D` head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache_blt import SlotIndex
from .names_blt import is_exporting, kept_arange, sliding_windows, take_columns


_Mask = object  # a Tensor, a `BlockMask` of flex attention, or None
_FEW_PATCHES = 8  # so many read their bytes under a mask `(P, T)` where no gradients are recorded


def reads_under_mask(num_patches: int) -> bool:
    """Tells whether so few new patches read their bytes under a mask: more arithmetic by fewer operations."""
    return num_patches == 1 or (num_patches <= _FEW_PATCHES and not torch.is_grad_enabled())


class AttentionSpan:
    """Says which keys each query sees, for every self-attention of one stack in one forward.

    Keys are `[past | chunk]` along the sequence; query `i` of the chunk sees the keys of one interval that ends at
    itself. A window bounds the interval's length; `first_key` bounds its start where rows are ragged or documents
    begin. One byte and plain causality need no mask at all. A long window attention runs block by block: `window +
    block` keys for each block of queries.

    Args:
        num_past: keys before the chunk that the cache gives back.
        num_queries: `S`.
        window: keys a query sees at most, itself included; None: no limit.
        first_key: int64 `(B, S)`, index into `[past | chunk]` of the first key that a query may see. None: 0.
        implementation: name in transformers' attention interface.
        in_one_piece: never attend block by block, so that weights `(B, H, S, T)` can be returned.
        slot_index: where keys and values are kept, for the cache; None: nowhere.
    """

    def __init__(
        self, num_past: int, num_queries: int, window: int | None, first_key: Tensor | None, implementation: str,
        in_one_piece: bool = False, slot_index: SlotIndex | None = None,
    ):  # fmt: skip
        if implementation == "flex_attention" and is_exporting():
            raise ValueError(
                "`attn_implementation='flex_attention'` cannot be exported; accepted are 'sdpa' and 'eager'. Call "
                "`model.set_attn_implementation('sdpa')` before."
            )
        self.num_past, self.num_queries, self.window = num_past, num_queries, window
        self.first_key, self.slot_index = first_key, slot_index
        self.implementation = implementation
        self.block = 0
        # An exported program has no branch on its lengths.
        is_long = window is not None and (is_exporting() or num_queries > window)
        if is_long and not in_one_piece and implementation in ("eager", "sdpa"):
            self.block = min(max(window, 32), 128)
        self.masks: dict[tuple, object] = {}
        self.sees_all = False  # every query sees all keys
        self.rotations: dict[int, Tensor] = {}  # of packed stacks, which share a span
        self._head: AttentionSpan | None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> tuple:
        """Computes output `(B, S, H, D)`, and weights `(B, H, S, T)` (None but for `eager`).

        `query`: `(B, H, S, D)`; `key`, `value`: `(B, H_kv, T, D)`.
        """
        if self.block:
            return self._attend_in_blocks(module, query, key, value, dropout), None
        return self._call(module, query, key, value, self.mask(query), dropout)

    def _call(self, module, query, key, value, mask: _Mask, dropout: float) -> tuple[Tensor, Tensor | None]:
        if self.implementation == "sdpa" and module.num_key_value_groups == 1:
            # A conditional gives torch.compile a bool where a comparison of dynamic shapes would not.
            is_causal = True if mask is None and query.shape[2] > 1 else False  # noqa: SIM210
            output = nn.functional.scaled_dot_product_attention(
                query, key, value, mask, dropout, is_causal, scale=module.scaling
            )
            return output.transpose(1, 2), None
        interface = eager_attention_forward
        if self.implementation != "eager":
            interface = ALL_ATTENTION_FUNCTIONS[self.implementation]
        return interface(module, query, key, value, mask, dropout=dropout, scaling=module.scaling)

    def mask(self, query: Tensor, build: Callable[[torch.device], _Mask] | None = None) -> _Mask:
        """Returns an `attention_mask` of the attention interface, built once a forward and shared by all layers.

        `build`: makes a bool mask of hidden keys, or one of flex attention; None: the mask of attention in one piece.
        """
        # Stacks that share a span may differ in dtype and device.
        key = None if build is None else build.__name__, query.dtype, query.device
        if key not in self.masks:
            mask = None if self.sees_all else (build or self._build_mask)(query.device)
            if isinstance(mask, Tensor) and self.implementation in ("eager", "sdpa"):
                # From a bool mask, sdpa would make floats in every layer, and keep them for its backward.
                mask = (mask * torch.finfo(torch.float32).min).to(query.dtype)
            elif isinstance(mask, Tensor):
                mask = ~mask
            self.masks[key] = mask
        return self.masks[key]

    def _build_mask(self, device: torch.device) -> _Mask:
        num_keys = self.num_past + self.num_queries
        window_bounds = self.window is not None and (is_exporting() or num_keys > self.window)
        if self.first_key is None and self.implementation != "flex_attention":
            if self.num_queries == 1 and not window_bounds:
                return None
            if self.num_past == 0 and not window_bounds and self.implementation != "eager":
                return None  # the interface applies plain causality by itself
        window = self.window if self.window is not None else num_keys
        if self.implementation == "flex_attention":
            return self._build_block_mask(device, num_keys, window)
        keys = torch.arange(num_keys, device=device)
        queries = torch.arange(self.num_past, num_keys, device=device)[:, None]
        hidden = (keys > queries) | (keys <= queries - window)  # (S, T) or (B, S, T)
        if self.first_key is not None:
            hidden = hidden | (keys < self.first_key[:, :, None])
        return hidden[None, None] if hidden.dim() == 2 else hidden[:, None]

    def _build_block_mask(self, device: torch.device, num_keys: int, window: int) -> _Mask:
        from torch.nn.attention.flex_attention import create_block_mask

        num_past, first_key = self.num_past, self.first_key

        def visible(row, head, query_index, key_index):
            position = query_index + num_past
            seen = (key_index <= position) & (key_index > position - window)
            if first_key is not None:
                seen = seen & (key_index >= first_key[row, query_index])
            return seen

        rows = None if first_key is None else first_key.shape[0]
        return create_block_mask(visible, rows, None, self.num_queries, num_keys, device=device)

    def _attend_in_blocks(self, module, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attends from each block of queries, as a row of a larger batch, to its keys and the `window - 1` before them."""
        block, history = self.block, self.window - 1
        if self.first_key is not None:
            mask = self.mask(query, self._build_blocks_mask)
            return self._run_blocks(module, query, key, value, max(history - self.num_past, 0), mask, dropout)
        # All blocks with a whole history share one small mask; the queries before them are few enough for one piece.
        num_head = min(-(-max(history - self.num_past, 0) // block) * block, self.num_queries)
        outputs = []
        if num_head:
            if self._head is None:
                self._head = AttentionSpan(
                    self.num_past, num_head, self.window, None, self.implementation, in_one_piece=True
                )
            stop = self.num_past + num_head
            head, _ = self._head.attend(module, query[:, :, :num_head], key[:, :, :stop], value[:, :, :stop], dropout)
            outputs.append(head)
        if num_head < self.num_queries:
            start = self.num_past + num_head - history
            mask = self.mask(query, self._build_interior_mask)
            tail = query[:, :, num_head:], key[:, :, start:], value[:, :, start:]
            outputs.append(self._run_blocks(module, *tail, 0, mask, dropout))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _run_blocks(self, module, query, key, value, missing: int, mask, dropout) -> Tensor:
        """Attends from queries `(B, H, S, D)` to keys that begin `window - 1` before, `missing` of which do not exist."""
        rows, heads, length, size = query.shape
        block, history = self.block, self.window - 1
        num_blocks = self._count_blocks(length)
        tail = num_blocks * block - length
        query = nn.functional.pad(query, (0, 0, 0, tail)).unflatten(2, (num_blocks, block)).transpose(1, 2)
        extra = max(key.shape[2] + missing - history - length, 0)  # keys of the past beyond the window
        key, value = (nn.functional.pad(states[:, :, extra:], (0, 0, missing, tail)) for states in (key, value))
        key, value = (sliding_windows(states, 2, history + block, block) for states in (key, value))
        key, value = (states.permute(0, 2, 1, 4, 3) for states in (key, value))
        query, key, value = (_merge_rows(states) for states in (query, key, value))
        output, _ = self._call(module, query, key, value, mask, dropout)
        return take_columns(output.reshape(rows, num_blocks * block, heads, size), 0, length)

    def _count_blocks(self, length: int) -> int:
        """Counts blocks of queries: two or more in an exported program, as torch makes a size of 1 a case of its own."""
        num_blocks = (length + self.block - 1) // self.block  # ONNX divides negative numbers otherwise
        return torch.sym_max(num_blocks, 2) if is_exporting() else num_blocks

    def _build_interior_mask(self, device: torch.device) -> Tensor:
        """Builds the mask of a block over its keys, `(1, 1, block, window - 1 + block)`."""
        keys = torch.arange(self.window - 1 + self.block, device=device)
        queries = torch.arange(self.block, device=device)[:, None]
        return ((keys < queries) | (keys >= queries + self.window))[None, None]

    def _build_blocks_mask(self, device: torch.device) -> Tensor:
        """Builds the masks of all blocks of all rows, where `first_key` hides more, `(B*blocks, 1, block, keys)`."""
        rows, block, history = self.first_key.shape[0], self.block, self.window - 1
        num_blocks = self._count_blocks(self.num_queries)
        keys = torch.arange(history + block, device=device)
        # Index into `[past | chunk]` of a block's first key; negative where that key is padding.
        offset = self.num_past - history + torch.arange(num_blocks, device=device) * block
        tail = num_blocks * block - self.num_queries
        # Queries of the padding see themselves, so that no softmax is empty.
        first_key = nn.functional.pad(self.first_key.clamp_min(0), (0, tail)).view(rows, num_blocks, block, 1)
        hidden = self._build_interior_mask(device)[0] | (keys < first_key - offset[:, None, None])
        return _merge_rows(hidden)[:, None]


def _merge_rows(states: Tensor) -> Tensor:
    """Flattens `(B, N, ...)` to `(B * N, ...)`.

    A program of one row may not ask how its dynamic `N` divides 1, as flattening does, or strides, as attention does.
    """
    if not (is_exporting() and states.shape[0] == 1):
        return states.flatten(0, 1)
    return states.squeeze(0).contiguous()


class SlotSpan(AttentionSpan):
    """Says which slots each query sees: slot `s` holds the newest position that is `s` modulo the number of slots.

    Args:
        num_slots: slots to read. For a query at `q`, slot `s` is taken to hold the largest `p <= q` with
            `p % num_slots == s`. If it holds something else, `p` lies outside the window or is negative: hidden anyway.
        query_positions: int64 `(B, S)`.
        window: positions that a query sees, itself included; None: no limit.
        start: int64 `(B, S)`, first position that it may see. None: 0.
        implementation, slot_index: as in [`AttentionSpan`].
    """

    def __init__(
        self, num_slots: int, query_positions: Tensor, window: int | None, start: Tensor | None, implementation: str,
        slot_index: SlotIndex | None = None,
    ):  # fmt: skip
        super().__init__(0, query_positions.shape[1], window, None, implementation, True, slot_index)
        self.num_slots, self.query_positions, self.start = num_slots, query_positions, start

    def _build_mask(self, device: torch.device) -> _Mask:
        queries = self.query_positions.to(device)
        oldest = queries if self.start is None else queries - self.start.to(device)
        oldest = oldest if self.window is None else oldest.clamp_max(self.window - 1)
        num_slots = self.num_slots
        if self.implementation != "flex_attention":
            age = (queries[..., None] - kept_arange(0, num_slots, device)) % num_slots
            return (age > oldest[..., None])[:, None]
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(row, head, query, key):
            return (queries[row, query] - key) % num_slots <= oldest[row, query]

        return create_block_mask(visible, queries.shape[0], None, queries.shape[1], num_slots, device=device)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, segment: Tensor, scaling: float) -> Tensor:
    """Attends from the queries of each patch to its own keys: a softmax over each patch's bytes.

    Linear in bytes: scores exist for the pairs (byte, its patch's `K` queries) alone, but where there are few patches.

    Args:
        query: `(B, P, K, H, D)`.
        key, value: `(B, T, H, D)`, key/value heads already repeated to `H`.
        segment: int64 `(B, T)`, patch that reads each byte; outside of `[0, P)`: none does.
        scaling: factor of the scores.
    Returns:
        `(B, P, K, H, D)`; 0 for a patch that reads no byte.
    """
    rows, num_patches, latents, heads, size = query.shape
    if reads_under_mask(num_patches):  # each patch is a row of its own, which sees all bytes under a mask
        hidden = hidden_bytes(segment, num_patches)
        mask = (hidden * torch.finfo(torch.float32).min).to(query.dtype).flatten(0, 1)[:, None, None]
        key, value = (
            states[:, None].expand(-1, num_patches, -1, -1, -1).flatten(0, 1).transpose(1, 2)
            for states in (key, value)
        )
        output = nn.functional.scaled_dot_product_attention(
            query.flatten(0, 1).transpose(1, 2), key, value, mask, scale=scaling
        )
        return output.transpose(1, 2).reshape(query.shape).masked_fill(hidden.all(dim=2)[..., None, None, None], 0)
    is_read = (segment >= 0) & (segment < num_patches)
    segment = segment.clamp(0, num_patches - 1)
    flat = (segment + torch.arange(rows, device=segment.device)[:, None] * num_patches).flatten()  # (B*T,)
    queries_of_bytes = query.flatten(0, 1).index_select(0, flat)  # (B*T, K, H, D)
    scores = (queries_of_bytes * key.flatten(0, 1)[:, None]).sum(dim=-1).float() * scaling  # (B*T, K, H)
    scores = scores.masked_fill(~is_read.flatten()[:, None, None], float("-inf"))
    index = flat[:, None, None].expand_as(scores)
    peak = scores.new_full((rows * num_patches, latents, heads), float("-inf"))
    peak = peak.scatter_reduce(0, index, scores.detach(), "amax", include_self=True)
    peak = peak.clamp_min(torch.finfo(peak.dtype).min)  # a patch without bytes would give inf - inf
    weights = (scores - peak.index_select(0, flat)).exp()
    total = torch.zeros_like(peak).index_add(0, flat, weights)
    weights = weights / total.index_select(0, flat).clamp_min(torch.finfo(total.dtype).tiny)
    mixed = weights.to(value.dtype)[..., None] * value.flatten(0, 1)[:, None]  # (B*T, K, H, D)
    output = mixed.new_zeros(rows * num_patches, latents, heads, size).index_add(0, flat, mixed)
    return output.view(rows, num_patches, latents, heads, size)


def hidden_bytes(segment: Tensor, num_patches: int) -> Tensor:
    """Finds the bytes that each of `P` patches does not hold, bool `(B, P, T)`; `segment` `(B, T)`: patch of each byte."""
    return segment[:, None] != kept_arange(0, num_patches, segment.device)[:, None]


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, hidden: Tensor | None, scaling: float
) -> Tensor:
    """Attends from each byte to the latents of a few patches.

    Args:
        query: `(B, S, H, D)`.
        key, value: `(B, P, K, H_kv, D)`.
        index: int64 `(B, S, W)`, patches in `[0, P)` that each byte reads.
        hidden: bool `(B, S, W)`, True where the byte does not read the patch after all. None: all are read.
        scaling: factor of the scores.
    Returns:
        `(B, S, H, D)`.
    """
    rows, length, window = index.shape
    num_patches, latents, kv_heads, size = key.shape[1:]
    flat = (index + torch.arange(rows, device=index.device)[:, None, None] * num_patches).flatten()
    key, value = (
        states.flatten(0, 1).flatten(1).index_select(0, flat).view(rows, length, window * latents, kv_heads, size)
        for states in (key, value)
    )
    hidden = None if hidden is None else hidden.repeat_interleave(latents, dim=-1)
    grouped = query.unflatten(2, (1, kv_heads, query.shape[2] // kv_heads))
    scores = (grouped * key[..., None, :]).sum(dim=-1).float() * scaling  # (B, S, N, H_kv, H/H_kv)
    if hidden is not None:
        scores = scores.masked_fill(hidden[..., None, None], float("-inf"))
    weights = scores.softmax(dim=2).to(value.dtype)
    return (weights[..., None] * value[..., None, :]).sum(dim=2).flatten(2, 3)
