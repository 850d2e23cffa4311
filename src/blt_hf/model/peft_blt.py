"""What PEFT must know of a BLT: default target modules, bags of hashes, and that the entropy model is not to adapt.

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
_HASHES = "BltHashEmbedding"  # by name: code from the Hub has a class of its own
_READS_BAGS = ("lora.Embedding", "lora.ParamWrapper", "oft.Embedding")
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


def _sums_bags(module: nn.Module | None) -> bool:
    """Whether a module looks up many rows for each position, and sums them."""
    return any(cls.__name__ == _HASHES for cls in type(module).__mro__)


def _summing_bags(embed):
    """LoRA's own look-up, which the rank-`r` rows of a bag leave one by one."""

    @functools.wraps(embed)
    def wrapper(self, *args, **kwargs):
        rows = embed(self, *args, **kwargs)
        return rows.sum(dim=-2) if _sums_bags(self.get_base_layer()) else rows

    return wrapper


def _refusing_single_rows(function):
    @functools.wraps(function)
    def wrapper(self, model, *args, **kwargs):
        result = function(self, model, *args, **kwargs)
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
    tuners_utils, lora, constants, other = (
        importlib.import_module(f"peft.{name}")
        for name in ("tuners.tuners_utils", "tuners.lora.layer", "utils.constants", "utils.other")
    )
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            for model_type in (_MODEL_TYPE, _PATCHER_TYPE):
                table.setdefault(model_type, table["llama"])
    tuner = tuners_utils.BaseTuner
    if not hasattr(tuner.inject_adapter, _MARK):
        tuner.inject_adapter = _refusing_single_rows(_hiding_patcher(tuner.inject_adapter, 1))
        setattr(tuner.inject_adapter, _MARK, True)
        lora.Embedding._embed = _summing_bags(lora.Embedding._embed)
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
