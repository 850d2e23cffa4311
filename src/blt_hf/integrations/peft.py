"""PEFT: default targets, adapters of hash embeddings, and a refusal of methods that put vectors before the text.

Changes, reasons, failures without them, and the test in tests/integrations/test_still_needed.py that fails when
PEFT no longer needs it:

- The tables of default targets get an entry `blt`. PEFT has none for this model type. `LoraConfig()` then asks for
  `target_modules`. Test: `peft_has_no_defaults`.
- `lora.Embedding._embed` sums the rows of a bag. A hash embedding looks up many rows for each byte, PEFT one. Adapters
  of hash embeddings then raise on shapes. Test: `peft_looks_up_single_rows`.
- `BaseTuner.inject_adapter` refuses other methods on hash embeddings, which raise on shapes at the first forward.
  Test: `peft_looks_up_single_rows`.
- `inject_adapter` of all tuners, and `_set_trainable` (`modules_to_save`, `trainable_token_indices`), do not meet the
  entropy model of a BLT. PEFT finds modules to adapt by their names, and an entropy model has a `q_proj` and an
  `lm_head` as other stacks do; `exclude_modules` is not known to all of PEFT's methods. The entropy model would get
  adapters that never get a gradient, take memory, and make DDP complain. Test: `peft_adapts_by_name`.
- `_prepare_prompt_learning_config` refuses prompt learning: patches and hashes are found from bytes, and a vector is
  none. The first forward then raises without naming the cause. Test: `peft_accepts_prompts`.
- Methods that count positions are refused: `peft_positions.py`.
- A finder stands first in `sys.meta_path` until PEFT is imported, because `import blt_hf` may not take the time to
  import PEFT. The order of imports then matters. Test: `importing_peft_is_slow`.
"""

import functools
import importlib
import importlib.abc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..model.layers_blt import BltHashEmbedding
from ..model.names_blt import add_default_targets
from ..model.stacks_blt import BltPatcher
from .peft_positions import refuse_counting_methods


_READS_BAGS = ("lora.Embedding", "lora.ParamWrapper", "oft.Embedding")
_MARK = "_knows_blt"


def _sums_bags(module: nn.Module | None) -> bool:
    """Tells whether a module sums many rows for each position; by name, for code from the Hub."""
    return any(cls.__name__ == BltHashEmbedding.__name__ for cls in type(module).__mro__)


def _summing_bags(embed):
    """Wraps LoRA's look-up, which returns the rows of a bag one by one, and sums them."""

    @functools.wraps(embed)
    def wrapper(self, *args, **kwargs):
        rows = embed(self, *args, **kwargs)
        return rows.sum(dim=-2) if _sums_bags(self.get_base_layer()) else rows

    return wrapper


def _holds_patcher(module: nn.Module) -> bool:
    """Tells whether a module is a BLT with an entropy model; by name, for code from the Hub."""
    return any(cls.__name__ == BltPatcher.__name__ for cls in type(module._modules.get("patcher")).__mro__)


@contextmanager
def _hidden_patchers(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Hides the entropy models in `model` from `named_modules`, and yields them. Can be nested."""
    holders = [module for module in model.modules() if _holds_patcher(module) and "named_modules" not in vars(module)]

    def hide(holder: nn.Module) -> None:
        def named_modules(memo=None, prefix="", remove_duplicate=True):
            memo = set() if memo is None else memo
            memo.add(holder.patcher)
            return type(holder).named_modules(holder, memo, prefix, remove_duplicate)

        holder.named_modules = named_modules

    for holder in holders:
        hide(holder)
    try:
        yield [holder.patcher for holder in holders]
    finally:
        for holder in holders:
            del holder.named_modules


def _sparing_patchers(function, argument: int):
    """Wraps a function of PEFT so that it does not see entropy models. Its model is the argument at `argument`."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        model = args[argument] if len(args) > argument else kwargs["model"]
        with _hidden_patchers(model) as patchers:
            result = function(*args, **kwargs)
        for patcher in patchers:
            patcher.requires_grad_(False)  # as PEFT does with all weights that it meets
        return result

    return wrapper


def _refusing_single_rows(inject_adapter):
    @functools.wraps(inject_adapter)
    def wrapper(self, model, *args, **kwargs):
        result = inject_adapter(self, model, *args, **kwargs)
        for name, module in model.named_modules():
            if not _sums_bags(module._modules.get("base_layer")):
                continue
            method = type(module).__module__.split(".")[-2]
            if f"{method}.{type(module).__name__}" not in _READS_BAGS:
                argument = "trainable_token_indices" if name.endswith(".token_adapter") else "target_modules"
                raise ValueError(
                    f"`{argument}` names {name.removesuffix('.token_adapter')!r}, which sums a bag of rows for each "
                    f"byte, and {method!r} looks one row up; accepted there are LoRA, DoRA and OFT in "
                    "`target_modules`, and `modules_to_save`."
                )
        return result

    return wrapper


def _refusing_prompts(prepare):
    @functools.wraps(prepare)
    def wrapper(peft_config, model_config, *args, **kwargs):
        is_dict = isinstance(model_config, dict)
        model_type = model_config.get("model_type") if is_dict else getattr(model_config, "model_type", None)
        if model_type == "blt":
            peft_type = getattr(peft_config.peft_type, "value", peft_config.peft_type)
            raise ValueError(
                f"`peft_type={peft_type!r}` puts vectors that stand for no byte in front of the text, and a Byte "
                "Latent Transformer finds patches and hashes from bytes; use a method that adapts modules (LORA, IA3)."
            )
        return prepare(peft_config, model_config, *args, **kwargs)

    return wrapper


def _replace_everywhere(module, name: str, wrap) -> None:
    """Wraps a function of PEFT in every module that has imported it by name."""
    function = getattr(module, name)
    wrapper = wrap(function)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").partition(".")[0] == "peft" and vars(other).get(name) is function:
            setattr(other, name, wrapper)


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def teach_peft() -> None:
    """Makes all changes to PEFT, which must have been imported."""
    add_default_targets()
    tuners_utils, lora, other = (
        importlib.import_module(f"peft.{name}") for name in ("tuners.tuners_utils", "tuners.lora.layer", "utils.other")
    )
    tuner = tuners_utils.BaseTuner
    if hasattr(tuner.inject_adapter, _MARK):
        return
    refuse_counting_methods(_replace_everywhere)
    tuner.inject_adapter = _refusing_single_rows(tuner.inject_adapter)
    for cls in _with_subclasses(tuner):
        if "inject_adapter" in vars(cls):
            cls.inject_adapter = _sparing_patchers(cls.inject_adapter, 1)
    setattr(tuner.inject_adapter, _MARK, True)
    _replace_everywhere(other, "_set_trainable", lambda function: _sparing_patchers(function, 0))
    lora.Embedding._embed = _summing_bags(lora.Embedding._embed)
    _replace_everywhere(other, "_prepare_prompt_learning_config", _refusing_prompts)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Calls [`teach_peft`] when `peft` is imported, and changes nothing else about the import."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft":
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        # Many only ask whether there is a spec, so this finder stays until the module runs.
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                teach_peft()

            spec.loader.exec_module = exec_module
        return spec


def teach_peft_when_imported() -> None:
    """Calls [`teach_peft`] now if `peft` has been imported, else when it is imported."""
    if "peft" in sys.modules:
        teach_peft()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


__all__ = ["teach_peft", "teach_peft_when_imported"]
