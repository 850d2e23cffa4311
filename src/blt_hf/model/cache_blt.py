"""The cache of a Byte Latent Transformer: slots, addressed by each row's own counters of bytes and patches.

Entry `p` of a row (a byte, or a patch) lies in slot `p % size` of its kind. The counters `num_bytes` and `num_patches`
tell, by arithmetic, which entry a slot holds and whether a query sees it. So nothing is shifted, aligned or masked:

- a row that received fewer bytes than others has smaller counters; entries past them are overwritten later;
- to take bytes back (`crop`) is to lower the counters, by at most `slack` bytes, each row by its own number;
- a row that has ended is one whose counters are 0: another text can take its place.

A *small* chunk (up to `slack` bytes a row) writes its entries and then reads all slots, in shapes that never change. A
larger one reads the window before it once, in order, and writes its tail.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import CompileConfig

from .checks_blt import cache_shapes, check_cache, history_sizes
from .configuration_blt import BltConfig, BltPatcherConfig
from .names_blt import import_where_installed, kept_arange


_BLOCK = 32  # numbers of slots are multiples of this, so that few shapes occur
_PATCHES = 64  # the same for slots of patches, of which a step reads those in use
_OPEN_BYTES = 64  # fewest slots for the last bytes in compiled steps, which a new shape would compile again
_SLACK = 16  # bytes that can be taken back, if nobody asks for more
_MOST_IDLE_SLACK = 128  # slack that a cache keeps after `activate_past_recording` has raised it
_LARGEST_SMALL_CHUNK = 64  # above this, attention in blocks is faster than over all slots


def _round_up(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def round_up_patches(count: int) -> int:
    """Rounds up the patches of a row, to numbers of slots of which few occur."""
    return -(-count // _PATCHES) * _PATCHES


_BY_HEAD = (2, 3, 0, 1, 4)  # (B, size, 2, H, D) -> (2, H, B, size, D), and back


@dataclass
class SlotIndex:
    """Says which slots of one kind a forward writes and reads.

    Attributes:
        index: int64 `(B*S,)`, slot of each new entry, among the slots of all rows. None in a large chunk.
        source: int64 `(B, size)` in a large chunk: new entry that each slot gets; negative: the slot keeps its entry.
        past: int64 `(B, T)`, slots to read in front of the new entries of a large chunk. None: no past.
        rows: int64 `(R,)`, rows that take part; None: all.
        seen: number of slots that queries may read. None: all. 0: the new entries alone (the cache was empty).
    """

    index: Tensor | None = None
    source: Tensor | None = None
    past: Tensor | None = None
    rows: Tensor | None = None
    seen: int | None = None

    def on(self, device: torch.device) -> "SlotIndex":
        """Moves the tensors to the device of a layer (a model may be spread over several)."""
        named = {"index": self.index, "source": self.source, "past": self.past, "rows": self.rows}
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        if all(tensor.device == device for tensor in tensors.values()):
            return self
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class Slots:
    """Counts the slots of one kind, and lists the tensors that have them.

    Args:
        keep: last entries of a row that later queries need, without those that `crop` may take back. None: all.
        of_patches: entries are patches, not bytes.
    """

    def __init__(self, keep: int | None, of_patches: bool = False):
        self.keep, self.of_patches, self.size, self.least = keep, of_patches, 0, 0
        self.most: int | None = None  # entries that a row will have, where that is known
        self.is_static = False  # the tensors stay where they are as long as there is room
        self.moves = 0  # how often a tensor was made anew
        self.seen: int | None = None  # leading slots in use; small chunks read only these. None: all slots
        self.tensors: list[SlotTensor] = []

    def held(self, num_entries: Tensor) -> Tensor:
        """Computes the entry of each slot of rows of `num_entries` `(B,)`, int64 `(B, size)`; negative: none."""
        last = num_entries[:, None] - 1  # slot `s` holds the entry `(last - s) % size` before the last
        return last - (last - torch.arange(self.size, device=num_entries.device)) % self.size

    def find(self, entries: Tensor, rows: Tensor | None = None) -> Tensor:
        """Computes the slots, among those of all rows, of `entries` `(R, S)` of `rows` `(R,)` (None: all rows)."""
        if entries.shape[0] == 1 and rows is None:
            return entries % self.size
        rows = torch.arange(entries.shape[0], device=entries.device) if rows is None else rows
        return entries % self.size + (rows * self.size)[:, None]

    def needed(self, total: int, slack: int) -> int:
        """Counts the slots that rows of up to `total` entries need, `slack` of which may be taken back."""
        return max(total if self.keep is None else min(total, self.keep + slack), self.least)

    def reserve(self, total: int, slack: int, num_entries: Tensor | None) -> None:
        """Makes room for rows of up to `total` entries, `slack` of which may be taken back.

        `num_entries` `(B,)`: entries of each row now, which move to their new slots; None: the cache is empty.
        """
        needed = self.needed(total, slack)
        if needed > self.size:  # by half at least, so that a growing row is moved seldom
            most = self.most if self.keep is None else self.keep + slack
            grown = self.size + self.size // 2
            self.resize(_round_up(max(needed, grown if most is None else min(grown, most))), num_entries)

    def resize(self, size: int, num_entries: Tensor | None) -> None:
        """Moves the entries of rows of `num_entries` `(B,)` to their slots among `size`."""
        old_size, self.size = self.size, size
        if num_entries is None or all(tensor.values is None for tensor in self.tensors):
            return
        entries = self.held(num_entries)
        is_held = (entries >= 0) & (entries >= num_entries[:, None] - old_size)  # older ones were written over
        rows = torch.arange(entries.shape[0], device=entries.device)[:, None]
        index = entries % old_size + rows * old_size
        for tensor in self.tensors:
            tensor.rearrange(index, is_held)


class SlotTensor:
    """Holds a tensor `(B, size, ...)` of entries in slots; the first write makes it.

    Args:
        by_head: entries are keys and values `(2, H, D)`. Then those of one head lie together in memory, in the order
            `(2, H, B, size, D)`, and attention reads them in one piece.
    """

    def __init__(self, slots: Slots, by_head: bool = False):
        self.slots, self.by_head = slots, by_head
        self.stored: Tensor | None = None  # contiguous: compiled code writes in place to such tensors alone
        slots.tensors.append(self)

    @property
    def values(self) -> Tensor | None:
        return self.stored.permute(_BY_HEAD) if self.by_head and self.stored is not None else self.stored

    @values.setter
    def values(self, values: Tensor | None) -> None:
        values = values.permute(_BY_HEAD) if self.by_head and values is not None else values
        self.stored = None if values is None else values.contiguous()

    def _set(self, values: Tensor) -> None:
        self.values = values
        self.slots.moves += 1
        if self.slots.is_static and self.slots.keep is None:
            torch._dynamo.maybe_mark_dynamic(self.stored, 3 if self.by_head else 1)

    def write(self, new: Tensor, slot_index: SlotIndex, num_rows: int | None = None) -> None:
        """Writes `new` `(R, S, ...)`; the first time to a tensor of `num_rows` rows, None: `R`."""
        if self.stored is None:
            # A cache that is begun under autocast may be continued without it.
            kind = new.device.type
            is_narrowed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            dtype = torch.float32 if is_narrowed and new.is_floating_point() else new.dtype
            # Zeros: a masked value still takes part in the sum of attention, times 0.
            zeros = new.new_zeros(1, dtype=dtype)
            self._set(zeros.expand(num_rows or new.shape[0], self.slots.size, *new.shape[2:]))
        stored = self.values
        new = new.to(stored.dtype)
        if slot_index.index is None:
            rows = torch.arange(new.shape[0], device=new.device)[:, None] * new.shape[1]
            taken = self._take(new, slot_index.source.clamp_min(0) + rows)
            is_new = (slot_index.source >= 0).view(*slot_index.source.shape, *[1] * (stored.dim() - 2))
            if self.slots.is_static:
                stored.copy_(torch.where(is_new, taken, stored))
            else:
                self.values = torch.where(is_new, taken, stored)
        elif torch.is_grad_enabled() and (new.requires_grad or stored.requires_grad):
            # Autograd may hold the old values: write to a copy.
            written = stored.flatten(0, 1).index_copy(0, slot_index.index, new.flatten(0, 1))
            self.values = written.view(stored.shape)
        else:
            stored.view(-1, *stored.shape[2:]).index_copy_(0, slot_index.index, new.flatten(0, 1))

    def extend(self, new: Tensor, slot_index: SlotIndex, num_rows: int | None = None) -> Tensor:
        """Writes `new` `(R, S, ...)`, and returns the entries that its queries may see `(R, T, ...)`."""
        if slot_index.index is None:
            past = None if slot_index.past is None else self.read(slot_index.past).to(new.dtype)
            self.write(new, slot_index, num_rows)
            return new if past is None else torch.cat([past, new], dim=1)
        self.write(new, slot_index, num_rows)
        if slot_index.seen == 0:
            return new
        seen = self.values if slot_index.seen is None else self.values[:, : slot_index.seen]
        return seen if slot_index.rows is None else seen.index_select(0, slot_index.rows)

    def read(self, index: Tensor) -> Tensor:
        """Reads the slots `index` `(B, T)` among those of all rows, `(B, T, ...)`."""
        return self._take(self.values, index)

    def _take(self, entries: Tensor, index: Tensor) -> Tensor:
        """Takes the places `index` `(B, T)` of `entries` `(B', S, ...)`, laid out as the tensor is."""
        dim, entries = (2, entries.permute(_BY_HEAD)) if self.by_head else (0, entries)
        taken = entries.flatten(dim, dim + 1).index_select(dim, index.flatten())
        taken = taken.view(*taken.shape[:dim], *index.shape, *taken.shape[dim + 1 :])
        return taken.permute(_BY_HEAD) if self.by_head else taken

    def rearrange(self, index: Tensor, is_held: Tensor) -> None:
        """Fills slot `s` of each row from slot `index` `(B, size)` among those of all rows, or with 0."""
        if self.values is not None:
            index, is_held = index.to(self.values.device), is_held.to(self.values.device)
            is_held = is_held.view(*is_held.shape, *[1] * (self.values.dim() - 2))
            self._set(self.read(index) * is_held)

    def select_rows(self, index: Tensor) -> None:
        if self.values is not None:
            self._set(self.values.index_select(0, index.to(self.values.device)))


class BltCacheLayer(CacheLayerMixin):
    """Keeps keys and values of one attention layer, over bytes or patches, as transformers' `Cache` asks of a layer."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "BltCache", slots: Slots):
        self._cache, self._slots = cache, slots
        self.states = SlotTensor(slots, by_head=True)  # (B, size, 2, H_kv, D): keys, rotated, and values
        self.is_sliding, self.record_past = slots.keep is not None, False
        self._views: tuple | None = None
        # Not `super()`, which would set the properties below.

    def _in_order(self, index: int) -> Tensor | None:
        """Reads keys (0) or values (1) that later queries may see, the newest last; shorter rows begin with zeros."""
        if self.states.values is None:
            return None
        counts = self._cache.counts_of(self._slots).to(self.states.values.device)
        entries = counts[:, None] + torch.arange(-self._visible(int(counts.max())), 0, device=counts.device)
        held = self.states.read(self._slots.find(entries))[:, :, index]
        return (held * (entries >= 0)[..., None, None]).transpose(1, 2)

    @property
    def keys(self) -> Tensor | None:
        """`(B, H_kv, T, D)`, rotated; right-aligned."""
        return self._in_order(0)

    @property
    def values(self) -> Tensor | None:
        """`(B, H_kv, T, D)`; right-aligned."""
        return self._in_order(1)

    @property
    def is_initialized(self) -> bool:
        return self.states.values is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # `SlotTensor` makes its tensors when it knows their shape

    def update(self, key_states: Tensor, value_states: Tensor, slot_index: SlotIndex) -> tuple[Tensor, Tensor]:
        """Writes `(R, H_kv, S, D)`; returns keys and values that the queries may see, `(R, H_kv, T, D)`."""
        states = torch.stack([key_states.transpose(1, 2), value_states.transpose(1, 2)], dim=2)
        seen = self.states.extend(states, slot_index.on(states.device), len(self._cache.row_bytes))
        if seen is states:
            return key_states, value_states
        return seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)

    def slot_views(self, seen: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views the tensor for [`PackedStack`], which writes and reads it by itself; views are kept until it moves.

        Returns:
            all slots `(2*H_kv, B*size, D)`, to write to; the first `seen` (None: all) `(2, H_kv, B, T, D)`; their keys and
            values, `(B, H_kv, T, D)` each.
        """
        stored, is_compiling = self.states.stored, torch.compiler.is_compiling()
        views = None if is_compiling else self._views
        if views is None or views[0] is not stored or views[1] != seen:
            shown = stored if seen is None else stored[:, :, :, :seen]
            slots = views[2] if views is not None and views[0] is stored else stored.flatten(2, 3).flatten(0, 1)
            views = stored, seen, slots, shown, *shown.transpose(1, 2).unbind()
            if not is_compiling:
                self._views = views
        return views[2:]

    def __getstate__(self) -> dict:
        return {**vars(self), "_views": None}

    def _visible(self, count: int) -> int:
        return count if self._slots.keep is None else min(count, self._slots.keep)

    def get_seq_length(self) -> int:
        counts = self._cache.row_patches if self._slots.of_patches else self._cache.row_bytes
        return self._visible(max(counts, default=0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # The name of `get_max_length` in older releases.
    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        pass  # the cache resets all its tensors

    def crop(self, tokens_to_remove: int) -> None:
        pass  # the cache lowers its counters


class RowState(NamedTuple):
    """Describes a row after one of its bytes, int64; in this order in the history. All zeros: no byte yet.

    Attributes:
        input_id: id of the byte.
        num_bytes, num_patches: bytes of the row up to this one, and patches that they close.
        text_bytes: bytes of its text up to this one (a text begins where `position_ids` restart).
        open_bytes: bytes in the open patch after it; 0 if it ended its patch.
        byte_patch: index in its row of the patch that holds it.
        document_start: row index of the first byte that it may see; context_start: the same for the entropy model.
        patch_document_start: index of the first patch that the patch of this byte may see.
        next_patch_document_start: the same for patches that start later.
    """

    input_id: Tensor
    num_bytes: Tensor
    num_patches: Tensor
    text_bytes: Tensor
    open_bytes: Tensor
    byte_patch: Tensor
    document_start: Tensor
    context_start: Tensor
    patch_document_start: Tensor
    next_patch_document_start: Tensor


_HOST_COUNTS = ("row_bytes", "row_patches", "row_stale")


class ByteHistory:
    """Keeps a [`RowState`] and the entropy after each of the last bytes of a row, and so the counters of the rows.

    The host has counters of its own. Methods that select, replace or reset rows change both. A forward counts its bytes on
    the device by `advance_on_device`, which a graph may hold, and on the host by [`BltCache.advance_on_host`].

    Attributes:
        entries: int64 `(B, size, F)` in slots, a [`RowState`] after each byte.
        entropies: fp32 `(B, size, 1)` in slots, nats.
        last: int64 `(B, H or 1, F)`, entries of the last bytes, the newest last, where forwards read them.
        state, last_ids: views of `last`: fields `(B,)` of the newest entry; ids of all `(B, H)`, 0 before their text.
        last_entropies: fp32 `(B, E)`, entropies after the last `E` bytes.
        row_bytes: `state.num_bytes` on the host.
        row_patches: an upper bound of `state.num_patches` on the host.
        row_stale: on the host, at most so many slots past each row's counter hold dropped bytes; limits further `crop`.

    Args:
        num_ids, num_entropies: `H` and `E`.
    """

    num_fields = len(RowState._fields)

    def __init__(self, slots: Slots, num_ids: int, num_entropies: int):
        self.slots, self.num_ids, self.num_entropies = slots, num_ids, num_entropies
        self.entries, self.entropies = SlotTensor(slots), SlotTensor(slots)
        self.clear()

    def clear(self) -> None:
        self.state = self.last = self.last_ids = self.last_entropies = None
        self.row_bytes, self.row_patches, self.row_stale = [], [], []

    def start(self, num_rows: int, device: torch.device | str) -> None:
        """Makes `num_rows` rows without text."""
        self.row_bytes, self.row_patches, self.row_stale = [0] * num_rows, [0] * num_rows, [0] * num_rows
        last = torch.zeros(num_rows, max(self.num_ids, 1), self.num_fields, dtype=torch.int64, device=device)
        self._set(last, torch.zeros(num_rows, self.num_entropies, device=device))

    def _set(self, last: Tensor, last_entropies: Tensor) -> None:
        self.last, self.last_entropies = last, last_entropies
        self.state = RowState(*last[:, -1].unbind(-1))
        self.last_ids = last[:, last.shape[1] - self.num_ids :, 0]

    def write(self, entries: Tensor, entropies: Tensor | None, slot_index: SlotIndex) -> None:
        """Writes entries `(B, S, F)` and entropies `(B, S)` (None: no entropy model, zeros) to their slots."""
        self.entries.write(entries, slot_index)
        if entropies is not None or self.entropies.values is None:
            entropies = entries.new_zeros(entries.shape[:2], dtype=torch.float32) if entropies is None else entropies
            self.entropies.write(entropies[..., None], slot_index)

    def advance_on_device(self, chunk, patches, entropies: Tensor | None = None) -> None:
        """Moves `last` and `last_entropies`, and so the device's counters, past a chunk.

        Args:
            chunk, patches: the [`ByteChunk`] that was run, and its [`PatchAssignment`].
            entropies: fp32 `(B, S)`, those of the entropy model; None: it did not run.
        """
        self.last.copy_(_newest(self.last, patches.entries, chunk.num_bytes))
        if chunk.text_starts is not None:
            self._hide_other_texts()
        if entropies is not None:
            self.last_entropies.copy_(_newest(self.last_entropies, entropies, chunk.num_bytes))

    def _hide_other_texts(self) -> None:
        age = torch.arange(self.num_ids, 0, -1, device=self.last.device)
        self.last_ids.mul_(self.state.text_bytes[:, None] >= age)

    def take_back(self, num_bytes: Tensor, restarts: bool) -> None:
        """Returns to rows of `num_bytes` bytes `(B,)` on the device. `restarts`: rows may hold several texts."""
        length = max(self.last.shape[1], self.num_entropies)
        positions = num_bytes[:, None] + kept_arange(-length, 0, num_bytes.device)
        index, is_whole = self.slots.find(positions), min(self.row_bytes) >= length
        for tensor, last in ((self.entries, self.last), (self.entropies, self.last_entropies[..., None])):
            held = tensor.read(index)
            held = held if is_whole else held * (positions >= 0)[..., None]  # there is nothing before a text
            last.copy_(held[:, -last.shape[1] :])
        if restarts:
            self._hide_other_texts()

    def select_rows(self, index: Tensor) -> None:
        index = index.to(self.last.device)
        self._set(self.last.index_select(0, index), self.last_entropies.index_select(0, index))
        rows = index.tolist()
        for name in _HOST_COUNTS:
            counts = getattr(self, name)
            setattr(self, name, [counts[row] for row in rows])

    def write_rows(self, rows: list[int], other: "ByteHistory") -> None:
        """Makes `rows` those of `other`."""
        index = torch.tensor(rows, device=self.last.device)
        self.last.index_copy_(0, index, other.last.to(index.device))
        self.last_entropies.index_copy_(0, index, other.last_entropies.to(index.device))
        for name in _HOST_COUNTS:
            for row, count in zip(rows, getattr(other, name)):
                getattr(self, name)[row] = count

    def __getstate__(self) -> dict:
        # For pickles and deep copies, in which views would become tensors of their own.
        return {**vars(self), "state": None, "last_ids": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.last is not None:
            self._set(self.last, self.last_entropies)


def _newest(old: Tensor, new: Tensor, counts: Tensor | None) -> Tensor:
    """Takes the last `H` of `old` `(B, H, ...)` followed by the first `counts[b]` of `new` `(B, S, ...)` (None: all)."""
    size = old.shape[1]
    if counts is None and new.shape[1] >= size:
        return new[:, new.shape[1] - size :]
    both = torch.cat([old, new], dim=1)
    if counts is None:
        return both[:, both.shape[1] - size :]
    index = counts[:, None] + torch.arange(size, device=counts.device)
    index = index.view(*index.shape, *[1] * (both.dim() - 2)).expand(*index.shape, *both.shape[2:])
    return both.gather(1, index)


class BltCache(Cache):
    """Keeps all that a BLT needs to continue each row exactly.

    Of bytes: keys and values in the windows of patcher, encoder and decoder, the history of the last bytes, and the
    encoder states of the open patch. Of patches: keys and values of the global layers, and those of the last patches
    for the decoder's cross attention. An empty cache has no tensors at all.

    `get_seq_length` counts columns of `input_ids`, padding included, as `generate` expects; `num_bytes` counts text.

    Args:
        config: a [`BltConfig`], or a [`BltPatcherConfig`] for an entropy model that generates by itself.
        slack: bytes that can be taken back at any time, without `activate_past_recording`.

    Attributes:
        num_bytes, num_patches: int64 `(B,)` on the device, bytes read and patches closed of each row; None while empty.
        row_bytes, row_patches: the same on the host; the latter is an upper bound. All four are those of `history`.

    Each forward advances the counters twice: on the device at the end of its predict stage, so that a CUDA graph can
    hold it, then on the host, with the chunk's [`HostPatchCounts`].
    """

    def __init__(self, config: BltConfig | BltPatcherConfig, slack: int = _SLACK):
        if config.model_type == "blt_patcher":
            patcher, encoder, decoder, global_, num_cross = config, None, None, None, (0, 0)
        else:
            patcher = config.patcher_config if config.has_patcher else None
            encoder, decoder, global_ = config.encoder_config, config.decoder_config, config.global_config
            num_cross = encoder.num_cross_attention_layers, decoder.num_cross_attention_layers
        local_window = None if encoder is None else config.local_attention_window_len
        patcher_window = None if patcher is None else patcher.sliding_window
        self.encoder_window = 1 if encoder is None else encoder.cross_attention_window
        self.decoder_window = 1 if decoder is None else decoder.cross_attention_window
        self.config, self.made_for = config, cache_shapes(config)
        self._first_slack = slack
        self.is_fixed, self.compile_config = False, None  # see `fix_steps`
        self.is_default = False  # `generate` made this cache by default, and may call `fix_steps`
        self._starts = 0
        self.patcher_slots = Slots(None if patcher_window is None else patcher_window - 1)
        self.local_slots = Slots(None if local_window is None else local_window - 1)
        self.recent_slots, self.latent_slots, self.patch_slots = Slots(0), Slots(0, True), Slots(None, True)
        self.kinds = self.patcher_slots, self.local_slots, self.recent_slots, self.latent_slots, self.patch_slots
        self.patcher, self.encoder, self.decoder, self.global_transformer = (
            [BltCacheLayer(self, slots) for _ in range(0 if part is None else part.num_hidden_layers)]
            for part, slots in (
                (patcher, self.patcher_slots),
                (encoder, self.local_slots),
                (decoder, self.local_slots),
                (global_, self.patch_slots),
            )
        )
        # Not `super()`: in a [`BltDynamicCache`] that is a DynamicCache, which makes other layers.
        Cache.__init__(self, layers=[*self.encoder, *self.decoder, *self.global_transformer, *self.patcher])
        self.history = ByteHistory(self.recent_slots, *history_sizes(config))
        self.byte_states = [SlotTensor(self.recent_slots) for _ in range(num_cross[0])]  # (B, size, W)
        # (B, size, L, 2, K*H_kv*D): keys and values of `L` cross attentions
        self.latents = SlotTensor(self.latent_slots)
        self.num_cross_layers = num_cross[1]
        self._clear()

    def _clear(self) -> None:
        self.history.clear()
        self.seq_length = 0  # columns seen, padding included
        self.num_croppable = 0  # columns at the end that are text in every row
        self.max_open_bytes = 0  # of any open patch so far
        self.hides_ids = False  # whether some bytes came as embeddings
        self.has_documents = False  # whether some row holds more than one document
        self.slack = self._first_slack
        self._recorded = 0  # bytes read since recording began
        for slots in self.kinds:
            slots.size = 0
            for tensor in slots.tensors:
                tensor.values = None

    def counts_of(self, slots: Slots) -> Tensor | None:
        """Returns the entries of each row in slots of one kind, int64 `(B,)` on the device."""
        return self.num_patches if slots.of_patches else self.num_bytes

    @staticmethod
    def memory(
        config, num_bytes: int, num_patches: int, dtype=torch.float32, slack: int = _SLACK, max_open_bytes: int = 16
    ) -> int:
        """Counts the bytes of memory of a row; see `blt_hf.cache_memory.count_row_memory`.

        Raises:
            ImportError: this code came with a checkpoint, and `blt_hf` is not installed.
        """
        module = import_where_installed("cache_memory", "`BltCache.memory`")
        return module.count_row_memory(BltCache(config, slack), num_bytes, num_patches, dtype, max_open_bytes)

    # The interface of forwards.

    @property
    def row_bytes(self) -> list[int]:
        return self.history.row_bytes

    @property
    def row_patches(self) -> list[int]:
        return self.history.row_patches

    @property
    def num_bytes(self) -> Tensor | None:
        return None if self.history.state is None else self.history.state.num_bytes

    @property
    def num_patches(self) -> Tensor | None:
        return None if self.history.state is None else self.history.state.num_patches

    @property
    def is_empty(self) -> bool:
        """Whether no row has any text, and no column was seen."""
        return self.seq_length == 0 and not any(self.row_bytes)

    @property
    def record_past(self) -> bool:
        """Whether the next `crop` can go back to where `activate_past_recording` was called, however far."""
        return self.layers[0].record_past

    def start(self, num_rows: int, device: torch.device | str) -> None:
        """Gives an empty cache `num_rows` rows without text."""
        if not self.is_empty:
            raise ValueError(f"`start` needs an empty cache; this one holds {len(self.row_bytes)} rows.")
        self._clear()
        self.history.start(num_rows, device)
        self._starts += 1

    def fix_steps(self, compile_config: CompileConfig | None = None, max_length: int | None = None) -> None:
        """Prepares an empty cache for compiled steps, and on a GPU for CUDA graphs: its tensors stay where they are.

        Args:
            compile_config: a `transformers.CompileConfig`, the settings of `torch.compile`; None: nothing is compiled.
            max_length: bytes to make room for at once, so that no shape changes as the text grows.
        """
        self.is_fixed = True
        if compile_config is not None:
            self.compile_config = compile_config
            self.compile_settings = compile_config.to_dict()
            self.compile_key = repr(self.compile_settings)
        for slots in self.kinds:
            slots.is_static = True
            slots.least = (max_length or 0) if slots.keep is None else slots.keep + self.slack
        self.patch_slots.least = (max_length or 0) // 2  # patches have two bytes or more in nearly all texts
        self.recent_slots.least = _OPEN_BYTES
        self.latent_slots.least = self.decoder_window + 2 * self.slack  # the most of `reserve_patches`

    @property
    def version(self) -> tuple:
        """Identifies the tensors: differs once one has moved, or the rows hold documents for the first time."""
        return (self._starts, self.has_documents, *(slots.moves for slots in self.kinds))

    def is_small(self, num_columns: int) -> bool:
        """Tells whether a chunk of so many columns is written first and then reads all slots."""
        return not self.is_empty and num_columns <= min(self.slack, _LARGEST_SMALL_CHUNK)

    def begin(self, num_rows: int, num_columns: int, is_small: bool, device: torch.device) -> None:
        """Makes room for the next bytes of each row, up to `num_columns`."""
        if self.is_empty:
            self.start(num_rows, device)
        history = self.history
        if history.last.is_inference() and not torch.is_inference_mode_enabled():
            self.select_rows(torch.arange(num_rows))  # copies that may be written to outside inference mode
        if self.layers[0].record_past:
            self._recorded += num_columns
            self.reserve_slack(self._recorded)
        total, counts = max(history.row_bytes) + num_columns, history.state.num_bytes
        for slots in (self.patcher_slots, self.local_slots):
            slots.reserve(total, self.slack, counts)
            slots.seen = None if self.is_fixed or _round_up(total) >= slots.size else _round_up(total)
        if is_small:
            history.row_stale = [max(stale, num_columns) for stale in history.row_stale]
            self.recent_slots.keep = self.needed_history(self.max_open_bytes + num_columns)
            self.recent_slots.reserve(total, self.slack, counts)

    def needed_history(self, max_open_bytes: int) -> int:
        """Bounds the bytes before the next one that the history must hold."""
        return max(self.history.num_ids, self.needed_states(max_open_bytes))

    def reserve_open(self, max_open_bytes: int, num_columns: int) -> None:
        """Makes room for the history of the next `num_columns` bytes, and for open patches of so many bytes."""
        self.max_open_bytes = max(self.max_open_bytes, max_open_bytes)
        self.recent_slots.keep = self.needed_history(self.max_open_bytes)
        self.recent_slots.reserve(max(self.row_bytes) + num_columns, self.slack, self.num_bytes)

    def needed_states(self, max_open_bytes: int) -> int:
        """Bounds the bytes before the next one whose encoder states later patches read."""
        # With `cross_attn_window` w a patch also reads the bytes of the w - 1 patches before it: w patches of up to
        # `max_open_bytes + 1` bytes, as a patch closes at most one byte later.
        return self.encoder_window * (max_open_bytes + 1)

    def reserve_patches(self, max_new: int) -> None:
        """Makes room for up to `max_new` more patches in every row."""
        total = max(self.row_patches) + max_new
        self.patch_slots.reserve(round_up_patches(total), 0, self.num_patches)
        # Rows that close fewer patches than others write past their counter, and `crop` may lower it besides.
        self.latent_slots.keep = self.decoder_window + self.slack
        self.latent_slots.reserve(total, self.slack, self.num_patches)

    def reserve_slack(self, slack: int) -> None:
        """Makes the cache able to take back `slack` bytes of each row."""
        if slack > self.slack:  # by half at least, as recording asks for a little more at each byte
            self.slack = slack if slack <= _BLOCK else max(slack, self.slack + self.slack // 2)
            # A window must still be whole after `slack` bytes are taken back, so slots are added now.
            for slots in (self.patcher_slots, self.local_slots, self.recent_slots):
                slots.reserve(max(self.row_bytes, default=0), self.slack, self.num_bytes)

    def advance_on_host(
        self, num_columns: int, row_bytes: list[int], counts=None, num_croppable: int | None = None
    ) -> None:
        """Moves the host's counters past a chunk, as [`ByteHistory.advance_on_device`] does on the device.

        Args:
            num_columns, row_bytes: columns of the chunk, and bytes of each row in it.
            counts: its [`HostPatchCounts`]; None: it closed no patch.
            num_croppable: columns at its end that are text in every row; None: as many as the shortest row has.
        """
        history = self.history
        history.row_bytes = [old + new for old, new in zip(history.row_bytes, row_bytes)]
        history.row_stale = [max(stale - new, 0) for stale, new in zip(history.row_stale, row_bytes)]
        if counts is not None:
            history.row_patches = [old + new for old, new in zip(counts.old, counts.new)]
            self.max_open_bytes = max(self.max_open_bytes, counts.max_open_bytes)
        croppable = min(row_bytes) if num_croppable is None else num_croppable
        # Columns before the chunk are at the end of the text only if the chunk has no padding.
        self.num_croppable = croppable + (self.num_croppable if croppable == num_columns else 0)
        self.seq_length += num_columns

    def advance_chunk_on_host(self, chunk, counts=None) -> None:
        """Moves the host's counters past a [`ByteChunk`], which may hold documents, padding or embeddings."""
        self.advance_on_host(chunk.num_columns, chunk.row_bytes, counts, chunk.num_croppable)
        self.has_documents |= chunk.text_starts is not None
        self.hides_ids |= chunk.input_ids is None

    # The interface of transformers' caches.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Counts the columns of `input_ids` that the cache has seen, padding included."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    @property
    def batch_size(self) -> int:
        return len(self.row_bytes) or -1

    max_batch_size = batch_size
    is_compileable = False

    @property
    def is_initialized(self) -> bool:
        return not self.is_empty

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns of every row.

        Args:
            tokens_to_remove: minus the number of columns to remove; 0 only ends the recording. A positive number is
                the length to crop to, as in older releases of transformers.
        Raises:
            ValueError: more is to be removed than the cache holds.
            RuntimeError: those bytes are gone: more than `slack`, and not recorded; see `activate_past_recording`.
        """
        tokens_to_remove = int(tokens_to_remove)  # some callers count in tensors
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seq_length - tokens_to_remove, 0)
        if self.is_empty:
            return
        if remove > self.seq_length:
            raise ValueError(f"`crop` cannot remove {remove} bytes from a cache that holds {self.seq_length}.")
        if remove == self.seq_length:
            is_recording = self.record_past
            self.reset()
            if is_recording:
                self.activate_past_recording()
            return
        if remove > self.num_croppable:
            raise RuntimeError(
                f"`crop` cannot go back {remove} bytes: only the last {self.num_croppable} columns are text in every row."
            )
        self.crop_rows([remove] * len(self.row_bytes))
        self.seq_length -= remove
        self.num_croppable -= remove
        self._recorded = 0
        most = max(_MOST_IDLE_SLACK, self._first_slack)
        if self.slack > most:  # give back room that recording asked for
            self.slack = most
            for slots in self.kinds:
                if slots.keep is not None and slots.size > _round_up(slots.keep + most):
                    slots.resize(_round_up(slots.keep + most), self.counts_of(slots))

    def crop_rows(self, counts: list[int] | Tensor) -> None:
        """Takes back the last `counts[b]` bytes of each row; `get_seq_length`, which counts columns, stays.

        Raises:
            ValueError: a row does not have so many bytes.
            RuntimeError: those bytes are gone.
        """
        counts = counts.tolist() if isinstance(counts, Tensor) else counts
        if len(counts) != len(self.row_bytes) or any(not 0 <= n <= held for n, held in zip(counts, self.row_bytes)):
            raise ValueError(
                f"`crop_rows` takes back {counts} bytes from rows of {self.row_bytes}; not more are there."
            )
        if not any(counts):
            return
        history = self.history
        stale = [stale + n if n else 0 for stale, n in zip(history.row_stale, counts)]
        if max(stale) > self.slack:
            raise RuntimeError(
                f"`crop` cannot go back {max(counts)} bytes: they were not recorded. Call `activate_past_recording` "
                "before the forward that it may have to undo."
            )
        history.row_stale = [max(stale) for stale in zip(stale, history.row_stale)]
        history.row_bytes = [held - n for n, held in zip(counts, history.row_bytes)]
        history.take_back(torch.tensor(history.row_bytes, device=self.num_bytes.device), self.has_documents)

    def select_rows(self, index: Tensor) -> None:
        """Makes row `index[i]` the new row `i`; rows may be repeated or left out."""
        if self.is_empty:
            return
        for slots in self.kinds:
            for tensor in slots.tensors:
                tensor.select_rows(index)
        self._starts += 1
        self.history.select_rows(index)

    def reset_rows(self, index: list[int] | Tensor) -> None:
        """Empties rows: the next byte of each is the first of another text."""
        history = self.history
        for row in index.tolist() if isinstance(index, Tensor) else index:
            history.last[row] = history.last_entropies[row] = 0
            history.row_bytes[row] = history.row_patches[row] = history.row_stale[row] = 0

    def write_rows(self, index: list[int], other: "BltCache") -> None:
        """Replaces rows `index` by those of `other`, a cache of the same model; the other rows stay as they are."""
        self.reserve_slack(other.slack)
        self.history.write_rows(index, other.history)
        for slots in (self.patcher_slots, self.local_slots):
            slots.reserve(max(self.row_bytes), self.slack, self.num_bytes)
        self.reserve_open(other.max_open_bytes, 0)
        self.reserve_patches(0)
        rows = torch.tensor(index, device=self.num_bytes.device)
        for slots, others in zip(self.kinds, other.kinds):
            if others.size not in (0, slots.size):
                others.resize(slots.size, other.counts_of(others))
            entries = torch.arange(others.size, device=rows.device).expand(len(index), -1)
            slot_index = SlotIndex(index=slots.find(entries, rows).flatten())
            for tensor, given in zip(slots.tensors, others.tensors):
                if given.stored is not None:
                    values = given.values.to((tensor if tensor.stored is not None else given).stored.device)
                    tensor.write(values, slot_index.on(values.device), len(self.row_bytes))
        self.has_documents |= other.has_documents
        self.hides_ids |= other.hides_ids
        self.seq_length = max(self.seq_length, other.seq_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_empty:
            self.select_rows(torch.arange(len(self.row_bytes)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empties the cache."""
        for layer in self.layers:
            layer.record_past = False
        self._clear()


class BltDynamicCache(BltCache, DynamicCache):
    """Marks a caller's own `DynamicCache` that a BLT writes to: the same object, and still a `DynamicCache`."""


def cache_to_write(cache: Cache, config: BltConfig | BltPatcherConfig) -> BltCache:
    """Checks a caller's cache for a model of this configuration; an empty `DynamicCache` becomes a BLT's in place.

    Raises:
        ValueError: another cache, one of another model, or one that moves its layers away (`offloading`).
    """
    if isinstance(cache, BltCache):
        # The rule of a model may have changed since the cache was made.
        if cache.config is not config or history_sizes(config) != (cache.history.num_ids, cache.history.num_entropies):
            check_cache(cache.made_for, config)
            cache.config = config  # so that the next call need not compare
        return cache
    if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading:
        vars(cache).clear()
        cache.__class__ = BltDynamicCache
        BltCache.__init__(cache, config)
        return cache
    kind = type(cache)
    state = " that holds something or is offloaded" if kind is DynamicCache else ""
    raise ValueError(
        f"`past_key_values` must be a BltCache of {BltCache.__module__}, as a forward or `model.make_cache()` returns it, "
        f"or an empty DynamicCache; got {kind.__name__}{state}, of {kind.__module__}."
    )
