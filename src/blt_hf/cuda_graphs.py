"""The stages of steps, captured as CUDA graphs: one call starts all kernels of a stage, which Python starts one by one.

Beside them, what a captured choice of a byte is made of. Nothing of a model is imported here, so that a model whose code
came with a checkpoint finds this file, too.
"""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor


_WITH_ADDRESS = (torch.Tensor, nn.Parameter)  # subclasses may keep their values anywhere


class ModuleState:
    """Holds the state of modules that a CUDA graph has baked in: addresses of weights, dtypes, hooks, training mode.

    Args:
        roots: these and all modules below them.

    Attributes:
        is_whole: this state is all that their forwards depend on. Modules of other libraries (adapters, quantized layers)
            have settings of their own, and some rotary embeddings change with the length.
        is_hooked: somebody has added hooks, or another `forward`.
    """

    def __init__(self, *roots: nn.Module):
        self.modules = [module for root in roots for module in root.modules()]
        # A module keeps its dictionaries for life, and reading these takes a third of the time of `getattr`.
        self._fields = [vars(module) for module in self.modules]
        self._hooks = [f[name] for f in self._fields for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._children, self._tensors = (
            [f[name] for f in self._fields for name in names if f[name]]
            for names in (("_modules",), ("_parameters", "_buffers"))
        )
        self._known = self._read()
        home = type(roots[0]).__module__.rpartition(".")[0]
        self.is_whole = all(_is_known(module, home) for module in self.modules)
        self.is_hooked = bool(
            self._known[0] or any(self._known[1]) or any("forward" in fields for fields in self._fields)
        )

    def holds(self) -> bool:
        """Tells whether nothing has changed."""
        return self._known == self._read()

    def tensors(self) -> list[Tensor]:
        """Lists weights and buffers as they are now, not those that replace them later."""
        return [tensor.detach() for held in self._tensors for tensor in held.values() if type(tensor) in _WITH_ADDRESS]

    def _read(self) -> tuple:
        tensors = [tensor for held in self._tensors for tensor in held.values()]
        plain = [tensor for tensor in tensors if type(tensor) in _WITH_ADDRESS]
        return (
            len(_global_forward_hooks) + len(_global_forward_pre_hooks),
            list(map(len, self._hooks)),
            [fields["training"] for fields in self._fields],
            [id(child) for children in self._children for child in children.values()],
            list(map(id, tensors)),
            [tensor.dtype for tensor in plain],
            [tensor.data_ptr() for tensor in plain],
        )


def _is_known(module: nn.Module, home: str) -> bool:
    """Tells whether a class is of torch, transformers, or the package `home` of the model's own."""
    name = type(module).__module__
    is_ours = name.rpartition(".")[0] == home
    rope_type = getattr(module, "rope_type", "default")
    is_fixed = not isinstance(rope_type, str) or not ("dynamic" in rope_type or "longrope" in rope_type)
    return is_fixed and (is_ours or name.partition(".")[0] in ("torch", "transformers"))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


_POOLS: dict[torch.device, tuple] = {}  # memory and stream of all captures on a device, and a graph that keeps them


def capture(function: Callable, device: torch.device) -> tuple[object, Callable[[], None]]:
    """Captures `function()` as a CUDA graph.

    Returns:
        the result of `function`, in tensors that each replay fills anew; and the replay.
    Raises:
        RuntimeError: `function` asks the device for a value, or does something else that cannot be captured.
    """
    if device not in _POOLS:
        pool = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        # A pool lives as long as one of its graphs. What dead graphs leave in it is used again.
        _POOLS[device] = (*pool, _capture(lambda: torch.zeros(1, device=device), *pool)[1])
    result, graph = _capture(function, *_POOLS[device][:2])
    return result, graph.replay


def _capture(function: Callable, memory, stream) -> tuple[object, "torch.cuda.CUDAGraph"]:
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[stream.device.index]
    # Not `torch.cuda.graph`, which waits for the device and empties torch's pools first.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        # While a graph is captured, torch refuses random numbers of the generator's state to all threads, and after a
        # failure for ever. So the graph, which draws none, gets a state of its own.
        state = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        try:
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
        finally:
            generator.graphsafe_set_state(state)
        try:
            result = function()
        finally:
            try:
                graph.capture_end()
            except RuntimeError:
                torch._C._cuda_endAllocateToPool(
                    stream.device.index, memory
                )  # torch leaves this undone after a failure
                raise
    return result, graph


class CudaGraphs:
    """The captured stages of the steps of one call of `generate`, or of one running batch.

    A stage runs as it is the first time, is captured the second time, and is replayed from then on. Stages hand on what
    was read in tensors that stay where they are. When tensors of the cache move, its stages are discarded. A stage that
    cannot be captured runs as it is.

    All graphs of a process share a pool of memory, so one call captures at a time; others run as they are meanwhile.
    """

    _lock = threading.Lock()

    def __init__(self, cache, modules: ModuleState):
        self.cache, self.modules = cache, modules
        self._tensors = modules.tensors()  # a graph reads addresses, which must stay taken
        self._versions = _versions(self._tensors)
        self._stages: dict[tuple, tuple | None] = {}  # static inputs, result, replay; None: ran once
        self._held: dict[tuple, tuple] = {}  # a `BytesRead`, and its tensors by name
        self._version, self._is_refused = cache.version, False
        self._release = weakref.finalize(self, CudaGraphs._lock.release)

    @classmethod
    def of(cls, model, head: nn.Module | None, cache) -> "CudaGraphs | None":
        """Makes graphs for the steps of a model on a cache; None: these run as they are.

        They do where something in or around the model wants to see each byte (training, hooks, gradients, autocast,
        modules of other libraries), and while another call captures.
        """
        device, roots = cache.num_bytes.device, [root for root in (model, head) if root is not None]
        if model.training or torch.is_grad_enabled():
            return None
        modules = ModuleState(*roots)
        is_whole = modules.is_whole and not modules.is_hooked and not torch.is_autocast_enabled(device.type)
        return cls(cache, modules) if is_whole and cls._lock.acquire(blocking=False) else None

    @property
    def is_current(self) -> bool:
        """Whether modules and weights are what they were."""
        return self.modules.holds() and self._versions == _versions(self._tensors)

    def close(self) -> None:
        """Discards all graphs, and lets another call capture."""
        self._discard()
        self._is_refused = True
        self._release()

    def _discard(self) -> None:
        self._stages.clear()
        self._held.clear()

    def have_room(self, num_columns: int) -> bool:
        """Tells whether `BltCache.begin` for a small chunk of so many columns moves no tensor."""
        cache = self.cache
        if cache.record_past:
            return False
        cache.recent_slots.keep = cache.needed_history(cache.max_open_bytes + num_columns)
        total, kinds = max(cache.row_bytes) + num_columns, (cache.patcher_slots, cache.local_slots, cache.recent_slots)
        return all(slots.needed(total, cache.slack) <= slots.size for slots in kinds if slots.tensors)

    def hold(self, read, *key):
        """Copies what was read, a `BytesRead`, to tensors that are the same for each step."""
        key, chunk, patches = (read.chunk.num_columns, *key), read.chunk, read.patches
        made = {**vars(chunk), **vars(patches), "entropies": read.entropies, "byte_states": read.byte_states[-1]}
        history = self.cache.history
        kept = {t.untyped_storage().data_ptr() for t in (history.last, history.last_ids, history.last_entropies)}
        made = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        made = {name: value for name, value in made.items() if value.untyped_storage().data_ptr() not in kept}
        if key not in self._held:
            made = {name: value.clone() for name, value in made.items()}
            chunk, patches = (
                replace(part, **{name: made[name] for name in vars(part) if name in made}) for part in (chunk, patches)
            )
            fields = {"chunk": replace(chunk, spans={}), "patches": patches, "byte_states": [made["byte_states"]]}
            held = replace(read, **fields, span=None, entropies=made.get("entropies"))
            self._held[key] = held, made
        else:
            for name, value in self._held[key][1].items():
                value.copy_(made[name])
        return self._held[key][0]

    def next_byte(self, text, do_sample: bool) -> "FixedNextByte | None":
        """Makes a choice of bytes that a graph can hold; None: a logits processor of `text` asks the host."""
        return FixedNextByte(text, do_sample) if all(map(is_penalty, text.with_context)) else None

    def draw(self, most: int) -> "FixedDraw":
        """Makes what draws up to `most` bytes in a graph."""
        return FixedDraw(most)

    def run(self, key: tuple, function: Callable, *inputs: Tensor | None):
        """Runs `function(*inputs)`: replays its graph, or captures it the second time it is called.

        Args:
            key: tells this stage from others; the shapes of its inputs need not be part of it.
        """
        version = self.cache.version
        if version[:-1] != self._version[:-1]:
            self._discard()
        elif version != self._version:  # slots of patches, which nothing else reads
            self._stages = {name: stage for name, stage in self._stages.items() if name[0] != "close"}
        self._version = version
        key = (*key, *(None if tensor is None else tuple(tensor.shape) for tensor in inputs))
        if self._is_refused or key not in self._stages:
            self._stages[key] = None  # the first run makes tensors and loads kernels
            return function(*inputs)
        if self._stages[key] is None:
            static = [None if tensor is None else tensor.clone() for tensor in inputs]
            try:
                self._stages[key] = static, *capture(lambda: function(*static), self.cache.num_bytes.device)
            except RuntimeError as error:
                warnings.warn(
                    f"this model's steps cannot be captured as CUDA graphs and run as they are: {error}", stacklevel=2
                )
                self._is_refused = True
                return function(*inputs)
        static, result, replay = self._stages[key]
        for held, tensor in zip(static, inputs):
            if held is not None:
                held.copy_(tensor)
        replay()
        return result


@functools.cache
def capturing(runner_class: type) -> type:
    """Makes a model's `StepRunner` into one that captures its stages."""
    return type("CapturingRunner", (_Capturing, runner_class), {})


class _Capturing:
    """Runs the stages of a `StepRunner` as CUDA graphs; once they are closed, as they are.

    Args:
        model, cache, head, packed: as `StepRunner` takes them.
        graphs: of this model and cache.
        is_watched: code that may change the model runs between the steps, so look for changes before each.
    """

    def __init__(self, model, cache, head, packed, graphs: CudaGraphs, is_watched: bool):
        super().__init__(model, cache, head, packed)
        self.graphs, self.is_watched, self.all_rows = graphs, is_watched, True

    def close(self) -> None:
        """Gives back what the graphs take."""
        if self.graphs is not None:
            self.graphs.close()
        self.graphs = None

    def _look(self) -> None:
        """Closes the graphs if code between the steps has changed the model."""
        if self.is_watched and self.graphs is not None and not self.graphs.modules.holds():
            self.close()

    def step(self, input_ids: Tensor, lengths: list[int] | None = None) -> Tensor:
        self._look()
        return super().step(input_ids, lengths)

    @torch.no_grad()
    def next(self, choose, reads: bool = True) -> tuple[list[int], Tensor, Tensor]:
        """Does the same; the choice of the byte is part of the graph where it asks nothing of the host."""
        self._look()
        if self.graphs is None or not (choose.is_on_device and reads and self.graphs.have_room(2)):
            return super().next(choose, reads)
        cache, (read, counts) = self.cache, self._pending
        if counts.max_new:
            self._close_patches(read, counts)
        cache.begin(len(cache.row_bytes), 2, True, read.chunk.device)  # the byte that was read is counted later
        choose.prepare()
        logits, scores, read = self.graphs.run(("next",), lambda: self._next(read, choose))
        cache.advance_on_host(1, [1] * len(cache.row_bytes), counts)
        self._pending = read, type(counts).of(read.patches)
        return self._pending[1].last_ids, logits, scores

    def _next(self, read, choose) -> tuple:
        logits = super()._predict(self._with_span(read))
        ids, scores = choose(logits)
        return logits, scores, self._read_held(ids, None)

    def hold_patch(self, holds: bool) -> None:
        if self.graphs is None:
            super().hold_patch(holds)

    def _run_read(self, input_ids: Tensor, lengths: Tensor | None):
        if self.graphs is None:
            return super()._run_read(input_ids, lengths)
        return self.graphs.run(("read",), self._read_held, input_ids, lengths)

    def _read_held(self, input_ids: Tensor, lengths: Tensor | None):
        return self.graphs.hold(super()._run_read(input_ids, lengths), lengths is None)

    def _close_patches_fixed(self, read, counts, sizes: tuple[int, int]) -> None:
        if self.graphs is None:
            super()._close_patches_fixed(read, counts, sizes)
        else:
            close = super()._close_patches_fixed
            self.graphs.run(("close", id(read), *sizes), lambda: close(read, counts, sizes))

    def _predict(self, read) -> Tensor:
        predict = super()._predict
        if self.graphs is None:
            return predict(self._with_span(read))
        # A copy, as the next step writes over the result of a graph.
        return self.graphs.run(("predict", id(read)), lambda: predict(self._with_span(read))).clone()

    def _with_span(self, read):
        """Makes the span of what graphs hold, which copy tensors alone."""
        if read.span is not None:
            return read
        chunk = replace(read.chunk, spans={})
        span = chunk.span(self.cache, self.settings.local_window, self.settings.attention)
        return replace(read, chunk=chunk, span=span)


class FixedDraw:
    """Draws as `torch.multinomial` does, with numbers that `prepare` makes outside of a graph; the first time by itself.

    Args:
        most: bytes that a graph draws, at most.
    """

    def __init__(self, most: int):
        self.most = most
        self._noise: Tensor | None = None  # fp32 `(most, B, V)`
        self._like: Tensor | None = None  # probabilities that were drawn from

    def prepare(self, count: int) -> None:
        """Makes the numbers of the next `count` bytes, all that `multinomial` takes from a generator."""
        if self._like is None:
            return
        if self._noise is None:
            self._noise = self._like.new_empty(self.most, *self._like.shape)
        for noise in self._noise[:count]:
            noise.exponential_()

    def __call__(self, probs: Tensor, index: int = 0) -> Tensor:
        """Draws from `probs` `(B, V)`, int64 `(B, 1)`, with the numbers of byte `index`."""
        if self._noise is None:
            self._like = probs
            return torch.multinomial(probs, num_samples=1)
        return draw(probs, self._noise[index])


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Draws from `probs` `(B, V)`, int64 `(B, 1)`, with exponentially distributed `noise` of the same shape."""
    ids = (probs / noise).argmax(dim=-1, keepdim=True)
    is_valid = (probs.gather(1, ids) > 0).all()  # NaN is the largest, and not larger than 0
    torch._assert_async(is_valid, "probability tensor contains either `inf`, `nan` or element < 0")
    return ids


class FixedNextByte:
    """Chooses as the `NextByte` of the model does, in shapes and tensors that stay what they are as a text grows.

    Args:
        text: a `RaggedText`, whose processors look at no text, or are penalties for which [`is_penalty`] holds.
        do_sample: draw the byte.
    """

    is_on_device = True

    def __init__(self, text, do_sample: bool):
        self.text, self.do_sample, self._draw = text, do_sample, FixedDraw(1)
        self._processors: LogitsProcessorList | None = None
        self._has_stopped: Tensor | None = None  # bool `(B, 1)`
        self._stops = [None] * len(text.lengths)

    def prepare(self) -> None:
        """Renews what the next choice reads."""
        self._draw.prepare(1)
        if self._stops != self.text.stops and self.text.waits:
            self._stops = list(self.text.stops)
            stopped = torch.tensor([[stop is not None] for stop in self._stops], device=self.text.device)
            self._has_stopped = stopped if self._has_stopped is None else self._has_stopped.copy_(stopped)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses ids `(B, 1)` from fp32 logits `(B, 1, V)`; returns processed scores `(B, 1, V)` with them."""
        text = self.text
        if self._processors is None:
            self._processors = LogitsProcessorList(
                SeenPenalty(p, text, logits.shape[-1]) if is_penalty(p) else p for p in text.logits_processor
            )
            if text.waits and len(logits) > 1:
                self._has_stopped = torch.zeros_like(logits[:, :, 0], dtype=torch.bool)
        scores = self._processors(None, logits[:, 0])[:, None] if self._processors else logits
        ids = self._draw(scores[:, 0].softmax(dim=-1)) if self.do_sample else scores.argmax(dim=-1)
        if self._has_stopped is not None:
            ids = ids.masked_fill(self._has_stopped, text.pad_token_id)
        for processor in self._processors:
            if isinstance(processor, SeenPenalty):
                processor.add_seen(ids)
        return ids, scores


class SeenPenalty(LogitsProcessor):
    """Transformers' repetition penalty, of what each row holds: in shapes that do not change as a text grows."""

    def __init__(self, processor: RepetitionPenaltyLogitsProcessor, text, size: int):
        self.penalty = processor.penalty
        ids = text.sequences[:, processor.prompt_ignore_length or 0 : text.lengths[0]].clamp_max(size)
        self._seen = ids.new_zeros(len(ids), size + 1, dtype=torch.bool).scatter_(1, ids, True)

    def add_seen(self, ids: Tensor) -> None:
        """Takes the next byte of each row `(B, 1)`."""
        self._seen.scatter_(1, ids, True)

    def __call__(self, input_ids, scores: Tensor) -> Tensor:
        changed = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(self._seen[:, :-1], changed, scores)


def is_penalty(processor) -> bool:
    """Tells whether a logits processor is one that [`SeenPenalty`] can stand for."""
    is_known = type(processor) is RepetitionPenaltyLogitsProcessor
    return is_known and not isinstance(processor.prompt_ignore_length, Tensor)
