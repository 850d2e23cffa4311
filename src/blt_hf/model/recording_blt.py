"""Steps on a GPU as CUDA graphs: the kernels of a part of a step, recorded once for a cache and run again in its memory.

A byte takes a thousand small kernels, and Python needs longer to start them than a GPU to run them. A cache whose tensors
stay where they are (`cache_implementation="static"`) records each part when it comes for the second time.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .compiling_blt import ModuleState
from .patching_blt import PatchingRule


def can_record(device: torch.device) -> bool:
    """Whether a device records what it runs."""
    return device.type == "cuda"


def make_place(device: torch.device) -> tuple | None:
    """Where the graphs of one cache are recorded: memory and a stream of their own."""
    return (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if device.type == "cuda" else None


def record(function: Callable, place: tuple) -> tuple[object, Callable[[], None]]:
    """What `function` returns, in tensors that get their values each time that the second result is called.

    Args:
        place: of [`make_place`].
    Raises:
        RuntimeError: it asks the device for a value, or does something else that cannot be recorded.
    """
    graph, (pool, stream) = torch.cuda.CUDAGraph(), place
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        result = function()
    return result, graph.replay


class _Recorded:
    """A part that was recorded: where it reads its inputs, what it gave, and how to run it again."""

    def __init__(self, function: Callable, inputs: tuple[Tensor | None, ...], place):
        self.inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        self.result, self.replay = record(lambda: function(*self.inputs), place)

    def run(self, inputs: tuple[Tensor | None, ...]):
        for held, tensor in zip(self.inputs, inputs):
            if held is not None:
                held.copy_(tensor)
        self.replay()
        return self.result


class Recorder:
    """The recorded parts of the steps of one cache.

    A part that goes on from what another part of the same step has left can be recorded only if that part was. Whatever
    the recorded kernels took for granted (where tensors lie, modules, settings) is looked at before each step, and a
    change makes all parts be recorded anew. What cannot be recorded runs as it is.
    """

    def __init__(self):
        self._parts: dict[tuple, _Recorded | None] = {}
        self._facts = self._state = self._head = self._layout = self._place = None
        self._refused = False
        self._first: tuple | None = None  # the first part of this step, if it was recorded

    def __deepcopy__(self, memo) -> "Recorder":
        return Recorder()

    def __reduce__(self):
        return Recorder, ()

    def begin(self, model: nn.Module, head: nn.Module | None, device: torch.device) -> None:
        """Looks for changes, at the start of each step; `head`: None where the step needs none."""
        self._head = self._head if head is None else head
        roots = (model,) if self._head is None else (model, self._head)
        config = model.config
        rule, attention = PatchingRule.from_config(config), config._attn_implementation
        facts = (*map(id, roots), rule, attention, torch.is_inference_mode_enabled())
        if self._state is None or facts != self._facts or not self._state.holds():
            self._parts.clear()
            self._facts, self._state = facts, ModuleState(*roots)
            self._refused = not self._state.is_whole
            self._place = self._place or make_place(device)
        self._first = None

    def run(self, cache, name: tuple, is_first: bool, function: Callable, *inputs: Tensor | None):
        """`function(*inputs)`, from its record where there is one.

        Args:
            name: says all that tells this part from others, but for the shapes of its inputs.
            is_first: it begins a step; the others go on from what it left.
        """
        if cache.layout != self._layout:
            self._parts.clear()
            self._layout, self._first = cache.layout, None
        if self._refused or (self._first is None and not is_first):
            return function(*inputs)
        key = (*name, *(None if tensor is None else tuple(tensor.shape) for tensor in inputs))
        key = key if is_first else (*key, self._first)
        if key not in self._parts:
            self._parts[key] = None  # the first run makes tensors and loads kernels
            return function(*inputs)
        if self._parts[key] is None:
            try:
                self._parts[key] = _Recorded(function, inputs, self._place)
            except RuntimeError as error:
                warnings.warn(
                    f"this model's steps cannot be recorded as CUDA graphs and run as they are: {error}", stacklevel=2
                )
                self._refused = True
                return function(*inputs)
        if is_first:
            self._first = key
        return self._parts[key].run(inputs)


__all__ = ["Recorder", "can_record", "make_place", "record"]
