"""`blt-hf convert`."""

from enum import Enum
from typing import Annotated

import typer

from .common import Dtype, plain_messages


class Layout(str, Enum):
    transformers = "transformers"
    meta = "meta"


class PatchingSource(str, Enum):
    auto = "auto"
    train_args = "train_args"
    entropy_model = "entropy_model"
    args = "args"


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id, such as facebook/blt-1b.")],
    out: Annotated[str, typer.Argument(help="Folder to make; it appears when it is complete.")],
    to: Annotated[Layout, typer.Option(help="Layout of OUT.")] = Layout.transformers,
    entropy_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the entropy model, if it is not in SOURCE.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the weights in OUT; auto keeps the type of each tensor.")
    ] = Dtype.auto,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Size limit of a weights file, such as 500MB. Default: 5GB.")
    ] = None,
    patching: Annotated[
        PatchingSource, typer.Option(help="Whose patching settings to use where the files of SOURCE disagree.")
    ] = PatchingSource.auto,
    meta_args: Annotated[
        str | None, typer.Option(help="With --to meta: the meta_args.json that the conversion to transformers wrote.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of SOURCE on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Convert a checkpoint of Meta's BLT code to transformers, or back with --to meta.

    Examples:

    - `blt-hf convert facebook/blt-1b blt-1b`
    - `blt-hf convert path/to/checkpoint blt-1b --dtype bfloat16 --max-shard-size 2GB`
    - `blt-hf convert blt-1b blt-1b-meta --to meta`
    """
    from blt_hf.conversion import convert_meta_checkpoint, export_meta_checkpoint

    common = {"dtype": dtype.value, "revision": revision, "overwrite": overwrite, "progress": not quiet}
    with plain_messages():
        if to is Layout.meta:
            for name, given in (
                ("--entropy-model", entropy_model),
                ("--max-shard-size", max_shard_size),
                ("--patching", patching is not PatchingSource.auto),
            ):
                if given:
                    raise ValueError(f"{name} has no meaning with --to meta.")
            path = export_meta_checkpoint(source, out, meta_args=meta_args, **common)
        else:
            if meta_args is not None:
                raise ValueError("--meta-args has a meaning with --to meta only.")
            path = convert_meta_checkpoint(
                source,
                out,
                entropy_model=entropy_model,
                max_shard_size=max_shard_size or "5GB",
                patching=patching.value,
                **common,
            )
        files = [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        typer.echo(f"{path}: {len(files)} files, {size / 1e9:.2f} GB")
