"""Byte Latent Transformers in vLLM.

vLLM finds this package by its entry point and calls [`register`] in each of its processes; then `LLM(...)` and vLLM's
server take a BLT by its name. Nothing of vLLM is replaced.
"""

import logging


ARCHITECTURES = ("BltHfForCausalLM", "BltForCausalLM")
"""What the files of a BLT call its class: `save_pretrained` of blt-hf, and transformers' own class."""

OLDEST_VLLM, FIRST_UNTESTED_VLLM = (0, 29), (0, 33)
"""The tests have passed with versions from the first to before the second."""

logger = logging.getLogger("vllm.blt_hf_vllm")  # shown as vLLM's own lines are


def register() -> None:
    """Tells vLLM about BLT: the class of the model, and what it needs of the engine's settings. May be called again."""
    from vllm import ModelRegistry

    import blt_hf  # noqa: F401 (makes the Auto classes know BLT)

    try:
        # The table of settings that models force on the engine, which vLLM has for its own models alone.
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .settings import BltSettings
    except ImportError as error:  # other models are to run all the same
        logger.error("BLT models cannot be served with this vLLM (tested: %s): %s", tested_versions(), error)
        return
    for name in ARCHITECTURES:
        if MODELS_CONFIG_MAP.get(name) is not BltSettings:
            ModelRegistry.register_model(name, "blt_hf_vllm.model:BltForCausalLM")
            MODELS_CONFIG_MAP[name] = BltSettings


def tested_versions() -> str:
    """The versions of vLLM that this package is tested with, as pip writes them."""
    oldest, untested = (".".join(map(str, version)) for version in (OLDEST_VLLM, FIRST_UNTESTED_VLLM))
    return f"vllm>={oldest},<{untested}"


__all__ = ["ARCHITECTURES", "register", "tested_versions"]
