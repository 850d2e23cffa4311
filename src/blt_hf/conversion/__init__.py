"""Meta's BLT checkpoints to transformers checkpoints and back."""

from .checkpoints import (
    META_ARGS_FILE,
    config_from_meta_args,
    convert_meta_checkpoint,
    export_meta_checkpoint,
    meta_args_from_config,
    tensor_specs,
)


__all__ = [
    "META_ARGS_FILE",
    "config_from_meta_args",
    "convert_meta_checkpoint",
    "export_meta_checkpoint",
    "meta_args_from_config",
    "tensor_specs",
]
