"""A forward over ragged rows, for serving engines that keep keys and values themselves.

The bytes of all texts stand in one row of `T`, one text after the other. The engine brings the attention over what it
has kept, and a page of memory for each text; layers, patching rules and hashes are the model's own.
`tests/serving/test_ragged.py` holds the result to the model's forward.

Dimension letters: `R` texts, `T` bytes of all texts, `P` patches that end in this forward, `H` heads, `D` head size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from ..model.configuration_blt import BltConfig
from ..model.layers_blt import ngram_hashes
from ..model.modeling_blt import BltModel
from ..model.patching_blt import PatchingRule, entropy_from_logits, find_patch_ends
from .row_layers import Product, RowCrossAttention, RowKernels, RowLatents, RowStack, check_plain


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
            of the open patch after each byte (int64); entropy after each byte (fp32, nats), where the rule reads earlier
            ones; the encoder's states of each byte; keys and values of the decoder's cross attentions, of each patch,
            and behind them what its lexicon ranks first.
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
        num_states = encoder.num_cross_attention_layers
        num_cross = decoder.num_cross_attention_layers
        history = max(PatchingRule.from_config(config).window, *config.encoder_hash_byte_group_size) - 1
        ranked = 0
        if decoder.lexicon_size:
            history, ranked = max(history, decoder.lexicon_history), 4 * decoder.lexicon_top_k
        num_bytes = max(max_patch or largest_patch(config), history) + max_drafts + 1
        num_latents = max_drafts + 2
        shapes = (
            (num_bytes, 3),
            (num_bytes,),
            (num_bytes, num_states * encoder.hidden_size),
            (num_latents, 2 * num_cross * width + ranked),
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
        longest: the most bytes of a text, on the host. None: not known, which costs some operations where it is 1.
    """

    input_ids: Tensor
    positions: Tensor
    starts: Tensor
    pages: Tensor
    longest: int | None = None


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
    is_step: bool  # each text has one byte, so `T` is `R`
    row: Tensor  # text of each byte
    column: Tensor | None  # index among the new bytes of its text; None in a step, where it is 0
    first: Tensor  # (R,) bytes that each text had before
    patches_before: Tensor  # (R,)
    open_before: Tensor  # (R,)
    windows: Tensor  # (T, history + 1) ids up to each byte, 0 before the text
    past_entropies: Tensor | None  # (T, window - 1) entropies before each byte that the rule reads, 0 before the text
    rotations: dict[str, Tensor] = field(default_factory=dict)  # of queries and keys, by the first stack that has them


@dataclass
class _Patches:
    """Which bytes end patches."""

    ends: Tensor  # (T,) bool
    ended: Tensor  # (T,) patches that ended in this forward, up to and with each byte, of all texts
    closed: Tensor  # (T,) those of the byte's own text
    open_after: Tensor  # (T,) bytes of the open patch after each byte
    new: Tensor  # (R,) patches that each text gets
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
        longest_text: bytes of the longest text, if the engine knows it: rotations of all positions are then computed once.
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
        longest_text: int | None = None,
    ):
        check_served(model.config)
        if bytes_per_slot > 1 and slots_per_page is None:
            raise ValueError(f"`bytes_per_slot={bytes_per_slot}` needs `slots_per_page`; got None.")
        config = self.config = model.config
        self.model, self.bytes_per_slot, self.slots_per_page = model, bytes_per_slot, slots_per_page
        self._kernels, self._row_stacks, self._longest_text = kernels or RowKernels(), None, longest_text
        dtype = model.local_encoder.embed_tokens.weight.dtype
        self.layout = StateLayout.of(config, dtype, max_drafts, max_patch)
        own, longest = config.max_patch_length, max_patch or largest_patch(config)
        self._max_patch = longest if own is None else min(own, longest)
        self._counts_splits = own != self._max_patch  # else it is the model's own rule
        self._rule = rule = replace(PatchingRule.from_config(config), max_patch_length=None)
        is_threshold = rule.mode == "entropy" and not rule.monotonicity and rule.threshold_add is None
        self._reads_past_entropies = rule.uses_entropies and not is_threshold
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
            self._row_stacks = _RowStacks(self.model, self._kernels, self._longest_text)
        found = self._find_bytes(rows, state)
        entropies = self._entropies(found, attention)
        patches = self._find_patches(found, entropies)
        byte_states = self._encode(found, attention)
        new_patches = latents = None
        if any(patches.counts):
            new_patches, latents = self._close(found, patches, byte_states, state[2], attention)
        output = self._decode(found, patches, byte_states[-1], latents, state[3], attention)
        self._keep(found, patches, entropies, byte_states, new_patches, latents, state)
        return output

    def _find_bytes(self, rows: RaggedRows, state: Sequence[Tensor]) -> _Bytes:
        log, entropy_log = state[:2]
        ids, positions, starts, pages = rows.input_ids, rows.positions, rows.starts, rows.pages
        total, slots, device = ids.shape[0], self.layout.num_bytes, ids.device
        index = torch.arange(total, device=device)
        is_step = rows.longest == 1 and total == len(pages) and self.bytes_per_slot == 1
        row, column, first, page = index, None, positions, pages
        if not is_step:
            row = torch.arange(len(pages), device=device)
            row = torch.repeat_interleave(row, starts[1:] - starts[:-1], output_size=total)
            column, page = index - starts[row], pages[row]
        age = torch.arange(self.layout.history, 0, -1, device=device)
        exists = positions[:, None] >= age
        kept = page[:, None], (positions[:, None] - age) % slots
        entries = log[kept] * exists[..., None]
        past, last = entries[..., 0], entries[:, -1]
        if not is_step:
            begin = starts[:-1].clamp_max(total - 1)
            first, last = positions[begin], last[begin]
            # Some of the past is among the bytes of this forward.
            past = torch.where(column[:, None] >= age, ids[(index[:, None] - age).clamp_min(0)], past)
        windows = torch.cat([past, ids[:, None]], dim=1)
        past_entropies = None
        if self._reads_past_entropies:
            window = slice(self.layout.history + 1 - self._rule.window, None)
            past_entropies = entropy_log[kept[0], kept[1][:, window]] * exists[:, window]
        return _Bytes(rows, is_step, row, column, first, last[:, 1], last[:, 2], windows, past_entropies)

    def _entropies(self, found: _Bytes, attention: RowAttention) -> Tensor:
        """Computes nats of the byte after each byte, fp32 `(T,)`; 0 without an entropy model."""
        ids = found.rows.input_ids
        if "patcher" not in self.stacks:
            return torch.zeros(ids.shape, device=ids.device)
        patcher = self.model.patcher
        if self.config.vocab_size > patcher.config.vocab_size:
            ids = patcher.known_ids(ids)
        states = patcher.embed_tokens(ids)
        *_, states = self._run_over_bytes("patcher", states, found, attention)
        states = self._kernels.norm(states, patcher.norm.weight, patcher.norm.eps)
        return entropy_from_logits(self._row_stacks.patcher_head(states))

    def _run_over_bytes(self, name: str, states: Tensor, found: _Bytes, attention: RowAttention) -> Iterator[Tensor]:
        """Runs the layers of encoder or entropy model; states `(T, W)` behind each."""
        stack, rotation = self._row_stacks.over_bytes[name], self._rotation(name, found, states)
        for layer in range(len(stack.layers)):
            states = stack.run(layer, states, rotation, partial(attention.attend_bytes, name))
            yield states

    def _rotation(self, name: str, found: _Bytes, states: Tensor) -> Tensor:
        """Computes the rotations of a stack over bytes, or takes those of another one that has the same."""
        first = self._row_stacks.rotates_as[name]
        if first not in found.rotations:
            found.rotations[first] = self._row_stacks.over_bytes[name].rotation(found.rows.positions, states)
        return found.rotations[first]

    def _find_patches(self, found: _Bytes, entropies: Tensor) -> _Patches:
        positions, starts = found.rows.positions, found.rows.starts[:-1]
        past_entropies = found.past_entropies
        if not found.is_step:
            index = torch.arange(len(positions), device=positions.device)
        if self._reads_past_entropies and not found.is_step:
            # Every byte as a row of its own, whose past is the window before it.
            age = torch.arange(self._rule.window - 1, 0, -1, device=positions.device)
            new = entropies[(index[:, None] - age).clamp_min(0)]
            past_entropies = torch.where(found.column[:, None] >= age, new, found.past_entropies)
        ends = find_patch_ends(
            self._rule,
            found.rows.input_ids[:, None],
            entropies[:, None] if self._rule.uses_entropies else None,
            positions[:, None],
            found.windows[:, :-1],
            past_entropies,
        )[:, 0]
        if found.is_step:
            length = found.open_before
        else:
            before_row = (starts - found.open_before)[found.row]
            last = self._last_end(ends, found, before_row - 1, index - 1)
            length = index - torch.where(found.column == 0, before_row, last + 1)
        length = length % self._max_patch + 1  # of the patch, up to and with each byte
        counted = []  # what makes a text another than the model's
        if self._counts_splits:
            counted.append(((length == self._max_patch) > ends).sum(dim=0, keepdim=True))
        ends = ends | (length == self._max_patch)
        open_after = length.masked_fill(ends, 0)
        if self.bytes_per_slot > 1:
            kept = self._fitting_ends(ends, found)
            counted.append((ends > kept).sum(dim=0, keepdim=True))
            ends, open_after = kept, index - self._last_end(kept, found, before_row - 1, index)
        ended, closed = self._count_ends(ends, found)
        new = closed
        if not found.is_step:
            last = found.rows.starts[1:] - 1
            new = torch.where(last < starts, 0, closed[last.clamp_min(0)])
        # All that the host has to know, in one transfer.
        facts, num_rows = torch.cat([new, found.open_before, *counted]).tolist(), len(starts)
        self.num_split += facts[2 * num_rows] if self._counts_splits else 0
        self.num_merged += facts[-1] if self.bytes_per_slot > 1 else 0
        return _Patches(ends, ended, closed, open_after, new, facts[:num_rows], facts[num_rows : 2 * num_rows])

    @staticmethod
    def _last_end(ends: Tensor, found: _Bytes, none: Tensor, upto: Tensor) -> Tensor:
        """Finds the last end at or before `upto` `(T,)` in the text of each byte; `none` `(T,)` where there is none."""
        index = torch.arange(len(ends), device=ends.device)
        last = torch.where(ends, index, -1).cummax(0).values[upto.clamp_min(0)]
        return torch.where(last >= found.rows.starts[found.row], last, none)

    @staticmethod
    def _count_ends(ends: Tensor, found: _Bytes) -> tuple[Tensor, Tensor]:
        """Counts the ends up to and with each byte, in all texts and in its own alone; int64 `(T,)` each."""
        counts = ends.cumsum(0)
        if found.is_step:
            return counts, ends.long()
        start = found.rows.starts[found.row]
        return counts, counts - torch.where(start > 0, counts[(start - 1).clamp_min(0)], 0)

    def _fitting_ends(self, ends: Tensor, found: _Bytes) -> Tensor:
        """Drops the `ends` for which no slot is left in the pages that a text has when it gets to that byte.

        A text of `n` bytes has `ceil(n / (slots * bytes_per_slot))` pages of `slots` patches. The patches so far are then
        `min(patches before + 1, slots)` at each end, which unrolls to a running minimum.
        """
        slots = self.slots_per_page
        room = (found.rows.positions // (slots * self.bytes_per_slot) + 1) * slots
        wanted = self._count_ends(ends, found)[1]
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
        ids = found.rows.input_ids[:, None]
        states = encoder.embed_tokens(ids[:, 0])
        if config.encoder_hash_byte_group_nb_functions:
            # Ids before a text are 0 in the windows, so its positions are not needed.
            hashes = ngram_hashes(
                ids, found.windows[:, :-1], None, config.encoder_hash_byte_group_size,
                config.encoder_hash_byte_group_nb_functions, config.encoder_hash_byte_group_vocab,
            )  # fmt: skip
            states = states + self.model.encoder_hash_tok_embedding(hashes.transpose(0, 1))[0]
        found_states = list(self._run_over_bytes("encoder", states, found, attention))
        return found_states[-len(encoder.cross_attn_layers) :]

    def _close(
        self,
        found: _Bytes,
        patches: _Patches,
        byte_states: list[Tensor],
        states_log: Tensor,
        attention: RowAttention,
    ) -> tuple[NewPatches, Tensor]:
        """Computes keys and values `(P, layers * F)` of the patches that end; behind them, entries of the lexicon."""
        device, slots, stacks = found.row.device, self.layout.num_bytes, self._row_stacks
        closing = [row for row, count in enumerate(patches.counts) if count]
        counts = [patches.counts[row] for row in closing]
        total = sum(counts)
        # The bytes of these patches: those that were open before are in the pages. Where patches were kept from ending for
        # want of slots, one may be longer than what is kept.
        within = patches.ended - patches.ends.long()
        is_new = patches.closed - patches.ends.long() < patches.new[found.row]
        chosen = is_new.nonzero()[:, 0]
        segment = within[chosen]
        byte_states = [states[chosen] for states in byte_states]
        held = [min(patches.open_counts[row], slots - 1) for row in closing]
        if sum(held):
            first = accumulate(counts[:-1], initial=0)
            entries = [
                (row, back, patch) for row, length, patch in zip(closing, held, first) for back in range(length, 0, -1)
            ]
            row, back, patch = torch.tensor(entries, device=device).unbind(dim=1)
            states = states_log[found.rows.pages[row], (found.first[row] - back) % slots]
            parts = states.chunk(len(byte_states), dim=-1)
            byte_states = [torch.cat([old, new]) for old, new in zip(parts, byte_states)]
            segment = torch.cat([patch, segment])
        latents = stacks.latents.run(byte_states, segment, total)
        rows = torch.tensor(closing, device=device)
        entries = [(row, number) for row, count in enumerate(counts) for number in range(count)]
        row, number = torch.tensor(entries, device=device).unbind(dim=1)
        before = found.patches_before[rows]
        positions = before[row] + number
        new_patches = NewPatches(rows, before, patches.new[rows], row, positions, counts)
        attention.start_patches(new_patches)
        states = stacks.embed_latents(latents.flatten(1))
        if self.config.decoder_config.lexicon_reads:
            keys, is_whole = self._read_words(found, patches)
            states = keys.to(states) + states.masked_fill(is_whole, 0.0)
        rotation = stacks.global_transformer.rotation(positions, states)
        for layer in range(len(stacks.global_transformer.layers)):
            states = stacks.global_transformer.run(layer, states, rotation, attention.attend_patches)
        latents = stacks.split_latents(states).unflatten(-1, (self.config.cross_attn_k, -1))
        parts = [cross.project(latents) for cross in stacks.cross_layers]
        if (lexicon := self.model.local_decoder.lexicon) is not None:
            parts.append(lexicon.rank(states[None])[0])
        return new_patches, torch.cat(parts, dim=1)

    def _read_words(self, found: _Bytes, patches: _Patches) -> tuple[Tensor, Tensor]:
        """Reads the patches that end through the lexicon: keys `(P, W)`, whether they are the patches, bool `(P, 1)`."""
        lexicon, ends = self.model.local_decoder.lexicon, patches.ends.nonzero()[:, 0]
        open_before = found.open_before[found.row]
        if not found.is_step:
            earlier = patches.open_after[(torch.arange(len(open_before), device=ends.device) - 1).clamp_min(0)]
            open_before = torch.where(found.column == 0, open_before, earlier)
        windows = found.windows[ends, -1 - self.config.decoder_config.lexicon_history :]
        keys, is_whole = lexicon.read(lexicon.index(windows[None], open_before[None, ends] + 1))
        return keys[0], is_whole[0]

    def _decode(
        self,
        found: _Bytes,
        patches: _Patches,
        states: Tensor,
        latents: Tensor | None,
        latent_log: Tensor,
        attention: RowAttention,
    ) -> Tensor:
        stacks, num_rows = self._row_stacks, len(found.first)
        kept = latent_log[found.rows.pages, (found.patches_before - 1) % self.layout.num_latents]  # (R, layers * F)
        index = found.row
        if latents is not None:
            kept = torch.cat([kept, latents])
            # The last closed patch of each byte.
            index = torch.where(patches.closed > 0, patches.ended + (num_rows - 1), index)
        if (lexicon := self.model.local_decoder.lexicon) is not None:
            kept, ranked = kept.tensor_split([-4 * lexicon.top_k], dim=1)
            windows = found.windows[:, -1 - self.config.decoder_config.lexicon_length :]
            states = states + lexicon(ranked.index_select(0, index)[None], windows[None], patches.open_after[None])[0]
        latents = kept.chunk(len(stacks.cross_layers), dim=1)
        stack, rotation = stacks.over_bytes["decoder"], self._rotation("decoder", found, states)
        for layer in range(len(stack.layers)):
            if layer < len(stacks.cross_layers):
                states = stacks.cross_layers[layer].run(states, latents[layer], index)
            states = stack.run(layer, states, rotation, partial(attention.attend_bytes, "decoder"))
        norm = self.model.local_decoder.norm
        return self._kernels.norm(states, norm.weight, norm.eps)

    def _keep(
        self,
        found: _Bytes,
        patches: _Patches,
        entropies: Tensor,
        byte_states: list[Tensor],
        new_patches: NewPatches | None,
        latents: Tensor | None,
        state: Sequence[Tensor],
    ) -> None:
        """Writes what the next bytes need to the pages."""
        log, entropy_log, states_log, latent_log = state
        rows, slots, num_latents = found.rows, self.layout.num_bytes, self.layout.num_latents
        states = byte_states[0] if len(byte_states) == 1 else torch.cat(byte_states, dim=-1)
        row, positions, pages, before = found.row, rows.positions, rows.pages, found.patches_before
        if not found.is_step:
            pages, before = pages[row], before[row]
        entries = torch.stack([rows.input_ids, before + patches.closed, patches.open_after], 1)
        if len(row) > slots:
            # The last byte of each slot alone, as one write to two places at once has no order.
            left = rows.starts[1:][row] - torch.arange(len(row), device=row.device)
            chosen = (left <= slots).nonzero()[:, 0]
            positions, pages, entries, entropies, states = (
                values[chosen] for values in (positions, pages, entries, entropies, states)
            )
        where = pages, positions % slots
        log[where] = entries
        if self._reads_past_entropies:
            entropy_log[where] = entropies
        states_log[where] = states.to(states_log.dtype)
        if latents is None:
            return
        row, positions = new_patches.row, new_patches.positions
        if max(new_patches.counts_on_host) > num_latents:
            left = (new_patches.before + new_patches.counts)[row] - positions
            chosen = (left <= num_latents).nonzero()[:, 0]
            row, positions, latents = row[chosen], positions[chosen], latents[chosen]
        where = rows.pages[new_patches.rows[row]], positions % num_latents
        latent_log[where] = latents.to(latent_log.dtype)


class _RowStacks:
    """The layers of a model with the operations of an engine."""

    def __init__(self, model: BltModel, kernels: RowKernels, longest_text: int | None):
        def stack(module: nn.Module) -> RowStack:
            return RowStack(module.layers, module.rotary_emb, kernels, longest_text)

        def product(linear: nn.Module) -> Product:
            if isinstance(linear, nn.Identity):
                return linear
            check_plain([linear])
            return kernels.make_product([linear.weight])

        encoder, decoder, patches = model.local_encoder, model.local_decoder, model.global_transformer
        self.over_bytes = {"encoder": stack(encoder), "decoder": stack(decoder)}
        if model.config.uses_patcher:
            self.over_bytes["patcher"] = stack(model.patcher)
            self.patcher_head = product(model.patcher.lm_head)
        self.rotates_as = {
            name: next(first for first, other in self.over_bytes.items() if own is other or own.rotates_as(other))
            for name, own in self.over_bytes.items()
        }
        self.latents = RowLatents(encoder, kernels)
        self.embed_latents = product(patches.token_embedding_projection)
        self.global_transformer = stack(patches)
        self.split_latents = product(decoder.patch_embedding_projection)
        self.cross_layers = [RowCrossAttention(cross, kernels) for cross in decoder.cross_attn_layers]


def check_served(config: BltConfig) -> None:
    """Refuses what [`RaggedBlt`] does not do.

    Raises:
        ValueError: names the field of the configuration, its value and what is accepted.
    """
    for part in ("encoder_config", "decoder_config"):
        window = getattr(config, part).cross_attention_window
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
