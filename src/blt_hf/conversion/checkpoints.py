"""Meta's BLT checkpoints to transformers checkpoints and back.

Both directions copy tensors in pieces of a few megabytes, from file to file, so memory does not depend on the size of
the model. Facts about Meta's format: facebookresearch/blt (`bytelatent/model/blt.py`, `local_models.py`,
`entropy_model.py`, `hf.py`), and the recorded vectors that `tests/conformance/test_meta_reference.py` runs.
"""

import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model.configuration_blt import BltConfig
from ..model.patching_blt import PatchingRule
from ..rules import describe_rule
from .arguments import (
    argument_files,
    check_tokenizer,
    choose_patcher_args,
    config_from_meta_args,
    entropy_is_fixed,
    meta_args_from_config,
    wrong_types_are_value_errors,
)
from .files import (
    OutputTensor,
    StoredTensor,
    check_space,
    check_tensors,
    open_weights,
    progress_bar,
    read_json,
    whole_or_nothing,
    write_json,
    write_safetensors,
    write_shards,
)
from .tensors import tensor_specs


META_ARGS_FILE = "meta_args.json"
"""Kept beside a converted checkpoint: Meta's arguments, those without a counterpart here included."""


_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_HUB_FILES = ["*.json", "model*.safetensors", "consolidated.pth", "entropy_model/*", "README.md", "LICENSE*"]

# ---- Sources ----


@dataclass
class _Source:
    """Holds an opened checkpoint in Meta's layout."""

    label: str
    folder: Path
    files: dict  # as in META_ARGS_FILE: args, train_args, entropy_params, entropy_fixed
    weights: dict[str, StoredTensor]
    entropy_weights: dict[str, StoredTensor] | None = None

    @property
    def is_on_hub(self) -> bool:
        return not Path(self.label).expanduser().is_dir()

    @property
    def public_name(self) -> str:
        """The Hub id, or the name of the folder without the path to it."""
        return self.label if self.is_on_hub else self.folder.resolve().name


def _locate(source: str | os.PathLike, revision: str | None) -> Path:
    """Returns the folder `source`, or the one into which a Hub id was downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"{source} is neither a folder nor a Hub id such as facebook/blt-1b.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        raise ValueError(f"{source} is not a folder, and cannot be downloaded from the Hub: {error}") from error


def _open_meta(source: str | os.PathLike, entropy_model: str | os.PathLike | None, revision: str | None) -> _Source:
    folder = _locate(source, revision)
    train_args = None
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json")
        if "args" not in content:
            kind = f"; it is a transformers checkpoint of type {content['model_type']!r}" * ("model_type" in content)
            raise ValueError(f"{folder}: config.json has no `args`, so this is not Meta's layout{kind}.")
        args = content["args"]
        if "dim_global" not in args:
            raise ValueError(
                f"{folder}: the `args` of config.json have no `dim_global`; an entropy model belongs to "
                "--entropy-model (entropy_model=...), beside the byte latent transformer as SOURCE."
            )
        if (folder / "train_args.json").is_file():
            train_args = read_json(folder / "train_args.json")
    elif (folder / "params.json").is_file():  # as Meta's trainer consolidates a run
        train_args = read_json(folder / "params.json")
        args = train_args.get("model")
        if not args:
            raise ValueError(f"{folder}: params.json has no `model`; is this the entropy model of a BLT?")
    else:
        raise ValueError(f"{folder / 'config.json'} is missing (or params.json, for a run of Meta's trainer).")
    files = {"args": args, "train_args": train_args, "entropy_params": None, "entropy_fixed": True}
    opened = _Source(str(source), folder, files, open_weights(folder))

    entropy_folder = folder / "entropy_model" if entropy_model is None else _locate(entropy_model, None)
    if entropy_folder.is_dir():
        if (entropy_folder / "params.json").is_file():
            files["entropy_params"] = read_json(entropy_folder / "params.json")
            if not files["entropy_params"].get("entropy_model"):
                raise ValueError(f"{entropy_folder / 'params.json'} has no `entropy_model`.")
        else:  # facebook/blt-entropy: the arguments of the loaded model, all of them honoured
            content = read_json(entropy_folder / "config.json")
            if "args" not in content:
                raise ValueError(f"{entropy_folder / 'config.json'} has no `args`, so this is not Meta's layout.")
            files["entropy_params"] = {"entropy_model": content["args"]}
            files["entropy_fixed"] = False
        opened.entropy_weights = open_weights(entropy_folder)
    return opened


# ---- The model card ----


def _licence(source: _Source) -> tuple[dict, str]:
    """Returns metadata and one sentence about the licence of the source."""
    from huggingface_hub import metadata_load

    known = {}
    if (source.folder / "README.md").is_file():
        metadata = metadata_load(source.folder / "README.md") or {}
        known = {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
    if known:
        name = known.get("license_name") or known["license"]
        link = f" ({known['license_link']})" if "license_link" in known else ""
        return known, f"The source's own card states the licence `{name}`{link}; it applies to these weights as well."
    if re.fullmatch(r"facebook/blt[\w.-]*", source.label):
        link = f"https://huggingface.co/{source.label}/blob/main/LICENSE"
        known = {"license": "other", "license_name": "fair-noncommercial-research-license", "license_link": link}
        return known, f"Meta publishes its BLT weights under the FAIR Noncommercial Research License ({link})."
    return {}, (
        "The source states no licence, so none is given here. Weights derived from Meta's BLT releases stay under "
        "their licence (see https://huggingface.co/facebook/blt-1b)."
    )


def _write_card(folder: Path, source: _Source, config: BltConfig, dtype: torch.dtype, notes: list[str]) -> None:
    from huggingface_hub import ModelCardData

    licence, sentence = _licence(source)
    base = {"base_model": source.label} if source.is_on_hub else {}
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["blt"], **base, **licence
    )
    origin = f"`{source.public_name}`"
    if source.is_on_hub:
        origin = f"[{source.label}](https://huggingface.co/{source.label})"
    always = [
        f"A patch starts {describe_rule(PatchingRule.from_config(config))}.",
        "`mask_documents` is true: an `eos` inside a row ends a document for attention, as in Meta's code.",
        f"Meta's arguments, those without a counterpart in `config.json` included, are in `{META_ARGS_FILE}`.",
    ]
    bullets = "\n".join(f"- {note}" for note in always + notes)
    (folder / "README.md").write_text(
        f"""---
{metadata.to_yaml()}
---

# Byte Latent Transformer, converted

Converted from {origin} in Meta's format by `blt-hf convert`; tensors are in {str(dtype).removeprefix("torch.")}.

```python
import blt_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Licence

{sentence}

## About this conversion

{bullets}

Architecture: [Byte Latent Transformer: Patches Scale Better Than Tokens](https://arxiv.org/abs/2412.09871);
Meta's code: [facebookresearch/blt](https://github.com/facebookresearch/blt).
""",
        encoding="utf-8",
    )
    for path in source.folder.glob("LICENSE*"):
        shutil.copyfile(path, folder / path.name)


# ---- The two directions ----


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype in _DTYPE_NAMES.values():
        return dtype
    if dtype != "auto" and dtype not in _DTYPE_NAMES:
        raise ValueError(f"`dtype` = {dtype!r} is not supported; supported: auto, {', '.join(_DTYPE_NAMES)}.")
    return _DTYPE_NAMES.get(dtype)


def _absolute(out: str | os.PathLike) -> Path:
    return Path(os.path.abspath(Path(out).expanduser()))


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(size).upper())
    if not match or int(match[1]) == 0:
        raise ValueError(f"`max_shard_size` = {size!r} is not a size; give bytes or something like 500MB or 5GB.")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def _write_code(folder: Path, config: BltConfig) -> None:
    """Writes the modules that `save_pretrained` of the model ships, and sets `auto_map` in `config`."""
    from transformers.dynamic_module_utils import custom_object_save

    from ..model.modeling_blt import BltForCausalLM

    with torch.device("meta"):
        model = BltForCausalLM(config)
    if model._auto_class is not None:
        config.auto_map = dict(model._auto_map)
        custom_object_save(model, folder, config=config)


def _main_dtype(outputs: list[OutputTensor]) -> torch.dtype:
    """Finds the dtype of most of the bytes of the byte latent transformer."""
    counts = {}
    for output in outputs:
        if not output.name.startswith("model.patcher."):
            counts[output.dtype] = counts.get(output.dtype, 0) + output.num_bytes
    return max(counts, key=counts.get)


def convert_meta_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    entropy_model: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    patching: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Converts a checkpoint of Meta's code to a transformers checkpoint.

    Args:
        source: folder or Hub id. Either `config.json` (`{"args": ...}`) with `model.safetensors`, or a consolidated
            run of Meta's trainer (`params.json` with `consolidated.pth`).
        out: folder to make. It appears when everything is written, or not at all.
        entropy_model: folder or Hub id of the entropy model (`params.json` with `consolidated.pth`, or `config.json`
            with `model.safetensors`); None: `entropy_model/` in `source`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` to keep each tensor's own.
        max_shard_size: bytes, or a text such as `5GB`. A larger tensor gets a file of its own.
        patching: whose patching settings to use where the files disagree: `train_args`, `entropy_model`, `args`, or
            `auto`, the first of these that exists (as Meta's own loading code does).
        revision: branch, tag or commit of `source` on the Hub.
        overwrite: replace `out` if it exists and is not empty.
        progress: show a progress bar.
    Returns:
        `out`.
    Raises:
        ValueError: a missing file or tensor, an unexpected tensor, a wrong shape, or an option of Meta's architecture
            that is not supported (named, with its value and the supported ones).
    Warns:
        UserWarning: something that the files say about numbers and that the reader should decide.
    """
    from transformers import GenerationConfig

    from ..tokenizer.tokenization import BltTokenizer

    target_dtype, max_shard_bytes, out = _parse_dtype(dtype), _parse_size(max_shard_size), _absolute(out)
    opened = _open_meta(source, entropy_model, revision)
    files = opened.files
    check_tokenizer(files["train_args"])
    patcher_args, notes = choose_patcher_args(files, patching)
    entropy_args = files["entropy_params"]["entropy_model"] if files["entropy_params"] else None
    config, more_notes = config_from_meta_args(files["args"], patcher_args, entropy_args, files["entropy_fixed"])
    notes += more_notes
    specs = tensor_specs(config)
    for in_patcher, stored in ((False, opened.weights), (True, opened.entropy_weights)):
        if stored is not None:
            expected = {
                name: spec.source_shape for spec in specs if spec.in_patcher == in_patcher for name in spec.sources
            }
            check_tensors(stored, expected, "the entropy model" if in_patcher else opened.label)
    outputs = []
    for spec in specs:
        stored = opened.entropy_weights if spec.in_patcher else opened.weights
        parts = tuple((stored[name], 0, None) for name in spec.sources)
        kept_dtype = parts[0][0].dtype if parts else torch.float32
        outputs.append(OutputTensor(spec.name, target_dtype or kept_dtype, spec.shape, parts))
    main_dtype = _main_dtype(outputs)
    config.architectures = ["BltForCausalLM"]
    config.dtype = main_dtype

    for note in notes:
        warnings.warn(note, stacklevel=2)
    sources = [opened.folder] + ([] if entropy_model is None else [Path(entropy_model)])
    with whole_or_nothing(out, overwrite, sources) as folder:
        total = sum(output.num_bytes for output in outputs)
        check_space(folder, total)
        with progress_bar(total, "Converting", progress) as advance:
            write_shards(folder, outputs, max_shard_bytes, advance)
        _write_code(folder, config)
        BltTokenizer().save_pretrained(folder)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        write_json(folder / META_ARGS_FILE, {"source": opened.public_name, "patching": patching, **files})
        _write_card(folder, opened, config, main_dtype, notes)
    return out


def export_meta_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    meta_args: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Converts a transformers checkpoint of a BLT to Meta's layout, so that their code can go on with it.

    Writes `config.json`, `model.safetensors`, `train_args.json` and `entropy_model/` with `params.json` and
    `consolidated.pth` (`config.json` and `model.safetensors`, if it came that way). Arguments of Meta's that have no
    counterpart in `config.json` come from `meta_args.json`; without one they are the defaults of Meta's code.

    Args:
        source: folder or Hub id of a BLT in transformers' layout (ours or the in-tree one's).
        out: folder to make. It appears when everything is written, or not at all.
        meta_args: the `meta_args.json` that a conversion left; None: the one in `source`, if there is one.
        dtype, revision, overwrite, progress: as in [`convert_meta_checkpoint`].
    Returns:
        `out`.
    Raises:
        ValueError: a missing file or tensor, a wrong shape, or a config that Meta's format cannot express (the field
            is named).
    Warns:
        UserWarning: a setting that Meta's code will not honour.
    """
    target_dtype, out = _parse_dtype(dtype), _absolute(out)
    folder_in = _locate(source, revision)
    content = read_json(folder_in / "config.json")
    if content.get("model_type") != "blt":
        raise ValueError(f"{folder_in}: config.json is of type {content.get('model_type')!r}; expected 'blt'.")
    with wrong_types_are_value_errors():
        config = BltConfig.from_dict(content)
    kept_path = folder_in / META_ARGS_FILE if meta_args is None else Path(meta_args)
    kept = read_json(kept_path) if meta_args is not None or kept_path.is_file() else None
    files = argument_files(config, kept)
    if not config.mask_documents:
        warnings.warn(
            "`mask_documents` is False; Meta's code always separates documents at `eos`, so rows with an `eos` inside "
            "will have other numbers there.",
            stacklevel=2,
        )
    if config.patch_in_forward and not entropy_is_fixed(config):
        warnings.warn(
            "Meta's loader of params.json (multiple_of 256, rope theta 10000, epsilon 1e-5) cannot build this entropy "
            "model, so entropy_model/ holds config.json and model.safetensors, for `LMTransformer.from_pretrained`.",
            stacklevel=2,
        )
    elif config.patch_in_forward and config.patcher_config.sliding_window != 512:
        warnings.warn(
            f"`patcher_config.sliding_window` is {config.patcher_config.sliding_window}; Meta's loader ignores the "
            "value in params.json and uses 512.",
            stacklevel=2,
        )
    specs, stored = tensor_specs(config), open_weights(folder_in)
    check_tensors(stored, {spec.name: spec.shape for spec in specs}, str(source))
    outputs, entropy_outputs = [], []
    for spec in specs:
        size = math.prod(spec.source_shape)
        for position, name in enumerate(spec.sources):
            part = (stored[spec.name], position * size, (position + 1) * size)
            output = OutputTensor(name, target_dtype or stored[spec.name].dtype, spec.source_shape, (part,))
            (entropy_outputs if spec.in_patcher else outputs).append(output)

    sources = [folder_in] + ([] if meta_args is None else [Path(meta_args)])
    with whole_or_nothing(out, overwrite, sources) as folder:
        total = sum(output.num_bytes for output in outputs)
        check_space(folder, total)
        with progress_bar(total, "Exporting", progress) as advance:
            write_safetensors(folder / "model.safetensors", outputs, advance)
        write_json(folder / "config.json", {"args": files["args"]})
        if files["train_args"] is not None:
            write_json(folder / "train_args.json", files["train_args"])
        if entropy_outputs:
            entropy_folder, params = folder / "entropy_model", files["entropy_params"]
            entropy_folder.mkdir()
            if files["entropy_fixed"]:
                write_json(entropy_folder / "params.json", params)
                # Small beside the rest, and torch's own format: whole in memory.
                state = {x.name: torch.cat(list(x.pieces())).reshape(x.shape) for x in entropy_outputs}
                torch.save({"model": state}, entropy_folder / "consolidated.pth")
            else:
                write_json(entropy_folder / "config.json", {"args": params["entropy_model"]})
                write_safetensors(entropy_folder / "model.safetensors", entropy_outputs, lambda num_bytes: None)
    return out


__all__ = [
    "META_ARGS_FILE",
    "config_from_meta_args",
    "convert_meta_checkpoint",
    "export_meta_checkpoint",
    "meta_args_from_config",
    "tensor_specs",
]
