"""`blt-hf calibrate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Quiet,
    TextColumn,
    Texts,
    Weights,
    load_model,
    plain_messages,
    print_histogram,
    print_rows,
)


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a BLT, or of an entropy model.")],
    texts: Texts,
    patch_size: Annotated[float, typer.Option(help="Mean number of bytes of a patch to reach.")] = 4.5,
    monotonic: Annotated[bool, typer.Option("--monotonic", help="The threshold is for rises of the entropy.")] = False,
    threshold_add: Annotated[float | None, typer.Option(help="Nats by which the entropy must also rise.")] = None,
    max_patch_length: Annotated[int | None, typer.Option(help="Split patches of more bytes than this.")] = None,
    newline_reset: Annotated[
        bool, typer.Option("--newline-reset", help="The entropy model forgets the bytes before a newline.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Save the rule to the config.json of MODEL.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    max_length: Annotated[int, typer.Option(help="Cut longer texts into rows of this many bytes.")] = 8192,
    text_column: TextColumn = "text",
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the entropy threshold for a patch size. Options that are not given are as in MODEL.

    Examples:

    - `blt-hf calibrate pretrained/blt-5m docs/ --patch-size 4.5`
    - `blt-hf calibrate my/blt texts.jsonl --monotonic --max-patch-length 32 --write`
    """
    from blt_hf.conversion.files import progress_bar
    from blt_hf.training.calibration import calibrate_threshold
    from blt_hf.training.data import read_texts

    with plain_messages():
        config_file = _writable_config(model) if write else None
        found_texts = read_texts(texts, text_column)
        loaded = load_model(model, dtype, device, quiet or as_json)
        with progress_bar(sum(map(len, found_texts)), "Entropies", not quiet and not as_json) as advance:
            found = calibrate_threshold(
                loaded,
                found_texts,
                patch_size,
                monotonicity=monotonic or None,
                threshold_add=threshold_add,
                max_patch_length=max_patch_length,
                newline_reset=newline_reset or None,
                batch_size=batch_size,
                max_length=max_length,
                on_progress=advance,
            )
        if config_file is not None:
            _write_settings(config_file, found)
        if as_json:
            typer.echo(json.dumps({**dataclasses.asdict(found), "settings": found.settings}))
            return
        rows = [
            ("threshold", f"{found.threshold:.6f} nats"),
            ("bytes a patch", f"{found.mean_patch_size:.3f} (wanted {patch_size:g})"),
            ("measured on", f"{found.num_bytes:,} bytes in {found.num_patches:,} patches"),
        ]
        print_rows(rows)
        print_histogram(found.histogram)
        if config_file is not None:
            typer.echo(f"Saved in {config_file}.")


def _writable_config(model: str) -> Path:
    """Returns the config.json of a BLT in a local folder."""
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"--write needs a local folder with a config.json; {model} is none.")
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if kind != "blt":
        raise ValueError(f"--write needs a BLT: {path} is of type {kind!r}, which has no place for a threshold.")
    return path


def _write_settings(path: Path, found) -> None:
    """Sets the fields of the rule, keeps all others, and replaces the file in one step."""
    from blt_hf.conversion.files import write_whole
    from blt_hf.model.configuration_blt import BltConfig

    content = {**json.loads(path.read_text(encoding="utf-8")), **found.settings}
    BltConfig.from_dict(content)  # raises if they do not fit together
    content = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_whole(path, lambda partial: partial.write_text(content, encoding="utf-8"))
