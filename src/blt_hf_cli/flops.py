"""`blt-hf flops`."""

import json
from typing import Annotated

import typer

from .common import AsJson, load, plain_messages, print_rows


def flops(
    config: Annotated[str | None, typer.Argument(help="Folder or Hub id of a BLT or a Llama-like model.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known shape, instead of CONFIG: blt-1b, blt-7b, llama-3-8b or llama-3.2-1b.")
    ] = None,
    patch_bytes: Annotated[list[float] | None, typer.Option(help="Mean bytes of a patch; may be repeated.")] = None,
    context_bytes: Annotated[float, typer.Option(help="Bytes of the text.")] = 8192,
    bytes_per_token: Annotated[float, typer.Option(help="Of token models.")] = 4.4,
    training: Annotated[bool, typer.Option("--training", help="Count forward and backward.")] = False,
    against: Annotated[str | None, typer.Option(help="A preset, folder or Hub id to compare with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count FLOPs a byte by the paper's equations, part by part, with and without the entropy model.

    Examples:

    - `blt-hf flops pretrained/blt-5m --training --context-bytes 4096`
    - `blt-hf flops --preset blt-7b --patch-bytes 4.5 --patch-bytes 8 --against llama-3-8b`
    """
    from blt_hf.evaluation.flops import DEFAULT_PATCH_BYTES, flops_per_byte

    with plain_messages():
        if (config is None) == (preset is None):
            raise ValueError("give either CONFIG or --preset.")
        loaded = _load_shape(config, preset)
        other = None if against is None else _load_shape(against, None)
        if loaded.model_type != "blt" and patch_bytes:
            raise ValueError(f"--patch-bytes is for a BLT; this is of type {loaded.model_type!r}.")
        results = []
        for size in patch_bytes or [DEFAULT_PATCH_BYTES]:
            counted, reference = (
                None if shape is None else flops_per_byte(shape, size, context_bytes, bytes_per_token)
                for shape in (loaded, other)
            )
            if training:
                counted, reference = counted.training(), None if reference is None else reference.training()
            results.append((size, counted, reference))
        if as_json:
            lines = []
            for size, counted, reference in results:
                line = {"patch_bytes": size} if loaded.model_type == "blt" else {}
                line |= {name: part.total for name, part in counted.parts.items()}
                line |= {"paper": counted.paper, "without_patcher": counted.without_patcher, "total": counted.total}
                lines.append(line | ({} if reference is None else {"against": reference.total}))
            typer.echo(json.dumps(lines))
            return
        for size, counted, reference in results:
            title = f"{size:g} bytes a patch:" if loaded.model_type == "blt" else None
            _print_flops(counted, reference, against, title)


def _load_shape(name: str | None, preset: str | None):
    from transformers import AutoConfig

    from blt_hf.evaluation.flops import PRESETS, preset_config

    if preset is not None or name in PRESETS:
        return preset_config(preset or name)
    return load(AutoConfig.from_pretrained, name)


def _print_flops(counted, reference, against: str | None, title: str | None) -> None:
    def show(value: float) -> str:
        share = "" if reference is None else f"  {value / reference.total:6.1%} of {against}"
        return f"{value / 1e6:12,.2f} MFLOPs a byte{share}"

    rows = [(name.replace("_", " "), show(part.total)) for name, part in counted.parts.items() if part.total]
    if counted.projections.total:
        rows.append(("total, as the paper counts", show(counted.paper)))
    if counted.patcher.total:
        rows.append(("total without the entropy model", show(counted.without_patcher)))
    rows.append(("total", show(counted.total)))
    print_rows(rows, title)
