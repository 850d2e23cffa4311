"""`blt-hf info`."""

import json
import sys
from typing import Annotated

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    TextColumn,
    load,
    load_model,
    model_or_default,
    plain_messages,
    print_histogram,
    print_rows,
)


def info(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id, or blt-1b or blt-7b. Default: the bundled model.")
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Files or folders in which to count patches (loads the weights).")
    ] = None,
    context_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a text, for memory and FLOPs.")] = 8192,
    patch_bytes: Annotated[
        float | None, typer.Option(min=1, help="Mean bytes of a patch. Default: that of TEXTS, or 4.5.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the weights and the cache; auto is the saved type.")
    ] = Dtype.auto,
    text_column: TextColumn = "text",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print shape, parameters by part, FLOPs a byte, memory for a context, and the patches of texts.

    Only the patches of texts need the weights; everything else is computed from the configuration.

    Examples:

    - `blt-hf info pretrained/blt-5m`
    - `blt-hf info my/blt held-out.txt --context-bytes 100000 --dtype bfloat16`
    - `blt-hf info blt-7b --patch-bytes 4.5 --json`
    """
    import torch
    from transformers import AutoConfig

    from blt_hf.evaluation.flops import DEFAULT_PATCH_BYTES, PRESETS, flops_per_byte, preset_config
    from blt_hf.evaluation.memory import count_parameters
    from blt_hf.model.cache_blt import BltCache

    with plain_messages():
        name = model_or_default(model)
        config = preset_config(name) if name in PRESETS else load(AutoConfig.from_pretrained, name)
        if config.model_type != "blt":
            raise ValueError(f"{name} is of type {config.model_type!r}; a BLT is needed.")
        patches = _find_patches(name, texts, text_column, device) if texts else None
        size = patch_bytes or (patches["bytes_per_patch"] if patches else DEFAULT_PATCH_BYTES)
        saved = str(config.dtype or "float32").removeprefix("torch.")
        weights = saved if dtype is Dtype.auto else dtype.value
        parameters = count_parameters(config)
        kept = BltCache.memory(config, context_bytes, round(context_bytes / size), getattr(torch, weights))
        memory = {"weights": _weight_bytes(parameters, weights), "cache": kept}
        told = {
            "model": name,
            "dtype": weights,
            "shape": _shape(config),
            "parameters": {**parameters, "total": sum(parameters.values())},
            "flops_per_byte": flops_per_byte(config, size, context_bytes).total,
            "bytes_per_patch": size,
            "context_bytes": context_bytes,
            "memory_bytes": memory,
            "patches": patches,
        }
        if as_json:
            typer.echo(json.dumps(told))
            return
        _print(told)


def _find_patches(name: str, texts: list[str], text_column: str, device: str | None) -> dict:
    from blt_hf.conversion.files import progress_bar
    from blt_hf.training.data import read_texts

    found_texts = read_texts(texts, text_column)
    loaded = load_model(name, Dtype.auto, device)
    pieces = [text[start : start + 8192] for text in found_texts for start in range(0, len(text), 8192)]
    num_bytes = num_patches = 0
    histogram: dict[int, int] = {}
    with progress_bar(sum(map(len, pieces)), "Patches", sys.stderr.isatty()) as advance:
        for piece in pieces:
            row = loaded.get_patches(piece)
            num_bytes, num_patches = num_bytes + row.num_bytes, num_patches + row.num_patches
            for length in row.patch_lengths[1:]:
                histogram[length] = histogram.get(length, 0) + 1
            advance(len(piece))
    return {
        "num_bytes": num_bytes,
        "num_patches": num_patches,
        "bytes_per_patch": num_bytes / num_patches,
        "histogram": dict(sorted(histogram.items())),
    }


def _shape(config) -> dict:
    from blt_hf.model.patching_blt import PatchingRule
    from blt_hf.rules import describe_rule

    def layers(part) -> dict:
        return {
            "layers": part.num_hidden_layers,
            "width": part.hidden_size,
            "heads": part.num_attention_heads,
            "kv_heads": part.num_key_value_heads,
            "feed_forward": part.intermediate_size,
        }

    shape = {"encoder": layers(config.encoder_config), "global": layers(config.global_config)}
    shape["decoder"] = layers(config.decoder_config)
    shape["encoder"]["window"] = shape["decoder"]["window"] = config.local_attention_window_len
    if config.patch_in_forward and config.patcher_config is not None:
        shape = {"patcher": {**layers(config.patcher_config), "window": config.patcher_config.sliding_window}} | shape
    shape["latents_per_patch"] = config.cross_attn_k
    tables = config.encoder_hash_byte_group_nb_functions * len(config.encoder_hash_byte_group_size)
    shape["hash_tables"] = {"tables": tables, "rows": config.encoder_hash_byte_group_vocab if tables else 0}
    shape["patching"] = {
        "in_words": describe_rule(PatchingRule.from_config(config)),
        "mode": config.patching_mode,
        "threshold": config.patching_threshold,
        "monotonicity": config.monotonicity,
        "threshold_add": config.patching_threshold_add,
        "max_patch_length": config.max_patch_length,
    }
    return shape


def _weight_bytes(parameters: dict[str, int], dtype: str) -> int:
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    rest = sum(count for part, count in parameters.items() if part != "patcher")
    return rest * size + parameters.get("patcher", 0) * 4  # the entropy model stays in fp32


def _print(told: dict) -> None:
    shape = told["shape"]
    rows = []
    for part in ("patcher", "encoder", "global", "decoder"):
        if part in shape:
            found = shape[part]
            line = f"{found['layers']} layers of width {found['width']}, {found['heads']} heads"
            if found["kv_heads"] != found["heads"]:
                line += f" ({found['kv_heads']} of keys and values)"
            line += f", feed-forward {found['feed_forward']}"
            if found.get("window"):
                line += f", window {found['window']} bytes"
            rows.append((part, line))
    tables = shape["hash_tables"]
    rows.append(("hashes", f"{tables['tables']} tables of {tables['rows']:,} rows" if tables["tables"] else "none"))
    rows.append(("latents a patch", str(shape["latents_per_patch"])))
    rows.append(("patches start", shape["patching"]["in_words"]))
    print_rows(rows, f"{told['model']}:")
    total = told["parameters"]["total"]
    rows = [
        (part.replace("_", " "), f"{count:>15,}  {count / total:6.1%}") for part, count in told["parameters"].items()
    ]
    print_rows(rows, "Parameters:")
    context, size = told["context_bytes"], told["bytes_per_patch"]
    rows = [
        ("FLOPs a byte", f"{told['flops_per_byte'] / 1e6:,.2f} million"),
        (f"weights in {told['dtype']}", _size(told["memory_bytes"]["weights"])),
        ("cache of a text", _size(told["memory_bytes"]["cache"])),
    ]
    print_rows(rows, f"At {context:,} bytes of context and {size:.2f} bytes a patch:")
    if told["patches"]:
        found = told["patches"]
        typer.echo(f"{found['num_bytes']:,} bytes in {found['num_patches']:,} patches, {size:.2f} bytes a patch")
        print_histogram(found["histogram"])


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"
