"""Steps of a few bytes for all of a call of `generate`: as they are, compiled, or captured as CUDA graphs.

A byte takes hundreds of small kernels, and Python needs longer to start them than a processor to run them. `torch.compile`
fuses them; a CUDA graph starts all kernels of a stage at once, compiled or not.
"""

import warnings
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .cache_blt import BltCache
from .chunk_blt import HostPatchCounts, next_bytes
from .forward_blt import (
    DRAFT,
    PLAIN,
    STEP_PATCHES,
    BytesRead,
    ForwardSettings,
    close_patches,
    closing_inputs,
    counts_rows,
    predict_bytes,
    read_bytes,
    sees_all,
)


_WITH_ADDRESS = (torch.Tensor, nn.Parameter)  # subclasses may keep their values anywhere
_STEP_BYTES = 8  # compiled steps of several bytes read multiples of this, so that few shapes are compiled


class StepRunner:
    """Runs small chunks of plain bytes behind those of a cache, for all bytes of a call of `generate`.

    The stages run as they are, compiled (`cache.compile_config`), or captured as CUDA graphs (`cache.cuda_graphs`).

    Args:
        model: a [`BltModel`].
        cache: holds some text.
        head: what gives logits; None: results are states.
        packed: a [`PackedStacks`] of the model, made for this call; None: the modules run.
    """

    def __init__(self, model, cache: BltCache, head: nn.Module | None = None, packed=None):
        self.model, self.cache, self.head, self.packed = model, cache, head, packed
        self.settings = ForwardSettings.of(model.config)
        self.all_rows = len(cache.row_bytes) == 1 or counts_rows(model)
        self.compiles = is_compiled(model, cache)
        # torch does not ask compiled code whether a hook was added since.
        self.hooks = hooks_of(model, head) if self.compiles else None
        device = cache.num_bytes.device
        self.is_captured = cache.is_fixed and can_capture(device) and may_capture(model, device)
        if self.is_captured and cache.cuda_graphs is None:
            cache.cuda_graphs = CudaGraphs()
        self.is_compiled = False

    @torch.no_grad()
    def step(self, input_ids: Tensor, lengths: list[int] | None = None) -> Tensor:
        """States `(B, S, W)`, or with a head fp32 logits `(B, S, V)`, after a few more bytes of each row.

        Args:
            input_ids: int64 `(B, S)`, at most `cache.slack` bytes a row.
            lengths: how many of them count in each row; None: all.
        """
        rows, columns = input_ids.shape
        if columns > 1 and rows == 1 and self.compiles:
            lengths, length = [columns] if lengths is None else lengths, round_up_bytes(columns)
            if columns < length <= self.cache.slack:  # bytes that do not count are written behind, and over later
                filled = nn.functional.pad(input_ids, (0, length - columns))
                return self.step(filled, lengths)[:, :columns]
        read, counts = self._read(input_ids, lengths, is_draft=False)
        if counts.max_new:
            self._close(read, counts)
        result = self._predict(read)
        self.cache.advance_on_host(columns, [columns] * rows if lengths is None else lengths, counts)
        return result

    @torch.no_grad()
    def draft(self, input_ids: Tensor) -> Tensor:
        """The same by the local models alone, that read the last closed patch and close none.

        The cache takes the bytes in; undo that with its `crop_rows`.
        """
        read, _ = self._read(input_ids, None, is_draft=True)
        result = self._predict(read)
        self.cache.advance_on_host(input_ids.shape[1], [input_ids.shape[1]] * input_ids.shape[0])
        return result

    @torch.no_grad()
    def read_last(self, input_ids: Tensor) -> Tensor:
        """Encoder states `(B, 1, W)` of one more byte of each row `(B, 1)`, which the cache does not count."""
        return self._kept(self._read(input_ids, None, is_draft=True)[0].byte_states[-1])

    def _read(self, input_ids: Tensor, lengths: list[int] | None, is_draft: bool):
        model, cache, settings, packed = self.model, self.cache, self.settings, self.packed
        rows, columns = input_ids.shape
        cache.begin(rows, columns, True, input_ids.device)
        self.is_compiled = self.compiles and rows == 1 and columns == round_up_bytes(columns)
        if self.is_captured:
            cache.cuda_graphs.begin(model, self.head, packed, settings, input_ids.device)
        on_device = None if lengths is None else torch.tensor(lengths, device=input_ids.device)
        if self.is_compiled or self.is_captured:
            input_ids = input_ids.clone(memory_format=torch.contiguous_format)  # one stride, whatever it was cut from
        stage = self._stage(read_next, columns)

        def run(*given):
            return stage(model, settings, cache, packed, *given, is_draft)

        read = self._run((stage, self.head, is_draft), True, run, input_ids, on_device)
        return read, None if is_draft else HostPatchCounts.of(read.patches)

    def _close(self, read: BytesRead, counts: HostPatchCounts) -> None:
        is_fixed = self.is_compiled or self.is_captured
        if not is_fixed or (read.chunk.num_columns > 1 and counts.max_new > STEP_PATCHES):
            inputs = closing_inputs(self.cache, read, counts, self.all_rows)
            close_patches(self.model, self.cache, read, *inputs, sees_all(counts))
            return
        inputs = closing_inputs(self.cache, read, counts, self.all_rows, is_fixed=True)
        stage = self._stage(close_patches, read.chunk.num_columns)
        if stage is not close_patches:
            torch._dynamo.maybe_mark_dynamic(inputs[1], 0)
        self._run((stage,), False, lambda *given: stage(self.model, self.cache, read, *given), *inputs)

    def _predict(self, read: BytesRead) -> Tensor:
        model, settings, cache, head = self.model, self.settings, self.cache, self.head
        stage = self._stage(predict_bytes, read.chunk.num_columns)
        run = lambda: stage(model, settings, cache, read, None, head)
        return self._kept(self._run((stage,), False, run))

    def _stage(self, function: Callable, columns: int) -> Callable:
        if not self.is_compiled:
            return function
        return self.model.compiled_steps.find(function, (columns, self.hooks), self.cache)

    def _run(self, key: tuple, is_first: bool, function: Callable, *inputs: Tensor | None):
        if not self.is_captured:
            return function(*inputs)
        return self.cache.cuda_graphs.run(self.cache, key, is_first, function, *inputs)

    def _kept(self, result: Tensor) -> Tensor:
        """A result for the caller: what a captured stage gave is written over by the next step."""
        return result.clone() if self.is_captured else result


def read_next(
    model,
    settings: ForwardSettings,
    cache: BltCache,
    packed,
    input_ids: Tensor,
    lengths: Tensor | None,
    is_draft: bool,
) -> BytesRead:
    """Reads the next bytes `(B, S)` of each row, `lengths` `(B,)` of which count (None: all)."""
    chunk = next_bytes(input_ids, lengths, cache, settings.documents)
    chunk.packed = packed
    return read_bytes(model, settings, chunk, cache, DRAFT if is_draft else PLAIN)


# Compiled steps.


def round_up_bytes(count: int) -> int:
    """Bytes of a compiled step that reads `count` of one row."""
    return 1 if count == 1 else -(-count // _STEP_BYTES) * _STEP_BYTES


def is_spread(model) -> bool:
    """Whether accelerate has spread a model over devices."""
    return any(hasattr(part, "_hf_hook") for part in (model, *model.children()))


def is_compiled(model, cache) -> bool:
    """Whether steps of one row are compiled."""
    attention = model.config._attn_implementation
    return cache.compile_config is not None and attention in ("eager", "sdpa") and not is_spread(model)


def hooks_of(*roots: nn.Module | None) -> tuple:
    """Modules that do more than their class says, and how many hooks they have: compiled code does not ask for hooks."""
    modules = [module for root in roots if root is not None for module in root.modules()]
    counts = ((id(m), len(m._forward_hooks), len(m._forward_pre_hooks), id(vars(m).get("forward"))) for m in modules)
    plain = id(None)
    return len(_global_forward_hooks), *(c for c in counts if c[1] or c[2] or c[3] != plain)


class CompiledSteps(dict):
    """What a model has compiled, by function and settings; a copy of the model starts anew.

    Compiled is what one row runs: for a byte, or for a verification that is filled up to one of a few lengths, each stage
    is one graph in which no shape varies but the number of patches so far. Several rows come in many shapes; a graph for
    all of them takes minutes to compile, and the work of each byte outweighs there what compiling saves.
    """

    def __deepcopy__(self, memo) -> "CompiledSteps":
        return CompiledSteps()

    def __reduce__(self):
        return CompiledSteps, ()

    def find(self, function: Callable, key: tuple, cache) -> Callable:
        """`function`, compiled as `cache` says; `key`: what else tells its compiled forms apart."""
        key = (function.__name__, cache.compile_key, *key)
        if key not in self:
            self[key] = _compile(function, cache.compile_settings)
        return self[key]


def _compile(function: Callable, settings: dict) -> Callable:
    settings, options = {**settings}, dict(settings.get("options") or {})
    if settings.get("backend", "inductor") == "inductor":
        if (mode := settings.pop("mode", None)) is not None:  # torch takes a mode or options
            options = {**torch._inductor.list_mode_options(mode, settings.get("dynamic")), **options}
        options["triton.cudagraphs"] = False  # `CudaGraphs` captures what runs, compiled or not
    return torch.compile(_copy_function(function), **{**settings, "options": options or None})


def _copy_function(function: Callable) -> Callable:
    """A function with code of its own: compiled code, and the limit of how often, hang on the code."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


# CUDA graphs.


def may_capture(model, device: torch.device) -> bool:
    """Whether nothing around the model (accelerate, gradients, autocast) does more than its modules say."""
    return not (is_spread(model) or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type))


class ModuleState:
    """State of a model's modules that a CUDA graph has baked in: addresses of weights, dtypes, hooks, training mode.

    Args:
        roots: these and all modules below them.

    Attributes:
        is_whole: this state is all that their forwards depend on. Modules of other libraries (adapters, quantized layers)
            have settings of their own, and some rotary embeddings change with the length.
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
        self.is_whole = all(_is_known(module) for module in self.modules)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._known == self._read()

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


def _is_known(module: nn.Module) -> bool:
    name = type(module).__module__
    is_ours = name.rpartition(".")[0] == __name__.rpartition(".")[0]
    rope_type = getattr(module, "rope_type", "default")
    is_fixed = not isinstance(rope_type, str) or not ("dynamic" in rope_type or "longrope" in rope_type)
    return is_fixed and (is_ours or name.partition(".")[0] in ("torch", "transformers"))


def can_capture(device: torch.device) -> bool:
    """Whether a device has CUDA graphs."""
    return device.type == "cuda"


def make_pool(device: torch.device) -> tuple | None:
    """Memory pool and stream for the graphs of one cache; None on other devices."""
    return (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if device.type == "cuda" else None


def capture(function: Callable, pool: tuple) -> tuple[object, Callable[[], None]]:
    """Captures `function()` as a CUDA graph.

    Args:
        pool: of [`make_pool`].
    Returns:
        the result of `function`, in tensors that each replay fills anew; and the replay.
    Raises:
        RuntimeError: `function` asks the device for a value, or does something else that cannot be captured.
    """
    graph, (memory, stream) = torch.cuda.CUDAGraph(), pool
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"),
    ):
        result = function()
    return result, graph.replay


class _CapturedStage:
    """The CUDA graph of a stage, the static tensors that it reads, and its result."""

    def __init__(self, function: Callable, inputs: tuple[Tensor | None, ...], pool):
        self.inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        self.result, self.replay = capture(lambda: function(*self.inputs), pool)

    def run(self, inputs: tuple[Tensor | None, ...]):
        for held, tensor in zip(self.inputs, inputs):
            if held is not None:
                held.copy_(tensor)
        self.replay()
        return self.result


class CudaGraphs:
    """The captured stages of the steps on one cache.

    The later stages of a step read tensors that the first one made, so they are captured only where that one was. Before
    each step all that a graph has baked in (addresses, modules, settings) is compared; after a change all graphs are
    discarded. A stage that cannot be captured runs eagerly.
    """

    def __init__(self):
        self._stages: dict[tuple, _CapturedStage | None] = {}
        self._settings = self._modules = self._packed = self._head = self._version = self._pool = None
        self._is_refused = False
        self._first: tuple | None = None  # key of the first stage of this step, if it was captured

    def __deepcopy__(self, memo) -> "CudaGraphs":
        return CudaGraphs()

    def __reduce__(self):
        return CudaGraphs, ()

    def begin(self, model: nn.Module, head: nn.Module | None, packed, settings, device: torch.device) -> None:
        """Begins a step; discards all graphs if modules or settings have changed.

        Args:
            head: None where the step needs none.
            packed: packed weights of a call of `generate`; None: the modules run.
            settings: of the forward.
        """
        self._head = self._head if head is None else head
        roots = (model,) if self._head is None else (model, self._head)
        settings = (*map(id, roots), settings, model.config._attn_implementation, torch.is_inference_mode_enabled())
        is_known = self._modules is not None and settings == self._settings and packed is self._packed
        if not is_known or not self._modules.holds():
            self._stages.clear()
            self._settings, self._packed, self._modules = settings, packed, ModuleState(*roots)
            self._is_refused = not self._modules.is_whole
            self._pool = self._pool or make_pool(device)
        self._first = None

    def run(self, cache, name: tuple, is_first: bool, function: Callable, *inputs: Tensor | None):
        """Runs `function(*inputs)`: replays its graph, or captures it the second time it is called.

        Args:
            name: tells this stage from others; the shapes of its inputs need not be part of it.
            is_first: this stage begins a step; the others continue from its result.
        """
        if cache.version != self._version:
            self._stages.clear()
            self._version, self._first = cache.version, None
        if self._is_refused or (self._first is None and not is_first):
            return function(*inputs)
        key = (*name, *(None if tensor is None else tuple(tensor.shape) for tensor in inputs))
        key = key if is_first else (*key, self._first)
        if key not in self._stages:
            self._stages[key] = None  # the first run makes tensors and loads kernels
            return function(*inputs)
        if self._stages[key] is None:
            try:
                self._stages[key] = _CapturedStage(function, inputs, self._pool)
            except RuntimeError as error:
                warnings.warn(
                    f"this model's steps cannot be captured as CUDA graphs and run as they are: {error}", stacklevel=2
                )
                self._is_refused = True
                return function(*inputs)
        if is_first:
            self._first = key
        return self._stages[key].run(inputs)


__all__ = [
    "CompiledSteps",
    "CudaGraphs",
    "ModuleState",
    "StepRunner",
    "can_capture",
    "capture",
    "hooks_of",
    "is_compiled",
    "is_spread",
    "may_capture",
    "round_up_bytes",
]
