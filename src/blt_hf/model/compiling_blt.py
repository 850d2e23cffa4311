"""Compiled decoding: what is compiled, and how long it holds.

Before each call of compiled code torch asks again whatever it took for granted about the model, more than a thousand
questions for each part of a byte. Here all modules are looked at once, and torch asks about the rest alone.
"""

from collections.abc import Callable
from types import FunctionType

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


_WITH_ADDRESS = (torch.Tensor, nn.Parameter)  # subclasses may keep their values anywhere
_STEP_BYTES = 8  # compiled steps of several bytes read multiples of this, so that few shapes are compiled


def round_up_bytes(count: int) -> int:
    """Bytes of a compiled step that reads `count` of one row."""
    return 1 if count == 1 else -(-count // _STEP_BYTES) * _STEP_BYTES


def is_compiled(model, cache, num_rows: int) -> bool:
    """Whether a step of so many rows is compiled."""
    return num_rows == 1 and cache.compile_config is not None and _can_compile(model)


def is_spread(model) -> bool:
    """Whether accelerate has spread a model over devices."""
    return any(hasattr(part, "_hf_hook") for part in (model, *model.children()))


def _can_compile(model) -> bool:
    attention = model.config._attn_implementation
    return attention in ("eager", "sdpa") and not torch.is_grad_enabled() and not is_spread(model)


class ModuleState:
    """What compiled or recorded code takes for granted about the modules of a model.

    Args:
        roots: all modules below them are looked at.
    """

    def __init__(self, *roots: nn.Module):
        self.modules = [module for root in roots for module in root.modules()]
        # Its dictionaries stay those of a module; looking at them takes a third of asking the modules.
        self._fields = [vars(module) for module in self.modules]
        self._hooks = [f[name] for f in self._fields for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._children, self._tensors = (
            [f[name] for f in self._fields for name in names if f[name]]
            for names in (("_modules",), ("_parameters", "_buffers"))
        )
        self.facts = self._read()
        # Other libraries' modules (adapters, quantized layers) have settings of their own, and some rotary embeddings
        # change with the length.
        self.is_whole = all(_is_known(module) for module in self.modules)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self.facts == self._read()

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


def _guards(entries) -> list[bool]:
    """Which of torch's questions are asked: not those that [`ModuleState`] answers, and not whether code has changed."""
    return [_is_asked(entry) for entry in entries]


def _is_asked(entry) -> bool:
    name = entry.name
    is_about_code = name.startswith(("type(", "dict(type(", "G['__import_"))
    is_about_modules = name.startswith("model") and ".config" not in name
    return not (is_about_code or is_about_modules or entry.guard_type == "NOT_PRESENT_IN_GENERIC_DICT")


class CompiledSteps(dict):
    """What a model has compiled, by what it does and the settings it was compiled with; a copy of the model starts anew.

    Compiled is what one row runs: for a byte, or for a verification that is filled up to one of a few lengths, each part
    is one graph in which no shape varies but the number of patches so far. Several rows come in many shapes; a graph for
    all of them takes minutes to compile, and the work of each byte outweighs there what compiling saves.
    """

    def __deepcopy__(self, memo) -> "CompiledSteps":
        return CompiledSteps()

    def __reduce__(self):
        return CompiledSteps, ()

    def find(self, key: str, functions: list[Callable], cache, *roots: nn.Module) -> list[Callable]:
        """`functions`, which run modules below `roots`, compiled as `cache` says; anew if the modules have changed."""
        key = f"{key} {' '.join(str(id(root)) for root in roots)} {cache.compile_key}"
        state, compiled = self.get(key, (None, None))
        if state is None or not state.holds():
            state = ModuleState(*roots)
            compiled = [_compile(function, cache.compile_settings, state.is_whole) for function in functions]
            self[key] = state, compiled
        return compiled


def _compile(function: Callable, settings: dict, is_whole: bool) -> Callable:
    settings, options = {**settings}, dict(settings.get("options") or {})
    if settings.get("backend", "inductor") == "inductor":
        if (mode := settings.pop("mode", None)) is not None:  # torch takes a mode or options
            options = {**torch._inductor.list_mode_options(mode, settings.get("dynamic")), **options}
        # `recording_blt.py` records what runs, compiled or not.
        options["triton.cudagraphs"] = False
    plain = torch.compile(_own(function), **{**settings, "options": {**options} or None})
    if not is_whole or settings.get("mode") is not None:
        return plain
    # In one graph or not at all: pieces of it would be shared with other models that nobody asked about.
    settings.update(fullgraph=True, options={"guard_filter_fn": _guards, **options})
    return _WholeGraph(torch.compile(_own(function), **settings), plain)


def _own(function: Callable) -> Callable:
    """A function with code of its own: compiled code, and the limit of how often, hang on the code."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


class _WholeGraph:
    """Code that is compiled as one graph, and where torch cannot do that (with a rule of one's own, say), in pieces."""

    def __init__(self, whole: Callable, plain: Callable):
        self.whole, self.plain = whole, plain

    def __call__(self, *arguments):
        if self.whole is not None:
            try:
                return self.whole(*arguments)
            except Exception as error:
                refusals = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
                if not isinstance(error, refusals):
                    raise
                self.whole = None  # it was being recorded, so nothing has run
        return self.plain(*arguments)


__all__ = ["CompiledSteps", "ModuleState", "is_compiled", "is_spread", "round_up_bytes"]
