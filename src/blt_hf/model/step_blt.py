"""Decoding byte by byte: what a [`BltCache`] holds, in tensors of fixed shape, so that a step decides little.

While every row gets one byte at a time, the cache rests and its content lives here. Windows of bytes become rings:
the byte at `clock` is written to slot `clock % size`, and a slot's age says whether it is still seen. Shapes change
only when a ring or the patches outgrow their capacity, which is what lets `torch.compile` (and CUDA graphs) take a step.
Whoever asks the cache for anything else gets it back in its own form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_blt import AttentionSpan
from .cache_blt import BltCache, BltPatchLayer, BltWindowLayer, ByteLog
from .chunk_blt import ByteChunk, log_field, make_chunk, number_patches
from .stacks_blt import NO_PATCH


_GROWTH = 128  # free slots that a buffer without a bound gets, at least
_BLOCK = 64  # buffers are used in multiples of this, so that few shapes occur
_STEPS_FIRST = 2  # single bytes before a cache is put to rest, which costs as much as a step or two
_OPEN_BYTES = 32  # bytes of an open patch that the ring of encoder states holds at first


def _grown(count: int) -> int:
    return -(-(count + max(_GROWTH, count // 2)) // _BLOCK) * _BLOCK


def _fixed(tensor: Tensor) -> Tensor:
    """A copy that stays where it is, in plain strides: compiled steps write to it in place."""
    return tensor.clone(memory_format=torch.contiguous_format)


class Ring:
    """The last `size` entries along dimension -2 of a tensor, the newest where the clock says.

    Args:
        values: `(B, ..., T, X)`, entries so far, of which the last `size` stay.
    """

    def __init__(self, values: Tensor, clock: "RingClock"):
        count = min(values.shape[-2], clock.size)
        shape = list(values.shape)
        shape[-2] = clock.size
        buffer = values.new_zeros(shape)
        buffer[..., clock.size - count :, :] = values[..., values.shape[-2] - count :, :]
        self.buffer, self.clock = _fixed(buffer), clock

    def write(self, new: Tensor) -> Tensor:
        """Writes `(B, ..., 1, X)` over the oldest entry and returns all, in the order of the slots."""
        return self.buffer.index_copy_(-2, self.clock.slot, new.to(self.buffer.dtype))

    def unrolled(self, count: int, steps: int) -> Tensor:
        """The last `count` entries in order, `steps` writes after the beginning."""
        order = torch.arange(steps - count, steps, device=self.buffer.device) % self.clock.size
        return self.buffer.index_select(-2, order)


class RingClock:
    """Where all rings of one size are written.

    Attributes:
        slot: int64 `(1,)`, where the next entry goes.
    """

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self.slot = _fixed(torch.zeros(1, dtype=torch.int64, device=device))

    def age(self) -> Tensor:
        """int64 `(size,)`: entries written after that of each slot, once the next one is written."""
        return (self.slot - torch.arange(self.size, device=self.slot.device)) % self.size

    def span(self, chunk: ByteChunk, start: Tensor | None, implementation: str) -> "SlotSpan":
        """Keys of the new byte of each row, from row position `start` `(B, 1)` on (None: from 0)."""
        reach = chunk.row_positions if start is None else chunk.row_positions - start
        return SlotSpan((self.age() <= reach)[:, None, None], implementation)

    def tick(self) -> None:
        self.slot.add_(1).remainder_(self.size)


class RingLayer:
    """Keys and values of a byte-level layer in rings; in attention it stands for its [`BltWindowLayer`]."""

    def __init__(self, layer: BltWindowLayer, clock: RingClock):
        self.keys, self.values = Ring(layer.keys, clock), Ring(layer.values, clock)

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys.write(key_states), self.values.write(value_states)


class PatchSlots:
    """Keys and values of a global layer, where each row writes its next patch; rows that end none write in vain."""

    def __init__(self, layer: BltPatchLayer):
        self.layer = layer

    def update(
        self, key_states: Tensor, value_states: Tensor, columns: Tensor, seen: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Writes `(R, H_kv, 1, D)` to column `columns[i]` of row `rows[i]` (None: all rows).

        Gives back as many columns of those rows as `seen` counts.
        """
        states = []
        for stored, new in ((self.layer.keys, key_states), (self.layer.values, value_states)):
            if stored.shape[0] == 1:
                stored.index_copy_(2, columns, new.to(stored.dtype))
            else:
                index = torch.arange(stored.shape[0], device=stored.device) if rows is None else rows
                stored[index, :, columns] = new[:, :, 0].to(stored.dtype)
            stored = stored[:, :, : seen.shape[0]]
            states.append(stored if rows is None else stored.index_select(0, rows))
        return tuple(states)


class SlotSpan(AttentionSpan):
    """Keys in slots, of which a row sees those that `visible` `(B, 1, 1, slots)` says."""

    def __init__(self, visible: Tensor, implementation: str):
        super().__init__(0, 1, None, None, implementation)
        self.visible = visible

    def _build_mask(self, device: torch.device) -> Tensor:
        return self.visible


@dataclass
class NewByte:
    """What reading one byte of each row leaves for predicting the next.

    Attributes:
        ends: bool `(B, 1)`, rows whose patch ends with this byte.
        hidden_states: `(B, 1, W)`, of the encoder.
        span: keys that encoder and decoder see.
        log: entries for [`ByteLog`], `(B, 1, F)`; entropies `(B, 1)` in nats, None without an entropy model.
    """

    chunk: ByteChunk
    ends: Tensor
    hidden_states: Tensor
    span: SlotSpan
    log: Tensor
    entropies: Tensor | None


class BltStepState:
    """The content of a [`BltCache`] between two bytes of each row.

    It has what `make_chunk` and the stacks ask of a cache.

    Args:
        cache: in which every row has at least one byte, and where nothing is recorded for `crop`.
        local_window, patcher_window: bytes that encoder and decoder, and the entropy model see; None: no limit.
        max_length: bytes to make room for at once, for compiled steps; None: room as it is needed.
        compile_config: how the parts of a step are compiled; None: not at all.
    """

    is_empty = False
    min_bytes = 1  # a lower bound of `num_bytes` that never changes
    seq_length = 0  # no mask is read here

    def __init__(
        self,
        cache: BltCache,
        local_window: int | None,
        patcher_window: int | None,
        max_length: int | None = None,
        compile_config=None,
    ):
        self.phases = _phases(compile_config)
        self.num_hash_bytes, self.has_documents = cache.num_hash_bytes, cache.has_documents
        device = cache.num_bytes.device
        self.num_bytes = _fixed(cache.num_bytes)
        self.steps, self.max_length = 0, max_length
        # Rings that still grow: bytes that they hold, and their size.
        self.growing: list[tuple[int, int]] = []
        self.local_clock = self._clock(cache.encoder[0], local_window, device)
        self.patcher_clock = self._clock(cache.patcher[0], patcher_window, device) if cache.patcher else None
        self.encoder = [RingLayer(layer, self.local_clock) for layer in cache.encoder]
        self.decoder = [RingLayer(layer, self.local_clock) for layer in cache.decoder]
        self.patcher = [RingLayer(layer, self.patcher_clock) for layer in cache.patcher]
        self.log = self._fixed_log(cache.log, max(cache.num_hash_bytes, 1))
        facts = torch.stack([cache.log.last("open_bytes"), cache.log.last("num_patches")])
        self.open_counts, self.patch_counts = facts.tolist()
        smallest = _OPEN_BYTES if max_length is None else 8 * _OPEN_BYTES
        self.open_clock = RingClock(max(smallest, 2 * (max(self.open_counts) + 1)), device)
        self.byte_states = [Ring(kept.values, self.open_clock) for kept in cache.byte_states]
        self.global_transformer = [PatchSlots(layer) for layer in cache.global_transformer]
        self.latents = cache.latents
        for pair in self.latents:
            for kept in pair:
                kept._replace(_fixed(kept.values))
        if max_length is not None:
            self._mark_static()

    def _mark_static(self) -> None:
        """Tells `torch.compile` that these tensors are written to where they are, which CUDA graphs ask for."""
        clocks = (self.local_clock, self.patcher_clock, self.open_clock)
        layers = (*self.encoder, *self.decoder, *self.patcher)
        kept = [*self.log.tensors(), *(tensor for pair in self.latents for tensor in pair)]
        for tensor in (
            self.num_bytes,
            *(clock.slot for clock in clocks if clock is not None),
            *(ring.buffer for layer in layers for ring in (layer.keys, layer.values)),
            *(ring.buffer for ring in self.byte_states),
            *(tensor.values for tensor in kept),
            *(states for slots in self.global_transformer for states in (slots.layer.keys, slots.layer.values)),
        ):
            torch._dynamo.mark_static_address(tensor)

    def _clock(self, layer: BltWindowLayer, window: int | None, device: torch.device) -> RingClock:
        held = layer.get_seq_length()
        size = max(_grown(held), -(-(self.max_length or 0) // _BLOCK) * _BLOCK)
        size = size if window is None else min(window, size)
        if size != window:
            self.growing.append((held, size))
        return RingClock(size, device)

    @staticmethod
    def _fixed_log(log: ByteLog, length: int) -> ByteLog:
        """The last `length` entries, zeros in front where there are fewer (hashes know by the position)."""
        fixed = ByteLog()
        for kept, source in zip(fixed.tensors(), log.tensors()):
            values = source.values[:, -length:]
            kept._replace(_fixed(torch.nn.functional.pad(values, (0, 0, length - values.shape[1], 0))))
        return fixed

    @property
    def has_room(self) -> bool:
        """Whether one more byte fits into every ring."""
        has_room = all(held + self.steps < size for held, size in self.growing)
        return has_room and max(self.open_counts) + 1 < self.open_clock.size

    def reserve_patches(self) -> Tensor:
        """Makes room for one more patch in every row; the columns that a step looks at, `0, 1, ...`."""
        seen = -(-(max(self.patch_counts) + 1) // _BLOCK) * _BLOCK
        is_compiled, has_grown = self.max_length is not None, False
        for layer in (slots.layer for slots in self.global_transformer):
            if layer.keys.shape[-2] < seen:
                extra = max(_grown(seen), (self.max_length or 0) // 2) - layer.keys.shape[-2]
                layer.keys, layer.values = (
                    torch.nn.functional.pad(states, (0, 0, 0, extra)) for states in (layer.keys, layer.values)
                )
                has_grown = True
        if is_compiled and has_grown:
            self._mark_static()
        columns = torch.arange(seen, device=self.num_bytes.device)
        if is_compiled:
            torch._dynamo.maybe_mark_dynamic(columns, 0)
        return columns

    def count(self, ends: list[bool]) -> None:
        """Counts, on the host, a byte in each row, and patches where `ends` says that one was closed."""
        self.steps += 1
        for row, ended in enumerate(ends):
            self.open_counts[row] = 0 if ended else self.open_counts[row] + 1
            self.patch_counts[row] += ended

    def commit(self, byte: NewByte) -> None:
        """Counts the byte on the device and logs it."""
        entropies = byte.log.new_zeros(byte.log.shape[:2]).float() if byte.entropies is None else byte.entropies
        for kept, new in zip(self.log.tensors(), (byte.log, entropies[..., None])):
            kept.values.copy_(torch.cat([kept.values[:, 1:], new], dim=1))
        self.num_bytes.add_(1)
        for clock in (self.local_clock, self.patcher_clock, self.open_clock):
            if clock is not None:
                clock.tick()

    def return_to(self, cache: BltCache) -> None:
        """Writes everything back into the tensors of the cache."""
        for layers, rings in (
            ((*cache.encoder, *cache.decoder), (*self.encoder, *self.decoder)),
            (cache.patcher, self.patcher),
        ):
            for layer, ring in zip(layers, rings):
                count = layer.get_seq_length() + self.steps
                count = count if layer.window is None else min(count, layer.window - 1)
                for kept, source in zip(layer.tensors(), (ring.keys, ring.values)):
                    kept._replace(source.unrolled(count, self.steps))
        length = min(self.log.integers.values.shape[1], len(cache.log) + self.steps)
        for kept, source in zip(cache.log.tensors(), self.log.tensors()):
            kept._replace(source.values[:, source.values.shape[1] - length :].clone())
        open_bytes = max(self.open_counts)
        for kept, ring in zip(cache.byte_states, self.byte_states):
            kept._replace(ring.unrolled(open_bytes, self.steps))
        # All bytes of an open patch are of the next patch of their row.
        patch = cache.log.last("num_patches")[:, None, None]
        cache.byte_patches._replace(patch.expand(-1, open_bytes, 1).clone())
        for layer in cache.global_transformer:
            layer.length = max(self.patch_counts)
        cache.num_bytes = self.num_bytes.clone()


def read_byte(model, state: BltStepState, input_ids: Tensor) -> NewByte:
    """Entropy model and encoder on one byte of each row `(B, 1)`."""
    config = model.config
    chunk = make_chunk(
        input_ids, None, None, state, tuple(input_ids.shape), input_ids.device,
        mask_documents=config.mask_documents, newline_reset=config.patching_newline_reset,
        eos_token_id=config.eos_token_id,
    )  # fmt: skip
    implementation = config._attn_implementation
    patcher_span = None
    if state.patcher_clock is not None:
        patcher_span = state.patcher_clock.span(chunk, chunk.context_start, model.patcher.config._attn_implementation)
    entropies, ends = model._find_patches(chunk, state, None, patcher_span)
    numbers = number_patches(chunk, ends, config.mask_documents, config.eos_token_id)
    span = state.local_clock.span(chunk, chunk.document_start, implementation)
    encoder = model.local_encoder
    embeds = model._embed_bytes(chunk)
    position_embeddings = encoder.rotary_emb.for_heads(embeds, chunk.row_positions)
    states = encoder.run_bytes(embeds, position_embeddings, span, state.encoder)
    for ring, new in zip(state.byte_states, states):
        ring.write(new)
    return NewByte(chunk, numbers.ends, states[-1], span, numbers.log, entropies)


def close_patches(model, state: BltStepState, byte: NewByte, seen: Tensor, rows: Tensor | None = None) -> None:
    """Encoder cross attention and global transformer; what the decoder reads of the patches that ended.

    Args:
        seen: int64, columns of the global transformer's cache to look at.
        rows: those whose patch ended. None: all rows are run, and what the others give is thrown away.
    """

    def chosen(tensor: Tensor) -> Tensor:
        return tensor if rows is None else tensor.index_select(0, rows)

    previous = byte.chunk.previous
    is_read = state.open_clock.age() <= chosen(previous["open_bytes"])[:, None]
    segment = torch.where(is_read, 0, NO_PATCH)
    latents = model.local_encoder.make_latents([chosen(ring.buffer) for ring in state.byte_states], segment, 1)
    columns = chosen(previous["num_patches"])
    visible = seen <= columns[:, None]
    if byte.chunk.document_start is not None:
        visible = visible & (seen >= log_field(chosen(byte.log), "patch_document_start"))
    span = SlotSpan(visible[:, None, None], model.config._attn_implementation)
    global_states = model.global_transformer.run_patches(
        latents.flatten(2), columns[:, None], span, state.global_transformer, columns=columns, seen=seen, rows=rows
    )
    latents = model.local_decoder.split_latents(global_states)
    for cross_attention, pair in zip(model.local_decoder.cross_attn_layers, state.latents):
        for kept, new in zip(pair, cross_attention.project(latents)):
            if rows is None:
                kept.values.copy_(torch.where(byte.ends[..., None], new, kept.values))
            else:
                kept.values.index_copy_(0, rows, new)


def predict_byte(model, state: BltStepState, byte: NewByte) -> Tensor:
    """Decoder states `(B, 1, W)`; the byte is part of the past then."""
    read = torch.full_like(byte.chunk.row_positions, -1)  # the last patch of each row
    hidden_states = model.local_decoder(byte.hidden_states, None, byte.chunk, read, byte.span, state)
    state.commit(byte)
    return hidden_states


def can_step(model, cache: BltCache, input_ids: Tensor) -> bool:
    """Whether one byte of each row can be read in steps; the cache rests then, or is put to rest here."""
    if cache.record_past or torch.is_grad_enabled():
        return False
    if cache.steps is not None:
        if cache.steps.num_bytes.shape[0] != input_ids.shape[0]:
            return False
        if cache.steps.has_room:
            return True
    elif cache.num_single_bytes < _STEPS_FIRST or not _suits(model, cache):
        return False
    config = model.config
    patcher_window = config.patcher_config.sliding_window if cache.patcher else None  # asking ends a rest
    max_length = (cache.max_length or 0) if cache.compile_config is not None else None
    windows = config.local_attention_window_len, patcher_window
    cache.rest(BltStepState(cache, *windows, max_length, cache.compile_config))
    return True


def _suits(model, cache: BltCache) -> bool:
    parts = (model, model.patcher, model.local_encoder, model.global_transformer, model.local_decoder)
    devices = {layer.device for layer in cache.layers} | {cache.num_bytes.device}
    return (
        cache.min_bytes > 0
        and cache.encoder_window == cache.decoder_window == 1
        and model.config._attn_implementation in ("eager", "sdpa")
        and len(devices) == 1
        and not any(hasattr(part, "_hf_hook") for part in parts)  # parts are called around accelerate's hooks
    )


_compiled: dict[str, tuple] = {}


def _phases(compile_config) -> tuple:
    """The three parts of a step, compiled where `compile_config` says how."""
    plain = read_byte, close_patches, predict_byte
    if compile_config is None:
        return plain
    settings = compile_config.to_dict()
    if repr(settings) not in _compiled:
        _compiled[repr(settings)] = tuple(torch.compile(phase, **settings) for phase in plain)
    return _compiled[repr(settings)]


def take_step(model, cache: BltCache, input_ids: Tensor) -> Tensor:
    """Decoder states `(B, 1, W)` of the next byte of each row; see `can_step`."""
    state = cache.steps
    read, close, predict = state.phases
    input_ids = input_ids.clone(memory_format=torch.contiguous_format)  # one stride, whatever it was cut from
    byte = read(model, state, input_ids)
    ends = byte.ends[:, 0].tolist()  # the one thing that the host must know
    if any(ends):
        # Leaving rows out saves work on a CPU; a GPU had better see the same shapes again.
        keeps_all = all(ends) or input_ids.device.type != "cpu"
        rows = None if keeps_all else byte.ends[:, 0].nonzero()[:, 0]
        close(model, state, byte, state.reserve_patches(), rows)
    hidden_states = predict(model, state, byte)
    state.count(ends)
    cache.seq_length += 1
    cache.min_bytes += 1
    cache.num_croppable += 1
    return hidden_states


__all__ = ["BltStepState", "can_step", "take_step"]
