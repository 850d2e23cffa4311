"""The cache of a Byte Latent Transformer: two clocks, bytes and patches, each row at its own place on both.

Everything that is kept grows at its end and is needed from its end only, so every tensor here is *right-aligned*: the
last entry of a row stands in the last column, whatever the row's length. Rows that received fewer entries than others
are shifted right by the difference after they are appended; what then stands on their left is never read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


_SLACK = 128  # free columns that a buffer gets when it is (re)allocated


class RollingTensor:
    """A tensor that grows along dimension -2 and forgets its beginning, without a copy per step.

    Attributes:
        values: `(B, ..., T, X)`, what is remembered; None while empty.
    """

    def __init__(self):
        self.values: Tensor | None = None
        self._buffer: Tensor | None = None
        self._end = 0

    def __len__(self) -> int:
        return 0 if self.values is None else self.values.shape[-2]

    def append(self, new: Tensor, keep: int | None = None) -> Tensor:
        """Appends `new` `(B, ..., S, X)` to the last `keep` entries (None: all) and returns both together."""
        kept = len(self) if keep is None else min(keep, len(self))
        if self.values is None or (kept == 0 and self._buffer is None):
            self._replace(new)
        elif torch.is_grad_enabled() and (new.requires_grad or self.values.requires_grad):
            # Autograd may hold the old values: never write next to them in place.
            self._replace(torch.cat([self.values[..., len(self) - kept :, :], new], dim=-2))
        else:
            self._append_in_place(new, kept)
        return self.values

    def _append_in_place(self, new: Tensor, kept: int) -> None:
        size = new.shape[-2]
        if self._buffer is None or self._end + size > self._buffer.shape[-2]:
            shape = list(self.values.shape)
            shape[-2] = kept + size + max(_SLACK, kept // 2)
            buffer = self.values.new_empty(shape)
            buffer.narrow(-2, 0, kept).copy_(self.values.narrow(-2, len(self) - kept, kept))
            self._buffer, self._end = buffer, kept
        self._buffer.narrow(-2, self._end, size).copy_(new)
        self._end += size
        self.values = self._buffer.narrow(-2, self._end - size - kept, size + kept)

    def _replace(self, values: Tensor | None) -> None:
        self.values, self._buffer = values, None

    def keep_last(self, count: int) -> None:
        """Forgets all but the last `count` entries."""
        if count < len(self):
            self.values = self.values[..., len(self) - count :, :]
            if self._buffer is None and not self.values.requires_grad:
                self.values = self.values.clone()  # lets go of the rest of what was appended

    def drop_last(self, count: int) -> None:
        """Forgets the last `count` entries."""
        if count and self.values is not None:
            self.values = self.values[..., : max(len(self) - count, 0), :]
            self._end -= count

    def shift_right(self, shift: Tensor) -> None:
        """Moves row `b` right by `shift[b]` entries; those at its end are lost, those at its beginning unspecified."""
        if self.values is None:
            return
        index = torch.arange(len(self), device=self.values.device) - shift[:, None]
        index = index.clamp_min(0).view(shift.shape[0], *[1] * (self.values.dim() - 3), -1, 1)
        self._replace(self.values.gather(-2, index.expand(self.values.shape)))

    def select_rows(self, index: Tensor) -> None:
        if self.values is not None:
            self._replace(self.values.index_select(0, index.to(self.values.device)))

    def clear(self) -> None:
        self._replace(None)

    def snapshot(self) -> tuple:
        """What `restore` needs to forget all that is appended after this call."""
        return self.values, self._buffer, self._end

    def restore(self, state: tuple) -> None:
        self.values, self._buffer, self._end = state


class _BltCacheLayer(CacheLayerMixin):
    """Keys and values of one attention layer; what transformers' `Cache` asks of a layer."""

    is_croppable = True
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_max_length(self) -> int:
        return -1

    # The name of `get_max_length` in older releases.
    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True


class BltWindowLayer(_BltCacheLayer):
    """Keys and values of one byte-level self-attention layer.

    Holds the last `window - 1` bytes of each row (all of them without a window), and those that `crop` may ask back.

    Args:
        window: bytes a query sees, itself included; None: no limit.
    """

    def __init__(self, window: int | None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self._keys, self._values = RollingTensor(), RollingTensor()

    @property
    def keys(self) -> Tensor | None:
        """`(B, H_kv, T, D)`, rotated; right-aligned."""
        return self._keys.values

    @keys.setter
    def keys(self, value: None) -> None:
        pass  # the base class announces its attributes by setting them to None

    @property
    def values(self) -> Tensor | None:
        """`(B, H_kv, T, D)`; right-aligned."""
        return self._values.values

    @values.setter
    def values(self, value: None) -> None:
        pass

    @property
    def num_visible(self) -> int:
        """Keys that `update` will return in front of the new ones."""
        return len(self._keys) if self.window is None else min(len(self._keys), self.window - 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends `(B, H_kv, S, D)`; returns keys and values that the `S` queries may see, `(B, H_kv, T, D)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible = self.num_visible + key_states.shape[-2]
        keep = None if self.record_past or self.window is None else self.window - 1
        keys = self._keys.append(key_states, keep)
        values = self._values.append(value_states, keep)
        hidden = keys.shape[-2] - visible  # recorded for `crop` alone
        return (keys[..., hidden:, :], values[..., hidden:, :]) if hidden else (keys, values)

    def trim(self) -> None:
        """Forgets what no later byte sees."""
        if self.window is not None and len(self._keys) >= self.window:
            self._keys.keep_last(self.window - 1)
            self._values.keep_last(self.window - 1)

    def get_seq_length(self) -> int:
        return len(self._keys)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_visible + query_length, 0

    def tensors(self) -> tuple[RollingTensor, RollingTensor]:
        return self._keys, self._values

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        for tensor in self.tensors():
            tensor.drop_last(abs(tokens_to_remove))

    def shift_right(self, shift: Tensor) -> None:
        for tensor in self.tensors():
            tensor.shift_right(shift)

    def select_rows(self, index: Tensor) -> None:
        for tensor in self.tensors():
            tensor.select_rows(index)

    reorder_cache = batch_select_indices = select_rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select_rows(torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats))


class BltPatchLayer(_BltCacheLayer):
    """Keys and values of one global layer: row `b` holds its patches in columns `0 .. count[b] - 1` (left-aligned).

    Patches come for some rows at a time, so rows are written where they stand rather than shifted. `BltCache` owns
    the counts.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, counts: list[int], rows: list[int] | None, total_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Writes new patches behind those of their rows.

        Args:
            key_states, value_states: `(R, H_kv, N, D)`, up to `N` new patches for each of `R` rows.
            counts: patches that each of the `R` rows has already.
            rows: the `R` rows among `total_rows`; None: all of them.
        Returns:
            keys and values `(R, H_kv, T, D)` with `T = max(counts) + N`.
        """
        num_new = key_states.shape[-2]
        needed = max(counts) + num_new
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            if rows is None:
                self.keys, self.values, self.length = key_states, value_states, needed
                return key_states, value_states
            shape = (total_rows, key_states.shape[1], needed, key_states.shape[3])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        uses_grad = torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        self._reserve(needed, uses_grad)
        self.length = max(self.length, needed)
        for name, new in (("keys", key_states), ("values", value_states)):
            stored = getattr(self, name)
            if rows is None and len(set(counts)) == 1:
                stored[:, :, counts[0] : needed] = new
            else:
                row_index = torch.tensor(range(len(counts)) if rows is None else rows, device=stored.device)
                columns = torch.tensor(counts, device=stored.device)[:, None] + torch.arange(
                    num_new, device=stored.device
                )
                stored[row_index[:, None], :, columns] = new.transpose(1, 2)
        keys, values = self.keys[:, :, :needed], self.values[:, :, :needed]
        if rows is None:
            return keys, values
        row_index = torch.tensor(rows, device=keys.device)
        return keys.index_select(0, row_index), values.index_select(0, row_index)

    def _reserve(self, needed: int, uses_grad: bool) -> None:
        capacity = self.keys.shape[-2]
        if needed > capacity or uses_grad:
            extra = max(needed - capacity, 0)
            extra += 0 if uses_grad else max(_SLACK // 4, capacity // 2)
            # Padding copies, so autograd's old tensors stay as they are.
            self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, extra)) for t in (self.keys, self.values))
            if uses_grad and extra == 0:
                self.keys, self.values = self.keys.clone(), self.values.clone()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        pass  # columns at and after a row's count are overwritten; `BltCache.crop` lowers the counts

    def select_rows(self, index: Tensor) -> None:
        if self.is_initialized:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    reorder_cache = batch_select_indices = select_rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select_rows(torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats))


class ByteLog:
    """What is known of the last bytes of each row, one entry a byte; its last entry is the state of the row.

    `integers` `(B, T, 8)` int64 holds, for each byte and in this order:
        input_id;
        position: index in its text (a text begins where `position_ids` restart);
        open_bytes: bytes in the open patch after it, 0 if it ended its patch;
        num_patches: patches of the row closed up to and with it;
        document_start: row index of the first byte that it may see;
        context_start: the same for the entropy model;
        patch_document_start: index of the first patch that the patch of this byte may see;
        next_patch_document_start: the same for patches that start later.
    `entropies` `(B, T, 1)` fp32 nats.
    """

    FIELDS = (
        "input_id",
        "position",
        "open_bytes",
        "num_patches",
        "document_start",
        "context_start",
        "patch_document_start",
        "next_patch_document_start",
    )

    def __init__(self):
        self.integers, self.entropies = RollingTensor(), RollingTensor()

    def __len__(self) -> int:
        return len(self.integers)

    def last(self, field: str, count: int | None = None) -> Tensor:
        """The last value of `field` `(B,)`, or its last `count` values `(B, count)`."""
        column = self.integers.values[..., self.FIELDS.index(field)]
        return column[:, -1] if count is None else column[:, column.shape[1] - count :]

    @property
    def last_entropy(self) -> Tensor:
        return self.entropies.values[:, -1, 0]

    def tensors(self) -> tuple[RollingTensor, RollingTensor]:
        return self.integers, self.entropies


class BltCache(Cache):
    """Everything that a BLT must remember to continue each row exactly where it stands.

    Bytes: keys and values of the patcher's, encoder's and decoder's windows, the log of the last bytes, and the
    encoder states of the open patch. Patches: keys and values of the global layers, and what the decoder's cross
    attention keeps of the last closed patch. An empty cache has no tensors at all.

    `get_seq_length` counts columns of `input_ids`, padding included, as `generate` expects; `num_bytes` counts text.

    Args:
        config: a [`BltConfig`], or a [`BltPatcherConfig`] for an entropy model that generates by itself.
    """

    _HELD = (
        "patcher", "encoder", "decoder", "global_transformer", "layers", "log", "byte_states", "byte_patches", "latents",
        "num_bytes",
    )  # fmt: skip

    def __init__(self, config):
        self.steps = None  # a `BltStepState` that holds the content of this cache instead of it
        self.compile_config, self.max_length = None, None  # see `compile_steps`
        if config.model_type == "blt_patcher":
            patcher, encoder, decoder, num_global, num_cross = config, None, None, 0, (0, 0)
        else:
            patcher = config.patcher_config if config.uses_patcher and config.patch_in_forward else None
            encoder, decoder = config.encoder_config, config.decoder_config
            num_global = config.global_config.num_hidden_layers
            num_cross = tuple(c.num_hidden_layers if c.cross_attn_all_layers else 1 for c in (encoder, decoder))
        window = None if encoder is None else config.local_attention_window_len
        self.patcher = self._window_layers(patcher, patcher.sliding_window if patcher is not None else None)
        self.encoder = self._window_layers(encoder, window)
        self.decoder = self._window_layers(decoder, window)
        self.global_transformer = [BltPatchLayer() for _ in range(num_global)]
        super().__init__(layers=[*self.encoder, *self.decoder, *self.global_transformer, *self.patcher])
        self.encoder_window = 1 if encoder is None else encoder.cross_attn_window or 1
        self.decoder_window = 1 if decoder is None else decoder.cross_attn_window or 1
        self.num_hash_bytes = 0 if encoder is None else max(config.encoder_hash_byte_group_size) - 1
        self.log = ByteLog()
        self.byte_states = [RollingTensor() for _ in range(num_cross[0])]  # (B, T, D) of the open patch's bytes
        self.byte_patches = RollingTensor()  # (B, T, 1), index of the patch that holds each of these bytes
        self.latents = [(RollingTensor(), RollingTensor()) for _ in range(num_cross[1])]  # (B, P, K*H_kv*D)
        self._reset_counts()

    @staticmethod
    def _window_layers(config, window: int | None) -> list[BltWindowLayer]:
        return [] if config is None else [BltWindowLayer(window) for _ in range(config.num_hidden_layers)]

    def _reset_counts(self) -> None:
        self.seq_length = 0  # columns seen, padding included
        self.num_bytes: Tensor | None = None  # (B,) int64, bytes of text seen
        self.min_bytes = 0  # lower bound of `num_bytes`, known without asking the device
        self.num_croppable = 0  # columns at the end that are text in every row
        self.hides_ids = False  # whether some bytes came as embeddings
        self.has_documents = False  # whether some row holds more than one document
        self.num_single_bytes = 0
        self.record_past = False

    @property
    def is_empty(self) -> bool:
        return self.seq_length == 0

    def compile_steps(self, compile_config, max_length: int | None = None) -> None:
        """Decodes with compiled steps from now on.

        Args:
            compile_config: a `transformers.CompileConfig`, what `torch.compile` is told.
            max_length: bytes to make room for at once, so that nothing is compiled again as the text grows.
        """
        self.compile_config, self.max_length = compile_config, max_length

    def rest(self, steps) -> None:
        """Leaves its content to a `BltStepState` made of it, until somebody asks for any of it."""
        self.__dict__["steps"] = steps
        self.__dict__["_resting"] = {name: self.__dict__.pop(name) for name in self._HELD}

    def __getattr__(self, name: str):
        # Only asked for what is not there: while the cache rests, what it holds.
        if name not in self._HELD or self.__dict__.get("steps") is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        steps, self.steps = self.steps, None
        self.__dict__.update(self.__dict__.pop("_resting"))
        steps.return_to(self)
        return self.__dict__[name]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that the cache has seen, padding included."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.num_bytes is None else self.num_bytes.shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return not self.is_empty

    def activate_past_recording(self) -> None:
        """Keeps what later bytes do not need, until the next `crop`, so that it can go back that far."""
        self.record_past = True
        for layer in self.layers:
            layer.activate_past_recording()

    def _rolling_tensors(self) -> Iterator[RollingTensor]:
        yield from self.log.tensors()
        yield from self._byte_tensors()
        for pair in self.latents:
            yield from pair

    def _byte_tensors(self) -> Iterator[RollingTensor]:
        yield from self.byte_states
        yield self.byte_patches

    def commit(self, chunk, patch_shift: Tensor | None = None, max_open_bytes: int | None = None) -> None:
        """Ends a forward: aligns ragged rows and forgets what no later byte needs.

        Args:
            chunk: the [`ByteChunk`] that was run.
            patch_shift: int64 `(B,)`, how many fewer patches each row closed than the row that closed most; None: 0.
            max_open_bytes: bytes of text in the longest open patch of any row; None without an encoder.
        """
        if chunk.min_bytes < chunk.num_columns:
            shift = chunk.num_columns - chunk.num_bytes
            for layer in (*self.patcher, *self.encoder, *self.decoder):
                layer.shift_right(shift)
            for tensor in (*self.log.tensors(), *self._byte_tensors()):
                tensor.shift_right(shift)
        if patch_shift is not None:
            for pair in self.latents:
                for tensor in pair:
                    tensor.shift_right(patch_shift)
        self.num_single_bytes = self.num_single_bytes + 1 if chunk.num_columns == 1 else 0
        self.seq_length += chunk.num_columns
        self.num_bytes = chunk.num_bytes if self.num_bytes is None else self.num_bytes + chunk.num_bytes
        self.min_bytes += chunk.min_bytes
        if chunk.num_croppable < chunk.num_columns:
            self.num_croppable = 0
        self.num_croppable += chunk.num_croppable
        self.has_documents |= chunk.has_documents
        if not self.record_past:
            if max_open_bytes is not None and self.encoder_window > 1:
                max_open_bytes = int(self.needed_byte_states().max())
            self._trim(max_open_bytes)

    def _trim(self, max_open_bytes: int | None) -> None:
        for layer in (*self.patcher, *self.encoder, *self.decoder):
            layer.trim()
        for tensor in self.log.tensors():
            tensor.keep_last(max(self.num_hash_bytes, 1))
        if max_open_bytes is not None:
            for tensor in self._byte_tensors():
                tensor.keep_last(max_open_bytes)
        for pair in self.latents:
            for tensor in pair:
                tensor.keep_last(self.decoder_window)

    def needed_byte_states(self) -> Tensor:
        """Bytes at the end of each row whose encoder states a later patch will read, int64 `(B,)`."""
        if self.encoder_window == 1:
            return self.log.last("open_bytes")
        oldest = self.log.last("num_patches") - self.encoder_window + 1
        held = self.byte_patches.values[..., 0]
        age = torch.arange(held.shape[1], 0, -1, device=held.device)
        return ((held >= oldest[:, None]) & (age <= self.num_bytes[:, None])).sum(dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns of every row, and what recording kept in front of them.

        Args:
            tokens_to_remove: minus the number of columns to remove; 0 only ends what is recorded. A positive number is
                the length to crop to, as in older releases of transformers.
        Raises:
            ValueError: more is to be removed than the cache holds.
            RuntimeError: those bytes were not recorded; see `activate_past_recording`.
        """
        tokens_to_remove = int(tokens_to_remove)  # some callers count in tensors
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seq_length - tokens_to_remove, 0)
        if self.is_empty:
            return
        if remove > self.seq_length:
            raise ValueError(f"`crop` cannot remove {remove} bytes from a cache that holds {self.seq_length}.")
        if remove == self.seq_length:
            recording = self.record_past
            self.reset()
            if recording:
                self.activate_past_recording()
            return
        if remove:
            self._drop_bytes(remove)
        self._trim(int(self.needed_byte_states().max()) if self.byte_states else None)

    def _drop_bytes(self, remove: int) -> None:
        if not self.record_past or remove >= len(self.log) or remove > min(self.num_croppable, self.min_bytes - 1):
            raise RuntimeError(
                f"`crop` cannot go back {remove} bytes: they were not recorded. Call `activate_past_recording` before "
                "the forward that it may have to undo."
            )
        last_count = self.log.last("num_patches")
        for tensor in (*self.log.tensors(), *self._byte_tensors()):
            tensor.drop_last(remove)
        for layer in (*self.patcher, *self.encoder, *self.decoder):
            layer.crop(-remove)
        reopened = last_count - self.log.last("num_patches")  # patches that are no longer closed
        for pair in self.latents:
            for tensor in pair:
                tensor.shift_right(reopened)
        self.seq_length -= remove
        self.num_bytes = self.num_bytes - remove
        self.min_bytes -= remove
        self.num_croppable -= remove

    def snapshot(self) -> tuple:
        """The state of the byte clock, for `restore`: drafting closes no patch, so nothing else changes."""
        counts = (self.seq_length, self.num_bytes, self.min_bytes, self.num_croppable)
        return counts, [tensor.snapshot() for tensor in self._drafted_tensors()]

    def restore(self, state: tuple) -> None:
        """Forgets all drafts since `snapshot`; they cost no copy."""
        (self.seq_length, self.num_bytes, self.min_bytes, self.num_croppable), tensors = state
        for tensor, tensor_state in zip(self._drafted_tensors(), tensors):
            tensor.restore(tensor_state)

    def _drafted_tensors(self) -> Iterator[RollingTensor]:
        yield from self._rolling_tensors()
        for layer in (*self.encoder, *self.decoder):
            yield from layer.tensors()

    def select_rows(self, index: Tensor) -> None:
        """Makes row `index[i]` the new row `i`; rows may be repeated or left out."""
        if self.is_empty:
            return
        for layer in self.layers:
            layer.select_rows(index)
        for tensor in self._rolling_tensors():
            tensor.select_rows(index)
        self.num_bytes = self.num_bytes.index_select(0, index.to(self.num_bytes.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_empty:
            rows = torch.arange(self.num_bytes.shape[0], device=self.num_bytes.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        for tensor in self._rolling_tensors():
            tensor.clear()
        for layer in self.layers:
            layer.record_past = False
        self._reset_counts()


__all__ = ["BltCache", "BltPatchLayer", "BltWindowLayer"]
