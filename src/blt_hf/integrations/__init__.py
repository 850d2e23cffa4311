"""What other libraries are taught about BLT when `blt_hf` is imported; each module says what, and why."""

from .auto import register_auto_classes


def register() -> None:
    """Everything that `import blt_hf` changes outside this package."""
    register_auto_classes()


__all__ = ["register"]
