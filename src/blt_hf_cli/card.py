"""`blt-hf card`."""

import json
from typing import Annotated

import typer

from .common import AsJson, Device, Dtype, Quiet, TextColumn, Weights, load_model, plain_messages


def card(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a BLT or an entropy model.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder or file to write to; MODEL itself, if it is a folder.")
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="user/name of the model on the Hub.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's id of the licence, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO code, such as en; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a data set; may be repeated.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that this one was made from.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to add; may be repeated.")] = None,
    description: Annotated[str | None, typer.Option(help="A paragraph below the title.")] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(help="File or folder on which to measure bits per byte for the card; may be repeated."),
    ] = None,
    text_column: TextColumn = "text",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing README.md instead of completing its metadata.")
    ] = False,
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model card: README.md with the metadata that the Hub reads.

    An existing README.md keeps its text, and its metadata is completed.

    Examples:

    - `blt-hf card my-blt --license apache-2.0 --language en`
    - `blt-hf card my-blt --repo-id me/my-blt --dataset me/texts --evaluate held-out/`
    """
    from blt_hf.conversion.files import progress_bar
    from blt_hf.evaluation import measure_bits_per_byte, write_model_card
    from blt_hf.training.data import read_texts

    with plain_messages():
        measured = {}
        if evaluate:
            loaded = load_model(model, dtype, device)
        for path in evaluate or ():
            found = read_texts([path], text_column)
            with progress_bar(sum(map(len, found)), f"Scoring {path}", not quiet and not as_json) as advance:
                measured[path] = measure_bits_per_byte(loaded, found, on_progress=advance)
        file = write_model_card(
            model, out, repo_id=repo_id, license=license, language=language or None, datasets=dataset or None,
            base_model=base_model, tags=tag or None, description=description, bits_per_byte=measured or None,
            overwrite=overwrite,
        )  # fmt: skip
        if as_json:
            bits = {path: found.bits_per_byte for path, found in measured.items()}
            typer.echo(json.dumps({"file": str(file), "bits_per_byte": bits}))
            return
        typer.echo(f"Wrote {file}.")
