"""The names under which clients find a BLT in the module `transformers`.

TRL and `transformers serve` read `architectures` in config.json and take the class of that name from `transformers`. The
names `Blt...` there are those of the in-tree classes, and code that comes with a checkpoint overrides nothing. So a
checkpoint with code names an architecture that transformers does not have, and its code adds that name: it stands for
the Auto class, which finds the model's own class in `auto_map`. `import blt_hf` puts the class itself there.
"""

import gc
import importlib
import sys
from types import ModuleType


# Class, and the Auto class that loads it.
AUTO_CLASSES = {
    "BltModel": "AutoModel",
    "BltForCausalLM": "AutoModelForCausalLM",
    "BltPatcher": "AutoModelForCausalLM",
    "BltForSequenceClassification": "AutoModelForSequenceClassification",
    "BltForTokenClassification": "AutoModelForTokenClassification",
}


def architecture_name(class_name: str) -> str:
    """What `architectures` calls a class: `BltForCausalLM` is `BltHfForCausalLM`; names of other classes stay."""
    return class_name.replace("Blt", "BltHf", 1) if class_name in AUTO_CLASSES else class_name


def transformers_modules() -> list[ModuleType]:
    """Every object that has been `sys.modules["transformers"]`.

    There are two in most processes: `transformers.processing_utils` runs `transformers/__init__.py` again, and those who
    imported transformers before that keep the first object. It is imported here, so that no third one comes later.
    """
    importlib.import_module("transformers.processing_utils")
    current = sys.modules["transformers"]
    referrers = gc.get_referrers(type(current))  # an object refers to its class; nothing else lists the modules
    modules = [item for item in referrers if isinstance(item, ModuleType) and item.__name__ == "transformers"]
    return [current, *(module for module in modules if module is not current)]


def add_architectures() -> None:
    """Adds the names of `architectures` to `transformers`; a name that is there stays what it is."""
    auto = importlib.import_module("transformers.models.auto")
    for module in transformers_modules():
        for class_name, auto_class in AUTO_CLASSES.items():
            vars(module).setdefault(architecture_name(class_name), getattr(auto, auto_class))


__all__ = ["AUTO_CLASSES", "add_architectures", "architecture_name", "transformers_modules"]
