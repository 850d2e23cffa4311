"""Fast BLT (BLT-D, arXiv 2605.08044): the local decoder learns to fill in a block of masked bytes at once.

Training reads two streams. The clean one is the text, as always. The corrupted one has a block for each patch: the `K`
bytes from where the patch starts, some of them masked. The decoder reads both in one sequence, `[bytes | blocks]`:

    starts as        a clean byte: its encoder state. A masked byte: one learned vector, the mask embedding. A byte of a
                     block that is not masked: its byte embedding alone, for its encoder state and its hashes have seen
                     the bytes before it, which may be masked.
    latents          every byte of a block reads those that the last byte before the block reads: the last patch that
                     is complete there.
    self-attention   a byte of a block sees the whole block, before and behind it, and the clean bytes before the block
                     as far back as the window of its own position reaches, but no other block. Clean bytes see no
                     block, so the clean stream does not depend on the other.
    predicts         the next byte, in both streams: the state in front of a masked byte predicts it. So all states keep
                     their meaning in the plain model, and fine-tuning one takes far fewer steps.

Blocks whose starts lie in the same stretch of text become a row of a batch, with the keys of that stretch and of the
window before it, so the cost is linear in bytes.

Dimension letters: `B` rows, `S` bytes, `N` blocks of a row, `K` bytes of a block, `W` width, `H` heads, `D` head size;
in the attention `R` rows of `M` blocks, and `T` keys of clean bytes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model.attention_blt import AttentionSpan
from ..model.chunk_blt import ByteChunk
from ..model.layers_blt import LatentIndex
from ..model.names_blt import is_compiling, largest_count
from ..model.patching_blt import IGNORED_LABEL


MIN_MASK_PROBABILITY = 1e-3
"""Of a block; the loss of a masked byte is divided by it."""
_STRETCH = 64  # bytes of text whose blocks may share their keys
_ROW_QUERIES = 128  # bytes of blocks that do


@dataclass
class BlockNoise:
    """Asks a forward to read corrupted blocks beside the text.

    Attributes:
        labels: int64 `(B, S)`, the byte that each position should be; -100: it is not learned.
        block_size: `K`.
        mask_embedding: `(W,)`, from which the decoder starts at a masked byte.
        generator: draws the noise; None: torch's own generator.
    """

    labels: Tensor
    block_size: int
    mask_embedding: Tensor
    generator: torch.Generator | None = None

    def corrupt(self, chunk: ByteChunk, ends: Tensor) -> "CorruptedBlocks":
        """Makes the blocks of a text whose patches end at `ends` `(B, S)`, and masks some of the bytes."""
        labels = chunk.pack(self.labels)
        if chunk.is_text is not None:
            labels = labels.masked_fill(~chunk.is_text, IGNORED_LABEL)
        starts = find_block_starts(chunk, ends, labels, self.block_size)
        is_block, starts = starts >= 0, starts.clamp_min(0)
        positions = starts[..., None] + torch.arange(self.block_size, device=starts.device)
        inside = positions.clamp_max(chunk.num_columns - 1).flatten(1)

        def at_positions(values: Tensor) -> Tensor:
            return values.gather(1, inside).view(positions.shape)

        exists = (positions < chunk.lengths[:, None, None]) & is_block[..., None]
        if chunk.document_start is not None:
            document = at_positions(chunk.document_start)
            exists = exists & (document == document[..., :1])
        probability, level = self.draw(*starts.shape, starts.device)
        return CorruptedBlocks(
            starts=starts,
            ids=at_positions(chunk.input_ids),
            labels=at_positions(labels).masked_fill(~exists, IGNORED_LABEL),
            exists=exists,
            is_masked=level < probability[..., None],
            probability=probability,
            mask_embedding=self.mask_embedding,
        )

    def draw(self, num_rows: int, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draws a mask probability for each block, uniform `(B, N)`, then a uniform number for each byte `(B, N, K)`."""
        shape = (num_rows, num_blocks)
        options: dict = {"device": device}
        if self.generator is not None:  # with `generator=None` torch takes no symbolic sizes
            options = {"device": self.generator.device, "generator": self.generator}
        probability = torch.rand(shape, **options)
        level = torch.rand((*shape, self.block_size), **options)
        return probability.clamp_min(MIN_MASK_PROBABILITY).to(device), level.to(device)


@dataclass
class CorruptedBlocks:
    """Holds the blocks of one forward, in the order of their starts; shorter rows end with empty blocks.

    Attributes:
        starts: int64 `(B, N)`, position in its row of each block's first byte (0 for an empty block).
        ids: int64 `(B, N, K)`, the bytes; anything where there is none.
        labels: int64 `(B, N, K)`, the bytes to predict; -100 where nothing is learned.
        exists: bool `(B, N, K)`, False past the end of the text, in another document, and in an empty block.
        is_masked: bool `(B, N, K)`.
        probability: `(B, N)`, chance with which the bytes of each block were masked.
        mask_embedding: `(W,)`, from which the decoder starts at a masked byte.
        states: `(B, N, K, W)`, decoder states that predict the bytes, once the decoder has run.
    """

    starts: Tensor
    ids: Tensor
    labels: Tensor
    exists: Tensor
    is_masked: Tensor
    probability: Tensor
    mask_embedding: Tensor
    states: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """int64 `(B, N, K)`, position of each byte in its row."""
        return self.starts[..., None] + torch.arange(self.ids.shape[-1], device=self.starts.device)

    def join(
        self, model, chunk: ByteChunk, byte_states: Tensor, latent_index: LatentIndex, wants_weights: bool
    ) -> tuple[Tensor, Tensor, LatentIndex, "TwoStreamSpan"]:
        """Joins both streams, `[bytes | blocks]`: the decoder's states, positions, latents and keys.

        Args:
            chunk: the clean bytes.
            byte_states: `(B, S, W)`, of the encoder.
            latent_index: patches whose latents each clean byte reads.
            wants_weights: the decoder returns attention weights.
        """
        size, config = self.ids.shape[-1], model.config
        embeds = model.local_encoder.embed_tokens(self.ids)
        embeds = torch.where(self.is_masked[..., None], self.mask_embedding, embeds).flatten(1, 2)
        before = (self.starts - 1).clamp_min(0).repeat_interleave(size, dim=1)[..., None]

        def with_blocks(values: Tensor) -> Tensor:
            return torch.cat([values, values.gather(1, before.expand(-1, -1, values.shape[-1]))], dim=1)

        latent_index = replace(
            latent_index,
            index=with_blocks(latent_index.index),
            hidden=None if latent_index.hidden is None else with_blocks(latent_index.hidden),
        )
        states = torch.cat([byte_states, embeds.to(byte_states.dtype)], dim=1)
        positions = torch.cat([chunk.row_positions, self.positions.flatten(1)], dim=1)
        span = TwoStreamSpan(
            self, chunk.document_start, chunk.num_columns, config.local_attention_window_len,
            config._attn_implementation, wants_weights,
        )  # fmt: skip
        return states, positions, latent_index, span

    def split_states(self, hidden_states: Tensor, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Splits states of `[bytes | blocks]` into those of the bytes and `states`, which predict the blocks.

        The clean byte before a block predicts its first byte; inside the block, each byte predicts the next.
        """
        clean, own = hidden_states[:, :num_bytes], hidden_states[:, num_bytes:].unflatten(1, self.ids.shape[1:])
        before = (self.starts - 1).clamp_min(0)[..., None].expand(-1, -1, clean.shape[-1])
        return clean, torch.cat([clean.gather(1, before)[:, :, None], own[:, :, :-1]], dim=2)


def make_noise(
    model, labels: Tensor | None, generator: torch.Generator | None, *, input_ids, past_key_values, use_cache
) -> BlockNoise:
    """Makes the noise of a forward of a [`BltForCausalLM`] with the masked loss.

    Raises:
        ValueError: these inputs allow no masked loss.
    """
    config = model.config
    if labels is None or config.diffusion_block_size is None:
        missing = "`labels`" if labels is None else "a model whose `diffusion_block_size` is set"
        raise ValueError(f"`noise_generator` draws the noise of the masked loss, which needs {missing}; got None.")
    for is_given, argument, remedy in (
        (input_ids is None, "input_ids=None", "pass the bytes that `inputs_embeds` hide"),
        (past_key_values is not None, "past_key_values=a cache", "pass whole texts and no cache"),
        (bool(use_cache), "use_cache=True", "leave it False"),
    ):
        if is_given:
            raise ValueError(
                f"the masked loss (`diffusion_block_size={config.diffusion_block_size}`) cannot be had with "
                f"`{argument}`: {remedy}, or train without it (`model.config.diffusion_loss_weight = 0`)."
            )
    return BlockNoise(labels, config.diffusion_block_size, model.mask_embedding.weight[0], generator)


def find_block_starts(chunk: ByteChunk, ends: Tensor, labels: Tensor, block_size: int) -> Tensor:
    """Finds where blocks start, int64 `(B, N)` with `N >= 1`, -1 on the right of rows that have fewer.

    A block starts with each patch, except a text's first one, which has nothing before it, and patches from which on no
    byte of the block is learned.

    Args:
        ends: bool `(B, S)`, last bytes of patches.
        labels: int64 `(B, S)`.
    """
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1) & (chunk.text_positions > 0)
    if chunk.is_text is not None:
        starts = starts & chunk.is_text
    learned = nn.functional.pad((labels != IGNORED_LABEL).long(), (1, block_size)).cumsum(dim=1)
    starts = starts & (learned[:, block_size:-1] > learned[:, : -block_size - 1])
    # A stable sort moves the starts of each row to its beginning.
    order = torch.argsort((~starts).to(torch.uint8), dim=1, stable=True)
    counts = starts.sum(dim=1)
    # A symbolic number of blocks is at least two, since torch treats a size of 1 as a case of its own.
    num_blocks = largest_count(counts, 2 if chunk.is_symbolic else 1)
    order = order.index_select(1, torch.arange(num_blocks, device=order.device).clamp_max(order.shape[1] - 1))
    return torch.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], order, -1)


class TwoStreamSpan(AttentionSpan):
    """Says which keys the decoder's self-attention over `[bytes | blocks]` sees.

    Args:
        blocks: the corrupted blocks.
        document_start: int64 `(B, S)`, position of the first byte that each clean byte may see; None: 0.
        num_queries, window, implementation, in_one_piece: as in [`AttentionSpan`], for the clean bytes.
    """

    def __init__(
        self,
        blocks: CorruptedBlocks,
        document_start: Tensor | None,
        num_queries: int,
        window: int | None,
        implementation: str,
        in_one_piece: bool = False,
    ):
        super().__init__(0, num_queries, window, document_start, implementation, in_one_piece)
        self.blocks, self.document_start = blocks, document_start
        self.history = (num_queries if window is None else min(window, num_queries)) - 1
        self._assign_rows()

    def _assign_rows(self) -> None:
        """Puts up to `M` blocks that start in one stretch of text into a row of the attention's batch.

        Sets `_slots`, int64 `(R, M)`, the block at each place among the `B * N` (-1: none); `_places`, int64 `(B, N)`,
        the place of each block among the `R * M`; and `_stretch`, int64 `(R,)`, each row's stretch among all of them.
        """
        starts, is_block = self.blocks.starts, self.blocks.exists[..., 0]
        num_rows, num_blocks, size = self.blocks.ids.shape
        width = max(_ROW_QUERIES // size, 1)  # `M`
        num_stretches = -(-self.num_queries // _STRETCH)
        # The number of each block among those of its stretch; empty blocks are in a stretch behind the last.
        stretch = torch.where(is_block, starts // _STRETCH, num_stretches)
        counts = starts.new_zeros(num_rows, num_stretches + 1).scatter_add_(1, stretch, torch.ones_like(stretch))
        before = counts.cumsum(dim=1) - counts  # blocks of earlier stretches; starts ascend
        rank = torch.arange(num_blocks, device=starts.device) - before.gather(1, stretch)
        # Each stretch takes as many rows as its blocks need; those of a stretch follow each other.
        needed = -(-counts[:, :-1] // width).flatten()
        last = needed.cumsum(dim=0)
        total = largest_count(last[-1:], 2 if is_compiling() else 1)
        stretch = (stretch + torch.arange(num_rows, device=starts.device)[:, None] * num_stretches).flatten()
        first = (last - needed).index_select(0, stretch.clamp_max(needed.shape[0] - 1)).view_as(rank)
        self._places = torch.where(is_block, (first + rank // width) * width + rank % width, 0)
        # The inverse: the block at each place. Empty blocks write to a place behind the last, which is cut off.
        slots = starts.new_full((total * width + 1,), -1)
        target = torch.where(is_block, self._places, total * width).flatten()
        slots.scatter_(0, target, torch.arange(num_rows * num_blocks, device=starts.device))
        self._slots = slots.narrow(0, 0, total * width).view(total, width)
        # A row belongs to the first stretch whose rows do not all stand before it.
        index = torch.arange(total, device=starts.device)
        self._stretch = torch.searchsorted(last, index, right=True).clamp_max(needed.shape[0] - 1)
        # Where the keys of each row stand in `(B * S)`; those before the text are hidden by the mask.
        row, stretch = self._stretch // num_stretches, self._stretch % num_stretches
        self._key_positions = (
            stretch[:, None] * _STRETCH - self.history + torch.arange(self.history + _STRETCH, device=starts.device)
        )
        inside = self._key_positions.clamp(0, self.num_queries - 1)
        self._key_index = (inside + row[:, None] * self.num_queries).flatten()
        self._row_of = row

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0):
        """Attends to `(B, S + N*K, H, D)`; weights are those of the clean bytes."""
        clean = (states[:, :, : self.num_queries] for states in (query, key, value))
        output, weights = super().attend(module, *clean, dropout)
        return torch.cat([output, self._attend_blocks(module, query, key, value, dropout)], dim=1), weights

    def _attend_blocks(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attends from rows of blocks to the keys of the window, of the stretch and of the row's blocks."""
        own = tuple(self._to_rows(states[:, :, self.num_queries :]) for states in (query, key, value))
        key, value = (
            torch.cat([self._before(states[:, :, : self.num_queries]), mine], dim=2)
            for states, mine in zip((key, value), own[1:])
        )
        mask = self.mask(query, self._build_two_stream_mask)
        output, _ = self._call(module, own[0], key, value, mask, dropout)
        size = self.blocks.ids.shape[-1]
        output = output.reshape(-1, size, *output.shape[2:])  # (R*M, K, H, D)
        return output.index_select(0, self._places.flatten()).view(query.shape[0], -1, *output.shape[2:])

    def _to_rows(self, states: Tensor) -> Tensor:
        """Moves blocks `(B, H, N*K, D)` to their rows `(R, H, M*K, D)`."""
        states = states.unflatten(2, self.blocks.ids.shape[1:]).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*N, K, H, D)
        states = states.index_select(0, self._slots.clamp_min(0).flatten())
        return states.unflatten(0, self._slots.shape).flatten(1, 2).transpose(1, 2)

    def _before(self, states: Tensor) -> Tensor:
        """Takes the clean bytes of `(B, H, S, D)` that the blocks of each row may see, `(R, H, T, D)`."""
        states = states.transpose(1, 2).flatten(0, 1).index_select(0, self._key_index)
        return states.unflatten(0, self._key_positions.shape).transpose(1, 2)

    def _visible_keys(self) -> Tensor:
        """Says which keys each query of each row sees, bool `(R, M*K, T + M*K)`."""
        blocks, slots = self.blocks, self._slots
        device, (_, width), size = slots.device, slots.shape, blocks.ids.shape[-1]
        index = slots.clamp_min(0)
        starts = blocks.starts.flatten()[index]  # (R, M)
        exists = blocks.exists.flatten(0, 1)[index] & (slots >= 0)[..., None]  # (R, M, K)
        first = torch.zeros_like(starts)
        if self.document_start is not None:
            first = self.document_start[self._row_of[:, None], starts]
        window = self.window if self.window is not None else self.num_queries + size
        position = starts[..., None] + torch.arange(size, device=device)
        key = self._key_positions[:, None, None]  # (R, 1, 1, T)
        sees_clean = (key < starts[..., None, None]) & (key > position[..., None] - window)
        sees_clean = sees_clean & (key >= first[..., None, None]) & exists[..., None]
        same_block = torch.eye(width, dtype=torch.bool, device=device)[:, None, :, None]
        # A place without a byte sees itself, so that no softmax is empty.
        itself = same_block & torch.eye(size, dtype=torch.bool, device=device)[None, :, None, :]
        sees_own = (same_block & exists[:, None, None] & exists[..., None, None]) | itself
        return torch.cat([sees_clean, sees_own.flatten(-2)], dim=-1).flatten(1, 2)

    def _build_two_stream_mask(self, device: torch.device):
        """Builds what is hidden for the attention interface, `(R, 1, M*K, T + M*K)`."""
        visible = self._visible_keys()
        if self.implementation != "flex_attention":
            return ~visible[:, None]
        from torch.nn.attention.flex_attention import create_block_mask

        def is_visible(row, head, query_index, key_index):
            return visible[row, query_index, key_index]

        return create_block_mask(is_visible, visible.shape[0], None, *visible.shape[1:], device=device)


def masked_loss(blocks: CorruptedBlocks, head: nn.Module, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Computes the cross-entropy of masked bytes, each divided by the mask probability of its block.

    The sum over blocks is divided as the next-byte loss is: by `num_items_in_batch`, or by the positions whose next byte
    is learned. So a byte counts once for each block that covers it (`K` / mean patch length times).

    Args:
        blocks: with their `states`.
        head: the model's head over bytes.
        labels: int64 `(B, S)` as the caller gave them.
    """
    is_learned = blocks.is_masked & (blocks.labels != IGNORED_LABEL)
    index = is_learned.flatten().nonzero()[:, 0]

    def learned(values: Tensor) -> Tensor:
        return values.flatten(0, 2).index_select(0, index)

    logits = head(learned(blocks.states)).float()
    nats = nn.functional.cross_entropy(logits, learned(blocks.labels), reduction="none")
    weights = learned((1 / blocks.probability)[..., None].expand(is_learned.shape))
    if num_items_in_batch is None:
        num_items_in_batch = (labels[:, 1:] != IGNORED_LABEL).sum().clamp_min(1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(nats.device)
    return (nats * weights).sum() / num_items_in_batch


__all__ = [
    "MIN_MASK_PROBABILITY",
    "BlockNoise",
    "CorruptedBlocks",
    "TwoStreamSpan",
    "find_block_starts",
    "make_noise",
    "masked_loss",
]
