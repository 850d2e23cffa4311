"""What PEFT must know of a BLT: default target modules, and that the entropy model is not for it to adapt.

PEFT finds what to adapt by the names of modules, and an entropy model has a `q_proj` and an `lm_head` as other stacks
do. No setting of PEFT's says "never these" for all of its methods, so the entropy model is out of sight while PEFT
looks. PEFT itself is not imported here: all this happens when somebody else imports it.
"""

import functools
import importlib
import importlib.abc
import sys
from contextlib import contextmanager

from torch import nn


_MODEL_TYPE, _PATCHER_TYPE = "blt", "blt_patcher"
_PATCHER = "patcher"  # name of the entropy model in a `BltModel`
_MARK = "_knows_blt"


def _model_type(config) -> str | None:
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def _owners_of_patchers(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if _model_type(getattr(module, "config", None)) == _MODEL_TYPE and module._modules.get(_PATCHER) is not None
    ]


@contextmanager
def hidden_patcher(model: nn.Module):
    """Inside this context, walks over the modules of `model` do not meet the entropy models of the BLTs in it."""
    held = [(owner, owner._modules[_PATCHER]) for owner in _owners_of_patchers(model)]
    for owner, _ in held:
        owner._modules[_PATCHER] = None  # keeps its place in the order
    try:
        yield
    finally:
        for owner, patcher in held:
            owner._modules[_PATCHER] = patcher


def _hiding_patcher(function, model_position: int):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with hidden_patcher(kwargs["model"] if "model" in kwargs else args[model_position]):
            return function(*args, **kwargs)

    return wrapper


def _refusing_prompts(function):
    @functools.wraps(function)
    def wrapper(peft_config, model_config, *args, **kwargs):
        if _model_type(model_config) == _MODEL_TYPE:
            peft_type = getattr(peft_config.peft_type, "value", peft_config.peft_type)
            raise ValueError(
                f"`peft_type={peft_type!r}` puts vectors that stand for no byte in front of the text, and a Byte "
                "Latent Transformer finds patches and hashes from bytes; use a method that adapts modules (LORA, IA3)."
            )
        return function(peft_config, model_config, *args, **kwargs)

    return wrapper


def _replace_everywhere(module, name: str, wrap) -> None:
    """Wraps a function of PEFT, also where it has been imported by name."""
    function = getattr(module, name)
    if hasattr(function, _MARK):
        return
    wrapper = wrap(function)
    setattr(wrapper, _MARK, True)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").partition(".")[0] == "peft" and vars(other).get(name) is function:
            setattr(other, name, wrapper)


def teach_peft() -> None:
    """Changes PEFT, which has been imported; what a method adapts by default in a Llama, it adapts in a BLT."""
    # Not as statements: code on the Hub is refused where a package that it imports by name is missing.
    tuners_utils, constants, other = (
        importlib.import_module(f"peft.{name}") for name in ("tuners.tuners_utils", "utils.constants", "utils.other")
    )
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            for model_type in (_MODEL_TYPE, _PATCHER_TYPE):
                table.setdefault(model_type, table["llama"])
    tuner = tuners_utils.BaseTuner
    if not hasattr(tuner.inject_adapter, _MARK):
        tuner.inject_adapter = _hiding_patcher(tuner.inject_adapter, 1)
        setattr(tuner.inject_adapter, _MARK, True)
    _replace_everywhere(other, "_set_trainable", lambda function: _hiding_patcher(function, 0))
    _replace_everywhere(other, "_prepare_prompt_learning_config", _refusing_prompts)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Calls [`teach_peft`] once `peft` has been imported, and changes nothing else about the import."""

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
    """Calls [`teach_peft`] now if `peft` is there, else when it comes."""
    if "peft" in sys.modules:
        teach_peft()
    elif not any(type(finder).__name__ == _PeftFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


__all__ = ["hidden_patcher", "teach_peft", "teach_peft_when_imported"]
