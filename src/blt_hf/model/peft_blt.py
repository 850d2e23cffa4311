"""What a BLT answers when PEFT asks it what to adapt; PEFT itself is neither imported here nor changed.

PEFT finds what to adapt by the names of modules, and an entropy model has a `q_proj` and an `lm_head` as other stacks
do. No setting of PEFT's says "never these" for all of its methods, so a BLT does not show its entropy model to PEFT.
"""

import importlib
import sys


_LIKE = "llama"  # whose defaults fit: queries, keys and values have the same names


def asked_by_peft() -> bool:
    """Whether the caller of the function that calls this is a walk over modules in PEFT's code.

    Parents walk over their modules by asking each child, so torch's frames in between do not count. What counts
    parameters or buffers walks over modules too, and is to see all of them.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        if frame.f_code.co_name == "_named_members":
            return False
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "peft"


def add_default_targets() -> None:
    """Adds model types to PEFT's tables of default targets, if PEFT is there: what it adapts in a Llama.

    A model type that is in a table keeps what it has there.
    """
    if "peft" not in sys.modules:
        return
    # Not as a statement: code on the Hub is refused where a package that it imports by name is missing.
    constants = importlib.import_module("peft.utils.constants")
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and _LIKE in table:
            for model_type in ("blt", "blt_patcher"):
                table.setdefault(model_type, table[_LIKE])


__all__ = ["add_default_targets", "asked_by_peft"]
