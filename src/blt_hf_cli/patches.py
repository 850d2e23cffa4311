"""`blt-hf patches`."""

import json
from typing import Annotated

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Weights,
    load_model,
    model_or_default,
    need_byte_model,
    need_extra,
    plain_messages,
    read_input,
    write_whole,
)


def patches(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; - or none: what stands on stdin.")] = None,
    model: Model = None,
    threshold: Annotated[
        float | None, typer.Option(help="Another threshold than the model's, in nats (entropy rules).")
    ] = None,
    entropies: Annotated[
        bool, typer.Option("--entropies", help="A bar above each character: the entropy before it.")
    ] = False,
    spell: Annotated[
        bool, typer.Option("--spell", help="Bytes instead of a character that lies in several patches.")
    ] = False,
    svg: Annotated[str | None, typer.Option(help="Also draw the entropies and patches to this file.")] = None,
    png: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    width: Annotated[int | None, typer.Option(help="Cells of a line; those of the terminal, if not given.")] = None,
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show the patches of texts in colours, and bytes a patch.

    Control codes are shown by signs (`␊`, `␛`). A character that lies in several patches stands in the first of them,
    and `·` in the others.

    Examples:

    - `blt-hf patches "to be or not to be"`
    - `blt-hf patches --entropies --threshold 1.5 "Zażółć gęślą jaźń" "速い狐"`
    - `cat notes.txt | blt-hf patches --model my/blt --json`
    - `blt-hf patches "A function call" --svg patches.svg --png patches.png`
    """
    with plain_messages():
        found_texts = read_input(texts)
        if svg or png:
            need_extra("matplotlib", "plot")
        name = model_or_default(model)
        loaded = load_model(name, dtype, device)
        need_byte_model(loaded, name, ("blt", "blt_patcher"))
        found = loaded.get_patches(found_texts)
        if threshold is not None:
            if found and found[0].rule.mode != "entropy":
                raise ValueError(f"--threshold is for entropy rules; {name} has the rule {found[0].rule.mode!r}.")
            found = [row.recut(threshold=threshold) for row in found]
        if svg or png:
            _draw(found, svg, png)
        if as_json:
            typer.echo(json.dumps([{**row.to_dict(), "model": name} for row in found]))
            return
        _show(found, entropies, spell, width)


def _draw(found: list, svg: str | None, png: str | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from blt_hf.patches.pictures import plot_patches

    if not any(row.num_bytes for row in found):
        raise ValueError("there is nothing to draw: the text is empty.")
    figure = plot_patches([row for row in found if row.num_bytes])
    for path, kind in ((svg, "svg"), (png, "png")):
        if path is not None:
            write_whole(path, lambda partial, kind=kind: figure.savefig(partial, format=kind))
    plt.close(figure)


def _show(found: list, entropies: bool, spell: bool, width: int | None) -> None:
    from rich.console import Console

    from blt_hf.patches.pictures import patches_text

    console = Console(highlight=False, soft_wrap=True)
    separator = "" if console.color_system else "|"
    for row in found:
        lines = patches_text(row, width or console.width, show_entropies=entropies, spell=spell, separator=separator)
        for line in lines:
            console.print(line, soft_wrap=True)
        typer.echo(row.summary)
