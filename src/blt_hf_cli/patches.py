"""`blt-hf patches`."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
    TextColumn,
    Weights,
    load_byte_model,
    model_or_default,
    need_extra,
    plain_messages,
    print_rows,
    read_input,
)


def patches(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts. Default, or -: stdin.")] = None,
    model: Model = None,
    threshold: Annotated[
        float | None, typer.Option(help="Another threshold than the model's, in nats (entropy rules).")
    ] = None,
    entropies: Annotated[
        bool, typer.Option("--entropies", help="Draw a bar above each character: the entropy before it.")
    ] = False,
    spell: Annotated[
        bool, typer.Option("--spell", help="Show bytes for a character that lies in several patches.")
    ] = False,
    svg: Annotated[str | None, typer.Option(help="Also draw entropies and patches to this SVG file.")] = None,
    png: Annotated[str | None, typer.Option(help="Also draw entropies and patches to this PNG file.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of a line. Default: those of the terminal.")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Files or folders whose patches are written to files in --output, for training.", metavar="PATH"
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of Parquet files (with --corpus).")] = None,
    shard: Annotated[
        str, typer.Option(help="The share of this machine: i/n with i from 0 to n - 1 (with --corpus).")
    ] = "0/1",
    context: Annotated[int, typer.Option(help="Ids of a row (with --corpus).")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows at a time (with --corpus).")] = 16,
    text_column: TextColumn = "text",
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the patches of texts in colours, and bytes a patch; or write those of a whole corpus to files.

    Control codes are shown by signs (`␊`, `␛`). A character that lies in several patches stands in the first of them,
    and `·` in the others.

    With --corpus, a command that was stopped goes on where it was when it is given again.

    Examples:

    - `blt-hf patches "to be or not to be"`
    - `blt-hf patches --entropies --threshold 1.5 "Zażółć gęślą jaźń" "速い狐"`
    - `cat notes.txt | blt-hf patches --model my/blt --json`
    - `blt-hf patches "A function call" --svg patches.svg --png patches.png`
    - `blt-hf patches --corpus texts/ --shard 3/16 --output patches/`
    """
    with plain_messages():
        if corpus:
            if texts or entropies or spell or svg or png:
                raise ValueError("--corpus writes files and shows nothing; leave out texts and drawing options.")
            _write_corpus(
                corpus, output, shard, model_or_default(model), threshold, context, batch_size, text_column, dtype,
                device, as_json, quiet,
            )  # fmt: skip
            return
        if output is not None or shard != "0/1":
            raise ValueError("--output and --shard belong to --corpus.")
        found_texts = read_input(texts)
        if svg or png:
            need_extra("matplotlib", "plot")
        name = model_or_default(model)
        loaded = load_byte_model(name, dtype, device)
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


def _write_corpus(
    corpus: list[str],
    output: str | None,
    shard: str,
    name: str,
    threshold: float | None,
    context: int,
    batch_size: int,
    text_column: str,
    dtype: Dtype,
    device: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    if output is None:
        raise ValueError("--corpus needs --output, a folder for the files.")
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not index < count:
        raise ValueError(f"--shard must be i/n with i from 0 to n - 1, such as 0/4; got {shard!r}.")
    need_extra("datasets", "train")
    from blt_hf.conversion.files import progress_bar
    from blt_hf.patches.data import PatchFinder
    from blt_hf.training.corpus import write_patches
    from blt_hf.training.data import find_files

    loaded = load_byte_model(name, dtype, device)
    rule = PatchFinder.of(loaded).rule
    if loaded.config.model_type == "blt_patcher" and threshold is None:
        raise ValueError(f"{name} is an entropy model, which has no threshold of its own; give --threshold.")
    if threshold is not None:
        if rule.mode != "entropy":
            raise ValueError(f"--threshold is for entropy rules; {name} has the rule {rule.mode!r}.")
        rule = dataclasses.replace(rule, threshold=threshold)
    total = sum(path.stat().st_size for path in find_files(corpus)) // count
    with progress_bar(total, "Finding patches", not quiet and not as_json) as advance:
        done = write_patches(
            loaded, corpus, output, (index, count), context, batch_size=batch_size, column=text_column, rule=rule,
            on_progress=advance,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(done), "bytes_per_second": done.bytes_per_second}))
        return
    print_rows(
        [
            ("shard", f"{shard}, {done.num_texts:,} texts"),
            ("rows", f"{done.num_rows:,} of up to {context:,} ids, {done.num_bytes:,} ids in all"),
            ("files", f"{done.num_files:,} in {output}, {done.num_new_files:,} of them new"),
            ("bytes a second", f"{done.bytes_per_second:,.0f}"),
        ]
    )


def _draw(found: list, svg: str | None, png: str | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from blt_hf.conversion.files import write_whole
    from blt_hf.patches.pictures import plot_patches

    if not any(row.num_bytes for row in found):
        raise ValueError("there is nothing to draw: the text is empty.")
    figure = plot_patches([row for row in found if row.num_bytes])
    for path, kind in ((svg, "svg"), (png, "png")):
        if path is None:
            continue
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {Path(path).parent}.")
        write_whole(Path(path), lambda partial, kind=kind: figure.savefig(partial, format=kind))
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
