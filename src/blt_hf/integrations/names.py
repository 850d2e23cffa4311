"""The module `transformers`: the names of its in-tree BLT classes refer to this package's classes.

- Changed: `transformers.BltForCausalLM` and its eight siblings, and the names that this package adds (see
  `model/names_blt.py`). `transformers.models.blt` keeps the in-tree classes.
- Why: TRL, `transformers serve` and pipelines take the class that `architectures` in config.json names from there.
- Without it: they train and serve the in-tree class silently, or fail in its cached forward.
- The test that fails when it is no longer needed: `in_tree_blt_cannot_decode` in tests/integrations/test_still_needed.py.

There are several module objects of that name to write to: `processing_utils_runs_transformers_again` in the same file
fails when there is one.
"""

import gc
import importlib
import sys
from types import ModuleType

from ..model.configuration_blt import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from ..model.modeling_base_blt import BltPreTrainedModel
from ..model.modeling_blt import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
)
from ..model.names_blt import architecture_name


_CLASSES = (
    BltConfig,
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltModel,
    BltPatcher,
    BltPatcherConfig,
    BltPreTrainedModel,
)


def transformers_modules() -> list[ModuleType]:
    """Finds every object that has been `sys.modules["transformers"]`.

    Most processes have two: `transformers.processing_utils` runs `transformers/__init__.py` again, and whoever imported
    transformers before that keeps the first object. That module is imported here, so that no third object comes later.
    """
    importlib.import_module("transformers.processing_utils")
    current = sys.modules["transformers"]
    referrers = gc.get_referrers(type(current))  # an object refers to its class; nothing else lists the modules
    modules = [item for item in referrers if isinstance(item, ModuleType) and item.__name__ == "transformers"]
    return [current, *(module for module in modules if module is not current)]


def take_over_names() -> None:
    """Puts our classes under their names in every module object `transformers`."""
    for module in transformers_modules():
        for cls in _CLASSES:
            for name in (cls.__name__, architecture_name(cls.__name__)):
                setattr(module, name, cls)


__all__ = ["take_over_names"]
