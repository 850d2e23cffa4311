"""A forward over ragged rows, for serving engines that keep keys and values themselves.

The bytes of all texts stand in one row of `T`, one text after the other. The engine brings the attention over what it
has kept, and a page of memory for each text; layers, patching rules and hashes are the model's own.
`tests/serving/test_ragged.py` holds the result to the model's forward.

Dimension letters: `R` texts, `T` bytes of all texts, `P` patches that end in this forward, `H` heads, `D` head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..model.configuration_blt import BltConfig
from ..model.layers_blt import ngram_hashes
from ..model.modeling_blt import BltModel
from ..model.patching_blt import PatchingRule, entropy_from_logits, find_patch_ends
from .row_layers import RowCrossAttention, RowKernels, RowStack


_DEFAULT_OPEN_BYTES = 512  # of a model whose attention over bytes has no window


def largest_patch(config: BltConfig) -> int:
    """Bounds the bytes of a patch that an engine has to remember: `max_patch_length`, or the window of the local models.

    Longer patches are split there, as if `max_patch_length` said so.
    """
    window = config.local_attention_window_len or _DEFAULT_OPEN_BYTES
    if config.patching_mode == "byte":
        return 1
    if config.patching_mode == "static":
        window = int(config.patch_size)
    return min(window, config.max_patch_length or window)


def bytes_per_patch(config: BltConfig) -> int:
    """Bounds the mean bytes of a patch from below, for any text: 1 where the rule promises nothing.

    `static` gives `patch_size`. `space` gives 2, as long as few special ids stand in the text (each ends a patch).
    """
    if config.patching_mode == "static":
        size = int(config.patch_size)
        return size if config.max_patch_length is None or config.max_patch_length >= size else 1
    is_split = config.max_patch_length is not None and config.max_patch_length < 2
    return 2 if config.patching_mode == "space" and not is_split else 1


@dataclass(frozen=True)
class StateLayout:
    """The page of state that an engine keeps of each text, beside keys and values.

    Entry `p` of a kind lies in slot `p % slots`, so nothing is undone when bytes are taken back (drafts that were not
    accepted).

    Attributes:
        num_bytes: slots for bytes.
        num_latents: slots for the latents of patches.
        history: ids before a byte that hashes and rule read.
        shapes, dtypes: of the four tensors of a page. They hold, in this order: id, number of closed patches and bytes
            of the open patch after each byte (int64); entropy after each byte (fp32, nats); the encoder's states of each
            byte; keys and values of the decoder's cross attentions, of each patch.
    """

    num_bytes: int
    num_latents: int
    history: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(
        cls, config: BltConfig, dtype: torch.dtype, max_drafts: int = 0, max_patch: int | None = None
    ) -> "StateLayout":
        """Lays out the page of a model in `dtype` for an engine that takes back at most `max_drafts` bytes.

        `max_patch`: bytes of the longest patch; None: what [`largest_patch`] says.
        """
        encoder, decoder = config.encoder_config, config.decoder_config
        heads, kv_heads = decoder.cross_attention_heads
        width = config.cross_attn_k * kv_heads * (decoder.hidden_size // heads)
        num_states = encoder.num_hidden_layers if encoder.cross_attn_all_layers else 1
        num_cross = decoder.num_hidden_layers if decoder.cross_attn_all_layers else 1
        history = max(PatchingRule.from_config(config).window, *config.encoder_hash_byte_group_size) - 1
        num_bytes = max(max_patch or largest_patch(config), history) + max_drafts + 1
        num_latents = max_drafts + 2
        shapes = (
            (num_bytes, 3),
            (num_bytes,),
            (num_bytes, num_states * encoder.hidden_size),
            (num_latents, 2 * num_cross * width),
        )
        return cls(num_bytes, num_latents, history, shapes, (torch.int64, torch.float32, dtype, dtype))

    @property
    def page_size(self) -> int:
        """Size of a page in bytes of memory."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes))


@dataclass
class RaggedRows:
    """The next bytes of some texts.

    Attributes:
        input_ids: int64 `(T,)`.
        positions: int64 `(T,)`, index of each byte in its text; they rise by 1 within a text. 0 begins a new one.
        starts: int64 `(R + 1,)`, where the bytes of each text begin in `T`; the last is `T`.
        pages: int64 `(R,)`, page of each text in the tensors of the state.
    """

    input_ids: Tensor
    positions: Tensor
    starts: Tensor
    pages: Tensor


@dataclass
class NewPatches:
    """The patches that end in this forward, in the order in which they stand in the row.

    Attributes:
        rows: int64 `(Q,)`, texts that end a patch.
        before: int64 `(Q,)`, patches that each of them had.
        counts: int64 `(Q,)`, patches that it gets; at least 1.
        row: int64 `(P,)`, index into `rows` of each patch.
        positions: int64 `(P,)`, index of each patch in its text.
        counts_on_host: `counts` as a list.
    """

    rows: Tensor
    before: Tensor
    counts: Tensor
    row: Tensor
    positions: Tensor
    counts_on_host: list[int]


class RowAttention(Protocol):
    """What an engine brings. Queries are `(T, H, D)`, keys and values `(T, H_kv, D)`, rotated; results are `(T, H, D)`.

    Queries, keys and values of a layer are views of one tensor.
    """

    def attend_bytes(self, stack: str, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps keys and values of layer `layer` of `stack`, and attends causally over each text, within the window."""

    def start_patches(self, patches: NewPatches) -> None:
        """Is told of the patches of this forward, before their layers run."""

    def attend_patches(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Does the same over all patches of each text, for `P` patches in the place of `T` bytes."""


@dataclass(frozen=True)
class LayerStack:
    """Layers whose self-attention an engine runs.

    Attributes:
        layers: transformer layers, with `self_attn.q_proj`, `.k_proj`, `.head_dim` and `.scaling`.
        window: bytes that a query sees, itself included; None: no limit.
    """

    layers: nn.ModuleList
    window: int | None

    @property
    def num_heads(self) -> int:
        attention = self.layers[0].self_attn
        return attention.q_proj.out_features // attention.head_dim

    @property
    def num_kv_heads(self) -> int:
        attention = self.layers[0].self_attn
        return attention.k_proj.out_features // attention.head_dim


@dataclass
class _Bytes:
    """What is known of the bytes of a forward. `(T,)` where nothing else is said."""

    rows: RaggedRows
    row: Tensor  # text of each byte
    column: Tensor  # index among the new bytes of its text
    first: Tensor  # (R,) bytes that each text had before
    patches_before: Tensor  # (R,)
    open_before: Tensor  # (R,)
    windows: Tensor  # (T, history + 1) ids up to each byte, 0 before the text
    past_entropies: Tensor  # (T, history) entropies before each byte, 0 before the text


@dataclass
class _Patches:
    """Which bytes end patches."""

    ends: Tensor  # (T,) bool
    closed: Tensor  # (T,) patches of the text closed in this forward, up to and with each byte
    open_after: Tensor  # (T,) bytes of the open patch after each byte
    new: Tensor  # (R,) patches that each text gets
    base: Tensor  # (R,) patches of the texts before it
    counts: list[int]  # `new` on the host
    open_counts: list[int]  # bytes of each text's patch that was open before, on the host


class RaggedBlt:
    """Runs a [`BltModel`] on the next bytes of many texts, one after the other in one row.

    Example (an engine's step):

        states = RaggedBlt(model)(RaggedRows(ids, positions, starts, pages), state, attention)
        logits = lm_head(states)

    Args:
        model: in evaluation mode. Cross attention over several patches, documents and resets at newlines are refused.
        max_drafts: bytes of a text that the engine may take back, by giving later bytes their positions again.
        bytes_per_slot: bytes of a text for which the engine has memory for one patch. 1 is enough for every text.
        slots_per_page: patches of a page of the engine's memory; needed with `bytes_per_slot` above 1.
        max_patch: bytes of the longest patch; longer ones are split. None: what [`largest_patch`] says.
        kernels: operations of the engine. The first call gives it the weights, so these may be loaded until then.
    Attributes:
        layout: the [`StateLayout`] of the pages that calls are given.
        stacks: the [`LayerStack`]s `encoder`, `global`, `decoder`, and `patcher` where an entropy model runs.
        num_split: patches that were split because they reached `max_patch`, in all calls.
        num_merged: patches that were not ended because all slots for patches were taken, in all calls. As long as both
            are 0, texts are those of the model itself.
    Raises:
        ValueError: a model that this forward cannot run exactly; see [`check_served`].
    """

    def __init__(
        self,
        model: BltModel,
        max_drafts: int = 0,
        bytes_per_slot: int = 1,
        slots_per_page: int | None = None,
        max_patch: int | None = None,
        kernels: RowKernels | None = None,
    ):
        check_served(model.config)
        if bytes_per_slot > 1 and slots_per_page is None:
            raise ValueError(f"`bytes_per_slot={bytes_per_slot}` needs `slots_per_page`; got None.")
        config = self.config = model.config
        self.model, self.bytes_per_slot, self.slots_per_page = model, bytes_per_slot, slots_per_page
        self._kernels, self._row_stacks = kernels or RowKernels(), None
        dtype = model.local_encoder.embed_tokens.weight.dtype
        self.layout = StateLayout.of(config, dtype, max_drafts, max_patch)
        own, longest = config.max_patch_length, max_patch or largest_patch(config)
        self._max_patch = longest if own is None else min(own, longest)
        self._counts_splits = own != self._max_patch  # else it is the model's own rule
        self._rule = replace(PatchingRule.from_config(config), max_patch_length=None)
        self.num_split = self.num_merged = 0
        window = config.local_attention_window_len
        self.stacks = {
            "encoder": LayerStack(model.local_encoder.layers, window),
            "global": LayerStack(model.global_transformer.layers, None),
            "decoder": LayerStack(model.local_decoder.layers, window),
        }
        if config.uses_patcher:
            if model.patcher is None:
                raise ValueError(
                    f"`patching_mode={config.patching_mode!r}` needs an entropy model, and this model was built with "
                    "`patch_in_forward=False`; give it one with `set_patcher`."
                )
            self.stacks["patcher"] = LayerStack(model.patcher.layers, config.patcher_config.sliding_window)

    @torch.no_grad()
    def __call__(self, rows: RaggedRows, state: Sequence[Tensor], attention: RowAttention) -> Tensor:
        """Computes the states from which the head predicts the byte after each byte.

        Args:
            rows: the bytes.
            state: tensors `(pages, *shape)` of `layout.shapes` and `layout.dtypes`; those of `rows` are written.
            attention: the engine's.
        Returns:
            `(T, W)`.
        """
        if self._row_stacks is None:
            self._row_stacks = _RowStacks(self.model, self._kernels)
        found = self._find_bytes(rows, state)
        entropies = self._entropies(found, attention)
        patches = self._find_patches(found, entropies)
        byte_states = self._encode(found, attention)
        latents = None
        if sum(patches.counts):
            latents = self._close(found, patches, byte_states, state[2], attention)
        output = self._decode(found, patches, byte_states[-1], latents, state[3], attention)
        self._keep(found, patches, entropies, byte_states, latents, state)
        return output

    def _find_bytes(self, rows: RaggedRows, state: Sequence[Tensor]) -> _Bytes:
        log, entropy_log = state[:2]
        ids, positions, starts, pages = rows.input_ids, rows.positions, rows.starts, rows.pages
        total, slots, device = ids.shape[0], self.layout.num_bytes, ids.device
        lengths = starts[1:] - starts[:-1]
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)
        index = torch.arange(total, device=device)
        column = index - starts[row]
        first = positions[starts[:-1].clamp_max(total - 1)]
        last = log[pages, (first - 1) % slots] * (first > 0)[:, None]
        age = torch.arange(self.layout.history, 0, -1, device=device)
        is_new = column[:, None] >= age  # among the bytes of this forward, else in the page
        exists = positions[:, None] >= age
        new, kept = (index[:, None] - age).clamp_min(0), (pages[row][:, None], (positions[:, None] - age) % slots)
        past = torch.where(is_new, ids[new], log[(*kept, 0)]) * exists
        past_entropies = entropy_log[kept] * exists
        return _Bytes(
            rows, row, column, first, last[:, 1], last[:, 2], torch.cat([past, ids[:, None]], dim=1), past_entropies
        )

    def _entropies(self, found: _Bytes, attention: RowAttention) -> Tensor:
        """Computes nats of the byte after each byte, fp32 `(T,)`; 0 without an entropy model."""
        ids = found.rows.input_ids
        if "patcher" not in self.stacks:
            return torch.zeros(ids.shape, device=ids.device)
        patcher, stack = self.model.patcher, self._row_stacks.patcher
        states = patcher.embed_tokens(patcher.known_ids(ids))
        rotation = stack.rotation(found.rows.positions, states)
        for layer in range(len(stack.layers)):
            states = stack.run(layer, states, rotation, _over_bytes("patcher", attention))
        return entropy_from_logits(patcher.lm_head(patcher.norm(states)))

    def _find_patches(self, found: _Bytes, entropies: Tensor) -> _Patches:
        positions, history = found.rows.positions, self.layout.history
        index, starts = torch.arange(len(positions), device=positions.device), found.rows.starts[:-1]
        # Every byte as a row of its own, whose past is the window before it.
        age = torch.arange(history, 0, -1, device=positions.device)
        new = entropies[(index[:, None] - age).clamp_min(0)] * (positions[:, None] >= age)
        past_entropies = torch.where(found.column[:, None] >= age, new, found.past_entropies)
        ends = find_patch_ends(
            self._rule,
            found.rows.input_ids[:, None],
            entropies[:, None] if self._rule.uses_entropies else None,
            positions[:, None],
            found.windows[:, :-1],
            past_entropies,
        )[:, 0]
        before_row = (starts - found.open_before)[found.row]
        start = torch.where(found.column == 0, before_row, self._last_end(ends, found, before_row - 1, index - 1) + 1)
        split = ((index - start + 1) % self._max_patch == 0) & ~ends
        ends = ends | split
        dropped = torch.zeros_like(ends)
        if self.bytes_per_slot > 1:
            kept = self._fitting_ends(ends, found)
            dropped, ends = ends & ~kept, kept
        closed = self._count_in_row(ends, found)
        last = found.rows.starts[1:] - 1
        is_empty = last < starts
        new = torch.where(is_empty, 0, closed[last.clamp_min(0)])
        open_after = index - self._last_end(ends, found, before_row - 1, index)
        # All that the host has to know, in one transfer.
        facts = torch.cat([new, found.open_before, torch.stack([split.sum(), dropped.sum()])]).tolist()
        num_rows = len(starts)
        self.num_split += facts[-2] if self._counts_splits else 0
        self.num_merged += facts[-1]
        return _Patches(
            ends, closed, open_after, new, new.cumsum(0) - new, facts[:num_rows], facts[num_rows : 2 * num_rows]
        )

    @staticmethod
    def _last_end(ends: Tensor, found: _Bytes, none: Tensor, upto: Tensor) -> Tensor:
        """Finds the last end at or before `upto` `(T,)` in the text of each byte; `none` `(T,)` where there is none."""
        index = torch.arange(len(ends), device=ends.device)
        last = torch.where(ends, index, -1).cummax(0).values[upto.clamp_min(0)]
        return torch.where(last >= found.rows.starts[found.row], last, none)

    @staticmethod
    def _count_in_row(ends: Tensor, found: _Bytes) -> Tensor:
        """Counts the ends up to and with each byte, in its text alone; int64 `(T,)`."""
        counts = ends.long().cumsum(0)
        start = found.rows.starts[found.row]
        return counts - torch.where(start > 0, counts[(start - 1).clamp_min(0)], 0)

    def _fitting_ends(self, ends: Tensor, found: _Bytes) -> Tensor:
        """Drops the `ends` for which no slot is left in the pages that a text has when it gets to that byte.

        A text of `n` bytes has `ceil(n / (slots * bytes_per_slot))` pages of `slots` patches. The patches so far are then
        `min(patches before + 1, slots)` at each end, which unrolls to a running minimum.
        """
        slots = self.slots_per_page
        room = (found.rows.positions // (slots * self.bytes_per_slot) + 1) * slots
        wanted = self._count_in_row(ends, found)
        apart = (
            found.row + 1
        ) << 32  # later texts have smaller numbers, so the minimum does not look back into others
        least = (room - wanted - apart).cummin(0).values + apart
        patches = wanted + torch.minimum(found.patches_before[found.row], least)
        before = torch.where(
            found.column == 0, found.patches_before[found.row], torch.cat([patches[:1], patches[:-1]])
        )
        return patches > before

    def _encode(self, found: _Bytes, attention: RowAttention) -> list[Tensor]:
        """Computes the states `(T, W)` that each cross attention of the encoder reads; the last are its own."""
        config, encoder = self.config, self.model.local_encoder
        ids, positions = found.rows.input_ids[:, None], found.rows.positions[:, None]
        states = encoder.embed_tokens(ids[:, 0])
        if config.encoder_hash_byte_group_nb_functions:
            hashes = ngram_hashes(
                ids, found.windows[:, :-1], positions, config.encoder_hash_byte_group_size,
                config.encoder_hash_byte_group_nb_functions, config.encoder_hash_byte_group_vocab,
            )  # fmt: skip
            states = states + self.model.encoder_hash_tok_embedding(hashes.transpose(0, 1))[0]
        stack, found_states = self._row_stacks.encoder, []
        rotation = stack.rotation(found.rows.positions, states)
        for layer in range(len(stack.layers)):
            states = stack.run(layer, states, rotation, _over_bytes("encoder", attention))
            found_states.append(states)
        return found_states[-len(encoder.cross_attn_layers) :]

    def _close(
        self,
        found: _Bytes,
        patches: _Patches,
        byte_states: list[Tensor],
        states_log: Tensor,
        attention: RowAttention,
    ) -> Tensor:
        """Computes keys and values `(P, layers, 2, F)` of the latents of the patches that end."""
        model, device, slots = self.model, found.row.device, self.layout.num_bytes
        total = sum(patches.counts)
        closing = [row for row, count in enumerate(patches.counts) if count]
        rows = torch.tensor(closing, device=device)
        counts, before = patches.new[rows], found.patches_before[rows]
        within = patches.closed - patches.ends.long()
        segment = torch.where(within < patches.new[found.row], patches.base[found.row] + within, -1)
        # Bytes of the patches that were open before, which are in the pages. Where patches were kept from ending for
        # want of slots, one may be longer than what is kept.
        kept = [min(patches.open_counts[row], slots - 1) for row in closing]
        if sum(kept):
            lengths = torch.tensor(kept, device=device)
            held_row = torch.repeat_interleave(rows, lengths, output_size=sum(kept))
            ends = torch.repeat_interleave(lengths.cumsum(0), lengths, output_size=sum(kept))
            back = ends - torch.arange(sum(kept), device=device)
            held = states_log[found.rows.pages[held_row], (found.first[held_row] - back) % slots]
            parts = held.chunk(len(byte_states), dim=-1)
            byte_states = [torch.cat([old, new]) for old, new in zip(parts, byte_states)]
            segment = torch.cat([patches.base[held_row], segment])
        latents = model.local_encoder.make_latents([states[None] for states in byte_states], segment[None], total)
        row = torch.repeat_interleave(torch.arange(len(closing), device=device), counts, output_size=total)
        number = torch.arange(total, device=device) - patches.base[rows][row]
        positions = before[row] + number
        attention.start_patches(NewPatches(rows, before, counts, row, positions, [patches.counts[i] for i in closing]))
        stack, cross_layers = self._row_stacks.global_transformer, self._row_stacks.cross_layers
        states = model.global_transformer.token_embedding_projection(latents[0].flatten(1))
        rotation = stack.rotation(positions, states)
        for layer in range(len(stack.layers)):
            states = stack.run(layer, states, rotation, attention.attend_patches)
        latents = model.local_decoder.split_latents(states[None])[0]
        return torch.stack([cross.project(latents) for cross in cross_layers], dim=1)

    def _decode(
        self,
        found: _Bytes,
        patches: _Patches,
        states: Tensor,
        latents: Tensor | None,
        latent_log: Tensor,
        attention: RowAttention,
    ) -> Tensor:
        stack, cross_layers, num_rows = self._row_stacks.decoder, self._row_stacks.cross_layers, len(found.first)
        kept = latent_log[found.rows.pages, (found.patches_before - 1) % self.layout.num_latents]
        kept = kept.view(num_rows, len(cross_layers), 2, -1)  # (R, layers, 2, F)
        if latents is not None:
            kept = torch.cat([kept, latents])
        index = torch.where(
            patches.closed > 0, num_rows + patches.base[found.row] + patches.closed - 1, found.row
        )  # the last closed patch of each byte
        rotation = stack.rotation(found.rows.positions, states)
        for layer in range(len(stack.layers)):
            if layer < len(cross_layers):
                states = cross_layers[layer].run(states, *kept[:, layer].unbind(dim=1), index)
            states = stack.run(layer, states, rotation, _over_bytes("decoder", attention))
        return self.model.local_decoder.norm(states)

    def _keep(
        self,
        found: _Bytes,
        patches: _Patches,
        entropies: Tensor,
        byte_states: list[Tensor],
        latents: Tensor | None,
        state: Sequence[Tensor],
    ) -> None:
        """Writes what the next bytes need to the pages."""
        log, entropy_log, states_log, latent_log = state
        rows, slots, num_latents = found.rows, self.layout.num_bytes, self.layout.num_latents
        left = rows.starts[1:][found.row] - torch.arange(len(found.row), device=found.row.device)
        # The last byte of each slot alone, as one write to two places at once has no order; the others to no matter where.
        is_last = left <= slots
        chosen = is_last.nonzero()[:, 0] if len(found.row) > slots else slice(None)
        where = rows.pages[found.row[chosen]], rows.positions[chosen] % slots
        entries = torch.stack(
            [rows.input_ids, found.patches_before[found.row] + patches.closed, patches.open_after], 1
        )
        log[where] = entries[chosen]
        entropy_log[where] = entropies[chosen]
        states_log[where] = torch.cat(byte_states, dim=-1)[chosen].to(states_log.dtype)
        if latents is None:
            return
        total = len(latents)
        row = torch.repeat_interleave(
            torch.arange(len(patches.new), device=log.device), patches.new, output_size=total
        )
        number = torch.arange(total, device=log.device) - patches.base[row]
        chosen = ((patches.new[row] - number) <= num_latents).nonzero()[:, 0]
        where = rows.pages[row[chosen]], (found.patches_before[row] + number)[chosen] % num_latents
        latent_log[where] = latents[chosen].flatten(1).to(latent_log.dtype)


class _RowStacks:
    """The layers of a model with the operations of an engine."""

    def __init__(self, model: BltModel, kernels: RowKernels):
        def stack(module: nn.Module) -> RowStack:
            return RowStack(module.layers, module.rotary_emb, kernels)

        self.encoder, self.decoder = stack(model.local_encoder), stack(model.local_decoder)
        self.global_transformer = stack(model.global_transformer)
        self.patcher = stack(model.patcher) if model.config.uses_patcher else None
        self.cross_layers = [RowCrossAttention(cross, kernels) for cross in model.local_decoder.cross_attn_layers]


def _over_bytes(stack: str, attention: RowAttention) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Names the stack to the engine."""
    return lambda *layer: attention.attend_bytes(stack, *layer)


def check_served(config: BltConfig) -> None:
    """Refuses what [`RaggedBlt`] does not do.

    Raises:
        ValueError: names the field of the configuration, its value and what is accepted.
    """
    for part in ("encoder_config", "decoder_config"):
        window = getattr(config, part).cross_attn_window or 1
        if window > 1:
            raise ValueError(f"`{part}.cross_attn_window` must be 1 (or None) to be served so; got {window}.")
    for name, reason in (
        ("mask_documents", "documents inside a text"),
        ("patching_newline_reset", "an entropy model that forgets at newlines"),
    ):
        if getattr(config, name):
            raise ValueError(f"`{name}` must be False to be served so ({reason} are not supported); got True.")


__all__ = [
    "LayerStack",
    "NewPatches",
    "RaggedBlt",
    "RaggedRows",
    "RowAttention",
    "StateLayout",
    "bytes_per_patch",
    "check_served",
    "largest_patch",
]
