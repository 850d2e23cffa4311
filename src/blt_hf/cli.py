"""The `blt-hf` command, also `python -m blt_hf.cli`."""

import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _blt_hf() -> None:
    """Byte Latent Transformers on the Hugging Face stack."""


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Tells user errors and warnings in one line each, on stderr; an error ends the command with status 1."""

    def show(message, *args, **kwargs):
        typer.secho(f"note: {message}", err=True, fg="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show  # restored by `catch_warnings`
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except ValueError as error:
            typer.secho(f"error: {error}", err=True, fg="red")
            raise typer.Exit(1) from None


def _load(load: Callable, name: str, *args, **kwargs):
    """`load(name, ...)`; what transformers says of a name that it cannot load becomes a user error."""
    import blt_hf  # noqa: F401 (registers the classes)

    try:
        return load(name, *args, **kwargs)
    except (OSError, ImportError) as error:
        raise ValueError(f"{name} cannot be loaded: {str(error).strip()}") from error


def _load_model(name: str, dtype: "Dtype", device: str | None, quiet: bool):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    model = _load(AutoModelForCausalLM.from_pretrained, name, dtype=dtype.value).eval()
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Layout(str, Enum):
    transformers = "transformers"
    meta = "meta"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class PatchingSource(str, Enum):
    auto = "auto"
    train_args = "train_args"
    entropy_model = "entropy_model"
    args = "args"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id, such as facebook/blt-1b.")],
    out: Annotated[str, typer.Argument(help="Folder to make; it appears whole or not at all.")],
    to: Annotated[Layout, typer.Option(help="Layout of OUT.")] = Layout.transformers,
    entropy_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the entropy model, if it is not in SOURCE.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in OUT; auto keeps each one's.")] = Dtype.auto,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest weights file, such as 500MB; 5GB if not given.")
    ] = None,
    patching: Annotated[
        PatchingSource, typer.Option(help="Whose patching settings to use where the files of SOURCE disagree.")
    ] = PatchingSource.auto,
    meta_args: Annotated[
        str | None, typer.Option(help="With --to meta: meta_args.json of the conversion that SOURCE comes from.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of SOURCE on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Convert a checkpoint of Meta's BLT code to transformers, or back with --to meta."""
    from .conversion import convert_meta_checkpoint, export_meta_checkpoint

    common = {"dtype": dtype.value, "revision": revision, "overwrite": overwrite, "progress": not quiet}
    with _plain_messages():
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


_Texts = Annotated[list[str], typer.Argument(help="Files or folders. A .jsonl file holds a text in each line.")]
_TextColumn = Annotated[str, typer.Option(help="Field of a .jsonl line that is the text.")]
_Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; the first GPU if there is one.")]
_Weights = Annotated[Dtype, typer.Option(help="Type of the weights; auto is what they are saved as.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def _print_rows(rows: list[tuple[str, str]], title: str | None = None) -> None:
    if title:
        typer.echo(title)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        typer.echo(f"  {label:<{width}}  {value}")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a BLT, or of an entropy model.")],
    texts: _Texts,
    patch_size: Annotated[float, typer.Option(help="Mean bytes of a patch that are wanted.")] = 4.5,
    monotonic: Annotated[bool, typer.Option("--monotonic", help="The threshold is for rises of the entropy.")] = False,
    threshold_add: Annotated[
        float | None, typer.Option(help="Nats by which the entropy must rise as well as exceed the threshold.")
    ] = None,
    max_patch_length: Annotated[int | None, typer.Option(help="Longer patches are split; bytes.")] = None,
    newline_reset: Annotated[
        bool, typer.Option("--newline-reset", help="The entropy model forgets what came before a newline.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Save the rule in the config.json of MODEL.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    max_length: Annotated[int, typer.Option(help="Longer texts are cut into rows of so many bytes.")] = 8192,
    text_column: _TextColumn = "text",
    dtype: _Weights = Dtype.auto,
    device: _Device = None,
    as_json: _AsJson = False,
    quiet: _Quiet = False,
) -> None:
    """Find the entropy threshold for a patch size. What no option says is as in MODEL."""
    from .conversion.files import progress_bar
    from .training.calibration import calibrate_threshold
    from .training.data import read_texts

    with _plain_messages():
        config_file = _writable_config(model) if write else None
        found_texts = read_texts(texts, text_column)
        loaded = _load_model(model, dtype, device, quiet or as_json)
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
        _print_rows(rows)
        _print_histogram(found.histogram)
        if config_file is not None:
            typer.echo(f"Saved in {config_file}.")


def _print_histogram(histogram: dict[int, int], num_rows: int = 16, width: int = 40) -> None:
    """A bar for each length; the longest patches share the last one."""
    counts = {n: count for n, count in histogram.items() if n < num_rows}
    longer = sum(count for n, count in histogram.items() if n >= num_rows)
    total, most = sum(histogram.values()), max(*counts.values(), longer, 1)
    rows = [(f"{n} byte{'s' * (n > 1)}", count) for n, count in counts.items()]
    if longer:
        rows.append((f"{num_rows} to {max(histogram)}", longer))
    bars = [(label, f"{count / total:6.1%}  {'█' * round(width * count / most)}") for label, count in rows]
    _print_rows(bars, "Patches by length:")


def _writable_config(model: str) -> Path:
    """The config.json of a BLT in a local folder."""
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"--write needs a local folder with a config.json; {model} is none.")
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if kind != "blt":
        raise ValueError(f"--write needs a BLT: {path} is of type {kind!r}, which has no place for a threshold.")
    return path


def _write_settings(path: Path, found) -> None:
    """Sets the fields of the rule and leaves all others; the file is replaced whole."""
    from .model.configuration_blt import BltConfig

    content = {**json.loads(path.read_text(encoding="utf-8")), **found.settings}
    BltConfig.from_dict(content)  # raises if they do not fit together
    partial = path.with_name(f".config.{uuid.uuid4().hex[:8]}.json")
    try:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.chmod(path.stat().st_mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id: a BLT, an entropy model, or a token model.")],
    texts: _Texts,
    max_length: Annotated[
        int | None, typer.Option(help="Ids in a window; what the config says, at most 4096, if not given.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Ids by which windows move on; half a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    tokenizer: Annotated[str | None, typer.Option(help="Of a token model, if it is not in MODEL.")] = None,
    text_column: _TextColumn = "text",
    dtype: _Weights = Dtype.auto,
    device: _Device = None,
    as_json: _AsJson = False,
    quiet: _Quiet = False,
) -> None:
    """Bits per byte, bytes a patch and bytes a second of a model on texts; token models give the same number."""
    from transformers import AutoTokenizer

    from .conversion.files import progress_bar
    from .evaluation import measure_bits_per_byte
    from .training.data import read_texts

    with _plain_messages():
        found_texts = read_texts(texts, text_column)
        loaded = _load_model(model, dtype, device, quiet or as_json)
        is_byte_model = loaded.config.model_type in ("blt", "blt_patcher")
        if is_byte_model and tokenizer is not None:
            raise ValueError("--tokenizer is for token models; this one reads bytes.")
        loaded_tokenizer = None if is_byte_model else _load(AutoTokenizer.from_pretrained, tokenizer or model)
        with progress_bar(sum(map(len, found_texts)), "Scoring", not quiet and not as_json) as advance:
            measured = measure_bits_per_byte(
                loaded,
                found_texts,
                loaded_tokenizer,
                max_length=max_length,
                stride=stride,
                batch_size=batch_size,
                on_progress=advance,
            )
        if as_json:
            rates = {"bytes_per_token": measured.bytes_per_token, "bytes_per_second": measured.bytes_per_second}
            typer.echo(json.dumps({**dataclasses.asdict(measured), **rates}))
            return
        rows = [("bits per byte", f"{measured.bits_per_byte:.4f}")]
        if measured.bytes_per_patch is not None:
            rows.append(("bytes a patch", f"{measured.bytes_per_patch:.3f}"))
        if not is_byte_model:
            rows.append(("bytes a token", f"{measured.bytes_per_token:.3f}"))
        rows.append(("bytes a second", f"{measured.bytes_per_second:,.0f}"))
        rows.append(("measured on", f"{measured.num_bytes:,} bytes in {measured.num_texts:,} texts"))
        _print_rows(rows)


@app.command()
def flops(
    config: Annotated[str | None, typer.Argument(help="Folder or Hub id of a BLT or a Llama-like model.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known shape instead: blt-1b, blt-7b, llama-3-8b or llama-3.2-1b.")
    ] = None,
    patch_bytes: Annotated[list[float] | None, typer.Option(help="Mean bytes of a patch; may be repeated.")] = None,
    context_bytes: Annotated[float, typer.Option(help="Bytes of the text.")] = 8192,
    bytes_per_token: Annotated[float, typer.Option(help="Of token models.")] = 4.4,
    training: Annotated[bool, typer.Option("--training", help="Forward and backward instead of a forward.")] = False,
    against: Annotated[str | None, typer.Option(help="A preset, folder or Hub id to compare with.")] = None,
    as_json: _AsJson = False,
) -> None:
    """FLOPs for a byte by the paper's equations, part by part, with and without the entropy model."""
    from .evaluation.flops import DEFAULT_PATCH_BYTES, flops_per_byte

    with _plain_messages():
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

    from .evaluation.flops import PRESETS, preset_config

    if preset is not None or name in PRESETS:
        return preset_config(preset or name)
    return _load(AutoConfig.from_pretrained, name)


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
    _print_rows(rows, title)


def main() -> None:
    app(prog_name="blt-hf")


if __name__ == "__main__":
    main()
