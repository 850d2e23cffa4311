"""All changes of `import blt_hf` in other libraries. Each module names its change, the reason, and the failure without."""

from .auto import register_auto_classes
from .names import take_over_names
from .peft import teach_peft_when_imported
from .pipelines import keep_characters_whole


def register() -> None:
    """Makes all changes of `import blt_hf` outside this package."""
    register_auto_classes()
    take_over_names()
    teach_peft_when_imported()
    keep_characters_whole()


__all__ = ["register"]
