"""What a byteified model learns beside the layers of its token model, in a file of its own.

The file holds every tensor outside the layers of the global transformer, under its name in the model, and the two factors
of each adapted projection in these layers: `...q_proj.lora_A` `(r, in)` and `...q_proj.lora_B` `(out, r)`, whose product
is added to the weight. So a model is the token model's layers and this file.
"""

import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..conversion.files import write_whole
from ..model.modeling_blt import BltForCausalLM


_LAYERS = "model.global_transformer.layers."
_LEXICON = "model.local_decoder.lexicon."
_OF_TOKEN_MODEL = tuple(_LEXICON + name for name in ("keys.", "norm.", "spellings", "index."))
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PARAMETRIZED = re.compile(r"(.*)\.parametrizations\.weight\.(.*)")
_FACTOR = re.compile(r"(.*)\.lora_(A|B)(\.[^.]+\.weight)?$")


def add_lora(model: BltForCausalLM, rank: int) -> BltForCausalLM:
    """Puts LoRA adapters of PEFT on all projections of the layers of the global transformer; the same model comes back.

    Their scale is 1. What was trainable outside these layers stays so, and their own weights are frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"`rank` must be at least 1; got {rank}.")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    target = r".*global_transformer\.layers\.\d+\.(self_attn|mlp)\.(" + "|".join(_PROJECTIONS) + ")"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=target), model)
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name
        if is_adapter:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(is_adapter or (name in trainable and not name.startswith(_LAYERS)))
    return model


def is_of_token_model(name: str) -> bool:
    """Tells whether a tensor outside the layers of the global transformer comes from the token model as it is."""
    return name.startswith(_OF_TOKEN_MODEL)


def collect(model: BltForCausalLM) -> dict[str, Tensor]:
    """Returns what [`save`] writes, by name, on the CPU; an entropy model is left out."""
    learned = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.patcher.") or is_of_token_model(name):
            continue
        if match := _PARAMETRIZED.fullmatch(name):
            if match[2] == "original":
                learned[f"{match[1]}.weight"] = model.get_submodule(match[1]).weight
            continue
        if not name.startswith(_LAYERS):
            learned[name] = tensor
        elif match := _FACTOR.fullmatch(name):
            learned[f"{match[1]}.lora_{match[2]}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}


def save(
    model: BltForCausalLM,
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes what `model` has learned; `metadata` goes into the file."""
    tensors = {name: tensor.to(dtype) for name, tensor in collect(model).items()}
    write_whole(Path(path), lambda partial: save_file(tensors, partial, {"format": "pt", **(metadata or {})}))


def load(model: BltForCausalLM, path: str | os.PathLike) -> dict[str, str]:
    """Reads a file of [`save`] into a byteified model, and returns its metadata.

    Adapters are read into those of the model ([`add_lora`]), or, if it has none, added to the weights.

    Raises:
        ValueError: names or shapes are not those of the model.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    expected = collect(model)
    own = {name for name in expected if not _FACTOR.fullmatch(name)}
    adapters = {name for name in tensors if _FACTOR.fullmatch(name)}
    if wrong := sorted(own ^ (tensors.keys() - adapters)):
        raise ValueError(f"{os.fspath(path)} is not of this model; see {', '.join(wrong[:4])}.")
    for name in own:
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{os.fspath(path)}: {name} is {tuple(tensors[name].shape)}; this model has {tuple(expected[name].shape)}."
            )
    with torch.no_grad():
        state = model.state_dict()
        for name in own:
            if name in state:
                state[name].copy_(tensors[name])
            else:  # a parametrized weight, which is set as a whole
                module = model.get_submodule(name.removesuffix(".weight"))
                module.weight = tensors[name].to(module.weight)
        for name in sorted(adapters):
            if name.endswith(".lora_A"):
                _load_adapter(model, name.removesuffix(".lora_A"), tensors)
    return metadata


def rank_of(path: str | os.PathLike) -> int:
    """Reads the rank of the adapters in a file of [`save`]; 0: it has none."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name.endswith(".lora_A"):
                return file.get_slice(name).get_shape()[0]
    return 0


def _load_adapter(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    factors = [tensors[f"{name}.lora_{letter}"] for letter in "AB"]
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the file adapts {name}, which this model does not have.") from None
    if hasattr(module, "lora_A"):
        for layers, factor in zip((module.lora_A, module.lora_B), factors):
            weight = next(iter(layers.values())).weight
            if weight.shape != factor.shape:
                raise ValueError(
                    f"{name}: the model's adapter is {tuple(weight.shape)}, the file's {tuple(factor.shape)}."
                )
            weight.copy_(factor)
    else:
        down, up = (factor.float() for factor in factors)
        if (up.shape[0], down.shape[1]) != tuple(module.weight.shape):
            raise ValueError(
                f"the file adapts {name} as {(up.shape[0], down.shape[1])}; it is {tuple(module.weight.shape)}."
            )
        module.weight.copy_(module.weight.float() + up @ down)


__all__ = ["add_lora", "collect", "is_of_token_model", "load", "rank_of", "save"]
