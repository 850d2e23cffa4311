"""Steps of a few bytes for all of a call of `generate`: as they are, compiled, or captured as CUDA graphs.

A byte takes hundreds of small kernels, and Python needs longer to start them than a processor to run them. `torch.compile`
fuses them; a CUDA graph starts all kernels of a stage at once, compiled or not (`blt_hf.cuda_graphs`).
"""

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from .cache_blt import BltCache
from .chunk_blt import HostPatchCounts, next_bytes
from .forward_blt import (
    STEP_PATCHES,
    BytesRead,
    ForwardSettings,
    close_patches,
    closing_inputs,
    counts_rows,
    predict_bytes,
    read_bytes,
    reserve_closing,
)
from .names_blt import import_where_installed
from .packed_blt import PackedStacks
from .patching_blt import PATCHING_MODES


CAPTURES_BY_DEFAULT = False
_STEP_BYTES = 8  # compiled steps of several bytes read multiples of this, so that few shapes are compiled


class StepRunner:
    """Runs small chunks of plain bytes behind those of a cache, for all bytes of a call of `generate`.

    The stages run as they are, or compiled (`cache.compile_config`).

    Args:
        cache: holds some text.
        head: computes logits; None: results are states.
        packed: stacks of the model, made for this call; None: the modules run.
    """

    graphs = None  # the `CudaGraphs` of a runner that captures the stages

    def __init__(
        self, model: nn.Module, cache: BltCache, head: nn.Module | None = None, packed: PackedStacks | None = None
    ):
        self.model, self.cache, self.head, self.packed = model, cache, head, packed
        self.settings = ForwardSettings.of(model.config)
        attention = model.config._attn_implementation
        self.compiles = cache.compile_config is not None and attention in ("eager", "sdpa") and not is_spread(model)
        # Compiled code has no guards for hooks.
        self.hooks = hooks_of(model, head) if self.compiles else None
        # Unless the caller's options say otherwise, C++ starts the kernels on a CPU.
        is_on_cpu = self.compiles and cache.num_bytes.device.type == "cpu"
        self.starts_by_cpp = is_on_cpu and is_own_code(self.settings, self.hooks, model, head)
        self.is_compiled = False  # whether the current step runs compiled; `compiles`: whether steps of one row do
        self._pending: tuple[BytesRead, HostPatchCounts] | None = None

    @torch.no_grad()
    def step(self, input_ids: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Computes states `(B, S, W)`, or with a head fp32 logits `(B, S, V)`, after a few more bytes of each row.

        Args:
            input_ids: int64 `(B, S)`, at most `cache.slack` bytes a row.
            lengths: how many of them count in each row; None: all.
        """
        rows, columns = input_ids.shape
        if columns > 1 and rows == 1 and self.compiles:
            lengths, length = [columns] if lengths is None else lengths, round_up_bytes(columns)
            if columns < length <= self.cache.slack:  # padding lies past the row's counter; later bytes overwrite it
                filled = nn.functional.pad(input_ids, (0, length - columns))
                return self.step(filled, lengths)[:, :columns]
        self.hold_patch(False)
        read = self._read(input_ids, lengths)
        counts = HostPatchCounts.of(read.patches)
        if counts.max_new:
            self._close_patches(read, counts)
        result = self._predict(read)
        self.cache.advance_on_host(columns, [columns] * rows if lengths is None else lengths, counts)
        return result

    @torch.no_grad()
    def start(self, input_ids: Tensor) -> list[int]:
        """Reads the next byte of each row `(B, 1)`, where [`next`] goes on; returns the bytes on the host."""
        self.hold_patch(True)
        read = self._read(input_ids)
        self._pending = read, HostPatchCounts.of(read.patches)
        return self._pending[1].last_ids

    @torch.no_grad()
    def next(self, choose: Callable, reads: bool = True) -> tuple[list[int], Tensor, Tensor]:
        """Closes the patches of the byte that was read, predicts the next one of each row, chooses and reads it.

        The host learns all that it needs in one transfer: the bytes, and how many patches they closed.

        Args:
            reads: also read the next byte; False where no text goes on behind that.
        Returns:
            the bytes, on the host; fp32 logits and processed scores `(B, 1, V)`, which hold until the next step.
        """
        cache, (read, counts) = self.cache, self._pending
        if counts.max_new:
            self._close_patches(read, counts)
            self.hold_patch(True)
        logits = self._predict(read)
        cache.advance_on_host(1, [1] * len(cache.row_bytes), counts)
        choose.prepare()
        ids, scores = choose(logits)
        if not reads:
            return ids.flatten().tolist(), logits, scores
        read = self._read(ids)
        self._pending = read, HostPatchCounts.of(read.patches)
        return self._pending[1].last_ids, logits, scores

    @functools.cached_property
    def all_rows(self) -> bool:
        """Whether also rows run that close no patch, where others do."""
        return counts_rows(self.model)

    def close(self) -> None:
        """Frees the memory of CUDA graphs, if there are any; later steps run without them."""

    def hold_patch(self, holds: bool) -> None:
        """Tells the packed decoder whether the next bytes of one row share a patch, to multiply by it only once."""
        held = None if self.packed is None or self.packed.decoder is None else self.packed.decoder.held_patch
        if held is not None:
            held.hold(holds)

    def begin(self, rows: int, columns: int, count: int, device: torch.device) -> None:
        """Makes room for steps of so many columns, `count` bytes of each row in all."""
        self.cache.begin(rows, count, True, device)
        self.is_compiled = self.compiles and rows == 1 and columns == round_up_bytes(columns)

    def _read(self, input_ids: Tensor, lengths: list[int] | None = None) -> BytesRead:
        rows, columns = input_ids.shape
        self.begin(rows, columns, columns, input_ids.device)
        on_device = None if lengths is None else torch.tensor(lengths, device=input_ids.device)
        return self._run_read(input_ids, on_device)

    def _run_read(self, input_ids: Tensor, lengths: Tensor | None) -> BytesRead:
        if self.is_compiled:
            input_ids = of_one_stride(input_ids)
        stage = self.stage(read_next, input_ids.shape[1])
        return stage(self.model, self.settings, self.cache, self.packed, input_ids, lengths)

    def _close_patches(self, read: BytesRead, counts: HostPatchCounts) -> None:
        cache, columns = self.cache, read.chunk.num_columns
        is_fixed = self.is_compiled or self.graphs is not None
        if not is_fixed or (columns > 1 and counts.max_new > STEP_PATCHES):
            all_rows = 0 not in counts.new or self.all_rows
            close_patches(self.model, cache, read, closing_inputs(cache, read, counts, all_rows))
        else:
            self._close_patches_fixed(read, counts, reserve_closing(cache, columns, counts))

    def _close_patches_fixed(self, read: BytesRead, counts: HostPatchCounts, sizes: tuple[int, int]) -> None:
        inputs = closing_inputs(self.cache, read, counts, 0 not in counts.new or self.all_rows, sizes)
        stage = self.stage(close_patches, read.chunk.num_columns)
        if stage is not close_patches:
            torch._dynamo.maybe_mark_dynamic(inputs.seen_slots, 0)
        stage(self.model, self.cache, read, inputs)

    def _predict(self, read: BytesRead) -> Tensor:
        stage = self.stage(predict_bytes, read.chunk.num_columns)
        return stage(self.model, self.settings, self.cache, read, None, self.head)

    def stage(self, function: Callable, columns: int) -> Callable:
        """Returns a stage as this step runs it: compiled, or as it is."""
        if not self.is_compiled:
            return function
        return self.model.compiled_steps.find(function, (columns, self.hooks), self.cache, self.starts_by_cpp)


def of_one_stride(tensor: Tensor) -> Tensor:
    """Copies an input to contiguous memory: compiled code guards on strides, and a slice has those of its source."""
    return tensor.clone(memory_format=torch.contiguous_format)


def read_next(
    model: nn.Module, settings: ForwardSettings, cache: BltCache, packed: PackedStacks | None,
    input_ids: Tensor, lengths: Tensor | None,
) -> BytesRead:  # fmt: skip
    """Reads the next bytes `(B, S)` of each row, `lengths` `(B,)` of which count (None: all)."""
    chunk = next_bytes(input_ids, lengths, cache, settings.documents)
    chunk.packed = packed
    return read_bytes(model, settings, chunk, cache)


# Compiled steps.


def round_up_bytes(count: int) -> int:
    """Rounds up the bytes of a compiled step that reads `count` of one row."""
    return 1 if count == 1 else -(-count // _STEP_BYTES) * _STEP_BYTES


def is_spread(model: nn.Module) -> bool:
    """Tells whether accelerate has spread a model over devices."""
    return any(hasattr(part, "_hf_hook") for part in (model, *model.children()))


def hooks_of(*roots: nn.Module | None) -> tuple:
    """Lists modules with hooks or another `forward`, and counts their hooks, for which compiled code has no guards."""
    modules = [module for root in roots if root is not None for module in root.modules()]
    counts = ((id(m), len(m._forward_hooks), len(m._forward_pre_hooks), id(vars(m).get("forward"))) for m in modules)
    plain = id(None)
    return len(_global_forward_hooks), *(c for c in counts if c[1] or c[2] or c[3] != plain)


def is_own_code(settings: ForwardSettings, hooks: tuple, *roots: nn.Module | None) -> bool:
    """Tells whether steps run code of torch and of this package alone: no adapter, quantizer, hook or registered rule."""
    modules = [module for root in roots if root is not None for module in root.modules()]
    names = {type(module).__module__ for module in modules}
    home = __name__.rpartition(".")[0]
    return (
        settings.rule.mode in PATCHING_MODES
        and hooks == (0,)
        and all(name.startswith(("torch.nn.", "transformers.activations", f"{home}.")) for name in names)
        and all(type(weight) is nn.Parameter for module in modules for weight in module.parameters(recurse=False))
    )


class CompiledSteps(dict):
    """Holds the compiled stages of a model, by function and settings; a copy of the model starts anew.

    The steps of one row are compiled: for a byte, or for a verification that is filled up to one of a few lengths, each
    stage is one graph in which no shape varies but the number of patches so far. Several rows come in many shapes: a
    graph for all of them takes minutes to compile, and saves little beside the work of each byte.
    """

    def __reduce__(self) -> tuple:  # for copies and pickles
        return CompiledSteps, ()

    def find(self, function: Callable, key: tuple, cache: BltCache, starts_by_cpp: bool) -> Callable:
        """Returns `function`, compiled as `cache` says; `key`: further settings that its compiled forms depend on."""
        key = (function.__name__, cache.compile_key, starts_by_cpp, *key)
        if key not in self:
            self[key] = _compile(function, cache.compile_settings, starts_by_cpp)
        return self[key]


def _compile(function: Callable, settings: dict, starts_by_cpp: bool) -> Callable:
    settings, options = {**settings}, dict(settings.get("options") or {})
    if settings.get("backend", "inductor") == "inductor":
        if (mode := settings.pop("mode", None)) is not None:  # torch takes a mode or options
            options = {**torch._inductor.list_mode_options(mode, settings.get("dynamic")), **options}
        options["triton.cudagraphs"] = False  # `CudaGraphs` captures the stages, compiled or not
        # Without Python's lock, and compiled together with the kernels: both faster. torch's C++ lacks some operations.
        options.setdefault("cpp_wrapper", starts_by_cpp)
    # A copy with a code object of its own, to which torch attaches compiled code and the limit of recompilations.
    code, name = function.__code__.replace(), function.__name__
    copied = FunctionType(code, function.__globals__, name, function.__defaults__)
    return torch.compile(copied, **{**settings, "options": options or None})


# CUDA graphs, which `blt_hf.cuda_graphs` captures.


def can_capture(device: torch.device) -> bool:
    """Tells whether a device has CUDA graphs."""
    return device.type == "cuda"


def captures_by_default(device: torch.device) -> bool:
    """Tells whether `generate` captures CUDA graphs by default."""
    return CAPTURES_BY_DEFAULT and can_capture(device)


def make_runner(
    model: nn.Module, cache: BltCache, packs: bool = True, captures: bool = True, is_watched: bool = False
) -> StepRunner:
    """Makes the runner of steps of a causal model, with its weights of now, on a cache that holds some text.

    Args:
        packs: run on packed weights, where the modules allow it.
        captures: capture CUDA graphs, if `cache.is_fixed` and the device has them. Steps run as they are where the package
            is not installed, and where accelerate has spread the model over devices.
        is_watched: code that may change the model runs between the steps, so look for changes before each.
    """
    module, model, head = None, model.model, model.lm_head
    packed = PackedStacks(model, cache) if packs else None
    if captures and cache.is_fixed and can_capture(cache.num_bytes.device) and not is_spread(model):
        module = import_where_installed("cuda_graphs")
    graphs = None if module is None else module.CudaGraphs.of(model, head, cache)
    if graphs is None:
        return StepRunner(model, cache, head, packed)
    return module.capturing(StepRunner)(model, cache, head, packed, graphs, is_watched)
