"""The names under which other libraries know a BLT, and the way from code that travels to the rest of the package.

**The cache** is called `past_key_values` up to transformers 5.23, `cache` from 5.24 on. Our own arguments say
`past_key_values`; outputs, and the keyword arguments of `generate`, use the name of the installed transformers.

**Architectures.** TRL and `transformers serve` do `getattr(transformers, config.architectures[0])`. The names `Blt...`
there are those of the in-tree classes, and code that comes with a checkpoint overrides nothing. So a checkpoint with code
says `BltHfForCausalLM`, a name that transformers does not have, and its code adds that name: an alias of the Auto class,
which finds the model's own class in `auto_map`. `import blt_hf` puts the class itself there.

**Tracing.** While `torch.compile` or `torch.export` traces a forward, neither values nor lengths are known. A compiled
forward may be traced anew for other lengths; an exported one serves all of them, so it has no branch on a length. Both
have a symbolic size for the number of patches, which only the entropies tell.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from transformers.generation import GenerateDecoderOnlyOutput


CACHE_NAMES = ("past_key_values", "cache")  # `cache` alone, when transformers 5.24 is the oldest supported
CACHE_NAME = next(field.name for field in fields(GenerateDecoderOnlyOutput) if field.name in CACHE_NAMES)
IS_FROM_CHECKPOINT = not __name__.startswith("blt_hf.")
"""This code came with a checkpoint; it is not the installed package."""
_IS_NOT_HERE = "is not part of the code that comes with a checkpoint: `pip install blt-hf`"
_LIKE = "llama"  # whose default targets of PEFT fit: queries, keys and values have the same names
_Function = TypeVar("_Function", bound=Callable)

# The task of each class, as transformers spells it in the names of Auto classes and in those of its tables.
_TASKS = {
    "BltModel": ("", None),
    "BltForCausalLM": ("ForCausalLM", "CAUSAL_LM"),
    "BltPatcher": ("ForCausalLM", "CAUSAL_LM"),
    "BltForSequenceClassification": ("ForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "BltForTokenClassification": ("ForTokenClassification", "TOKEN_CLASSIFICATION"),
}
AUTO_CLASSES = {name: f"AutoModel{task}" for name, (task, _) in _TASKS.items()}
TASK_TABLES = {name: f"MODEL_FOR_{table}_MAPPING_NAMES" for name, (_, table) in _TASKS.items() if table}


def takes_cache(function: _Function) -> _Function:
    """Lets callers name the argument `past_key_values` of a function `cache` as well.

    The signature shows the name of the installed transformers, which reads signatures to see the arguments of a model.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.get("past_key_values") is not None:
                raise ValueError("`past_key_values` and `cache` are two names of one argument; got both.")
            kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    wrapper.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name=CACHE_NAME) if parameter.name == "past_key_values" else parameter
            for parameter in signature.parameters.values()
        ]
    )
    return wrapper


def architecture_name(class_name: str) -> str:
    """Returns the name of a class in `architectures`: `BltForCausalLM` is `BltHfForCausalLM`; other names stay."""
    return class_name.replace("Blt", "BltHf", 1) if class_name in AUTO_CLASSES else class_name


def add_architectures() -> None:
    """Adds the names of `architectures` to `transformers`; existing names keep their meaning.

    `transformers.processing_utils` runs `transformers/__init__.py` again, so most processes have two module objects of
    that name. Whoever imported transformers early (TRL, a script) holds the first one.
    """
    importlib.import_module("transformers.processing_utils")  # here, so that no other object comes later
    auto, current = importlib.import_module("transformers.models.auto"), sys.modules["transformers"]
    held = (value for module in list(sys.modules.values()) for value in list(getattr(module, "__dict__", {}).values()))
    for module in (current, *(v for v in held if type(v) is type(current) and v.__name__ == "transformers")):
        for class_name, auto_class in AUTO_CLASSES.items():
            vars(module).setdefault(architecture_name(class_name), getattr(auto, auto_class))


def add_tasks() -> None:
    """Adds the classes to transformers' tables of tasks."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    for class_name, table_name in TASK_TABLES.items():
        table = getattr(tables, table_name)
        if class_name not in table.values():
            # The Auto classes take classes from the same tables by `model_type`, and no model has this one.
            table[architecture_name(class_name)] = class_name


def add_default_targets() -> None:
    """Gives our model types a Llama's default targets in PEFT's tables, if PEFT was imported; existing entries stay."""
    if "peft" not in sys.modules:
        return
    # Not as a statement: code on the Hub is refused where a package that it imports by name is missing.
    constants = importlib.import_module("peft.utils.constants")
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and _LIKE in table:
            for model_type in ("blt", "blt_patcher"):
                table.setdefault(model_type, table[_LIKE])


def check_patcher(patcher: nn.Module) -> None:
    """Refuses to train a model whose entropy model has a weight that requires a gradient.

    The package hides the entropy model from PEFT (`integrations/peft.py`), so this concerns code from a checkpoint alone.

    Raises:
        ValueError: names the weight.
    """
    if not IS_FROM_CHECKPOINT:
        return
    for name, weight in patcher.named_parameters():
        if weight.requires_grad:
            raise ValueError(
                f"the entropy model is not trained with the rest, and its weight {name!r} requires a gradient. Give PEFT "
                "`exclude_modules=r'.*patcher.*'`, or install the package (`pip install blt-hf`) and `import blt_hf` "
                "before the model is loaded; what no adapter brought is frozen by `freeze_patcher()` of the `BltModel`."
            )


def import_from_package(name: str, feature: str) -> ModuleType:
    """Imports `blt_hf.<name>`, which does not travel with checkpoints.

    Args:
        name: of the module, within `blt_hf`.
        feature: begins the error's sentence.
    Raises:
        ImportError: this code came with a checkpoint. Even where the package is installed, the module would make objects
            of the package's own classes, which are others than these.
    """
    if IS_FROM_CHECKPOINT:
        raise ImportError(f"{feature} {_IS_NOT_HERE}, and `import blt_hf` before the model is loaded.")
    name = f"blt_hf.{name}"
    # torch.compile traces the look-up, but no import.
    return sys.modules[name] if name in sys.modules else importlib.import_module(name)


@functools.cache
def import_where_installed(name: str, feature: str | None = None) -> ModuleType | None:
    """Imports `blt_hf.<name>`, a module that imports no class of the model. None: `blt_hf` is not installed.

    If `blt_hf` was not imported, only this file is executed, since importing the package replaces the in-tree classes.

    Raises:
        ImportError: no package is installed, and `feature`, which begins the error's sentence, cannot do without it.
    """
    full_name = f"blt_hf.{name}"
    if sys.modules.get("blt_hf") is not None:
        return importlib.import_module(full_name)
    try:
        package = importlib.util.find_spec("blt_hf")
    except ImportError:
        package = None
    if package is None and feature is not None:
        raise ImportError(f"{feature} {_IS_NOT_HERE}; it need not be imported.")
    if package is None:
        return None
    path = os.path.join(next(iter(package.submodule_search_locations)), *name.split(".")) + ".py"
    spec = importlib.util.spec_from_file_location(full_name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_count(counts: Tensor, least: int) -> int:
    """Gives the host the largest of `counts` `(B,)`, at least `least`; under tracing a symbolic size of that range."""
    largest = counts.max().clamp_min(least).item()
    if is_compiling():
        torch._check(largest >= least)
    return largest


_LONGEST_KEPT = 1024
_aranges: dict[tuple, Tensor] = {}


def kept_arange(start: int, stop: int, device: torch.device) -> Tensor:
    """Does `torch.arange`; short ranges are made once a process and kept."""
    if is_compiling() or stop - start > _LONGEST_KEPT:
        return torch.arange(start, stop, device=device)
    key = start, stop, device
    if (kept := _aranges.get(key)) is None:
        with torch.inference_mode(False):
            kept = torch.arange(start, stop, device=device)
        if type(kept) is Tensor:  # not one of a trace
            _aranges[key] = kept
    return kept


def sliding_windows(values: Tensor, dim: int, size: int, step: int = 1) -> Tensor:
    """Does `values.unfold(dim, size, step)`, also in export: torch's branches on the number of windows, ONNX has none."""
    if not is_exporting():
        return values.unfold(dim, size, step)
    count = (values.shape[dim] - size) // step + 1
    first = torch.arange(count, device=values.device)[:, None] * step
    index = first + torch.arange(size, device=values.device)
    return values.index_select(dim, index.flatten()).unflatten(dim, (count, size)).movedim(dim + 1, -1)


def running_max(values: Tensor, least: Tensor) -> Tensor:
    """Takes the running maximum along the rows of `values` `(B, S)`, which ONNX does not have.

    Args:
        values: int64; not below `least`, and not falling where they are above it.
        least: int64 `(B,)`.
    """
    if not is_exporting():
        return values.cummax(dim=1).values
    rises = values > least[:, None]
    entry = rises.long().cumsum(dim=1)
    risen = torch.cat([least[:, None], values], dim=1).scatter(1, torch.where(rises, entry, 0), values)
    return risen.gather(1, entry)


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Takes the rows int64 `(R,)` of `values` `(B, ...)`; None: all."""
    return values if rows is None else values.index_select(0, rows)


def take_columns(values: Tensor, start: int, stop: int) -> Tensor:
    """Takes `values[:, start:stop]` of `(B, S, ...)`; a slice branches on being the whole, or a single column."""
    if not is_exporting():
        return values[:, start:stop]
    return values.index_select(1, torch.arange(start, stop, device=values.device))
