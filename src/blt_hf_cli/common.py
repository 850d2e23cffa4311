"""Options, one-line messages and loading of models, for all commands."""

import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


MODEL_VARIABLE = "BLT_HF_MODEL"
_BUNDLED = Path("pretrained", "blt-5m")


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Texts = Annotated[list[str], typer.Argument(help="Files or folders. A .jsonl file holds a text in each line.")]
TextColumn = Annotated[str, typer.Option(help="Field of a .jsonl line that is the text.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; the first GPU if there is one.")]
Weights = Annotated[Dtype, typer.Option(help="Type of the weights; auto: as they were saved.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", envvar=MODEL_VARIABLE, show_envvar=True,
        help="Folder or Hub id. Default, in a clone of the project: the model that comes with it.",
    ),
]  # fmt: skip


@contextmanager
def plain_messages() -> Iterator[None]:
    """Prints user errors and warnings on stderr, one line each. An error ends the command with status 1."""

    def show(message, *args, **kwargs):
        typer.secho(f"note: {message}", err=True, fg="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show  # restored by `catch_warnings`
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, ImportError) as error:
            typer.secho(f"error: {error}", err=True, fg="red")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.secho("\nstopped.", err=True)
            raise typer.Exit(130) from None


def need_extra(package: str, extra: str) -> None:
    """Raises a `ValueError` that names the extra to install if `package` is missing."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f'this needs {package}, which is not installed: pip install "blt-hf[{extra}]".')


def model_or_default(name: str | None) -> str:
    """Returns `name`, or the folder of the model that comes with the project."""
    if name is not None:
        return name
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / _BUNDLED / "config.json").is_file():
            return str(root / _BUNDLED)
    raise ValueError(
        f"no model was named, and there is no {_BUNDLED} here (a clone of the project has it). Give --model a folder or "
        f"a name on the Hub, or set {MODEL_VARIABLE}."
    )


def load(load: Callable, name: str, *args, **kwargs):
    """Calls `load(name, ...)`, and turns transformers' error for a name that cannot be loaded into a user error."""
    import blt_hf  # noqa: F401 (registers the classes)

    try:
        return load(name, *args, **kwargs)
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, ValueError) and "config.json" not in str(error):
            raise
        raise ValueError(_why_not(name, str(error).strip())) from error


def _why_not(name: str, told: str) -> str:
    """Says why `name` cannot be loaded, and names the remedy."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        inside = [found.parent.name for found in sorted(path.glob("*/config.json"))]
        hint = f" Folders below it that have one: {', '.join(inside)}." if inside else ""
        return f"{name} cannot be loaded: the folder has no config.json.{hint}"
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if not path.exists() and looks_like_path:
        near = [found.parent.name for found in sorted(path.parent.glob("*/config.json"))]
        hint = f" In {path.parent} there are: {', '.join(near)}." if near else ""
        return f"{name} cannot be loaded: no such folder, and no name on the Hub (user/name).{hint}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not path.exists():
        return f"{name} cannot be loaded: HF_HUB_OFFLINE is set, and it was not downloaded before."
    return f"{name} cannot be loaded: {told}"


def load_model(name: str, dtype: Dtype = Dtype.auto, device: str | None = None, quiet: bool = True):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    model = load(AutoModelForCausalLM.from_pretrained, name, dtype=dtype.value).eval()
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_byte_model(name: str, dtype: Dtype, device: str | None, kinds: tuple[str, ...] = ("blt", "blt_patcher")):
    """Loads a BLT or an entropy model; another model, or one that is not of `kinds`, is an error."""
    model = load_model(name, dtype, device)
    kind = model.config.model_type
    if kind not in kinds:
        wanted = " or ".join({"blt": "a BLT", "blt_patcher": "an entropy model"}[kind] for kind in kinds)
        raise ValueError(f"{name} is of type {kind!r}; {wanted} is needed.")
    return model


def print_rows(rows: list[tuple[str, str]], title: str | None = None) -> None:
    if title:
        typer.echo(title)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        typer.echo(f"  {label:<{width}}  {value}")


def print_histogram(histogram: dict[int, int], num_rows: int = 16, width: int = 40) -> None:
    """Prints a bar for each length of patches; all lengths from `num_rows` on share the last bar."""
    counts = {n: count for n, count in histogram.items() if n < num_rows}
    longer = sum(count for n, count in histogram.items() if n >= num_rows)
    total, most = sum(histogram.values()), max(*counts.values(), longer, 1)
    rows = [(f"{n} byte{'s' * (n > 1)}", count) for n, count in counts.items()]
    if longer:
        rows.append((f"{num_rows} to {max(histogram)}", longer))
    bars = [(label, f"{count / total:6.1%}  {'█' * round(width * count / most)}") for label, count in rows]
    print_rows(bars, "Patches by length:")


def read_input(texts: list[str] | None) -> list[str | bytes]:
    """Returns the texts of the command line. `-`, or no text, stands for the bytes of stdin."""
    from blt_hf.tokenizer.encoding import to_bytes

    if not texts:
        if sys.stdin.isatty():
            raise ValueError("no text: give one as an argument, or pipe one in.")
        texts = ["-"]
    return [sys.stdin.buffer.read() if text == "-" else to_bytes(text) for text in texts]


def read_config(context: typer.Context, path: str | None) -> str | None:
    """Makes the values of a YAML file the defaults of the options."""
    if path is None or context.resilient_parsing:
        return path
    import yaml

    with plain_messages():
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ValueError(f"--config: {path} cannot be read: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"--config: {path} holds a {type(values).__name__}; options with values are needed.")
        # A key is the long name of an option.
        named = {max(p.opts, key=len).lstrip("-").replace("-", "_"): p.name for p in context.command.params}
        values = {str(name).replace("-", "_"): value for name, value in values.items()}
        known = sorted(named.keys() - {"config", "help"})
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"--config: {path} sets {', '.join(unknown)}; there are {', '.join(known)}.")
        if isinstance(values.get("set"), dict):
            values["set"] = [f"{name}={json.dumps(value)}" for name, value in values["set"].items()]
        if isinstance(values.get("texts"), str):
            values["texts"] = [values["texts"]]
        context.default_map = {named[name]: value for name, value in values.items()}
    return path


def command_with(shared_class: type, num_first: int | None = None, **defaults) -> Callable[[Callable], Callable]:
    """Makes a command of a function whose first argument is a `shared_class`, made of options that commands share.

    Args:
        num_first: shared options that stand before those of the command. None: all.
        defaults: defaults of shared options for this command.
    """
    shared = inspect.signature(shared_class).parameters.values()
    shared = [option.replace(default=defaults.get(option.name, option.default)) for option in shared]

    def make(function: Callable) -> Callable:
        _, *own = inspect.signature(function).parameters.values()
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

        @functools.wraps(function)
        def command(**options):
            with plain_messages():
                run = shared_class(**{option.name: options.pop(option.name) for option in shared})
                function(run, **options)

        # typer reads both.
        first = len(shared) if num_first is None else num_first
        command.__signature__ = inspect.Signature([*shared[:first], *own, *shared[first:]])
        command.__annotations__ = {option.name: option.annotation for option in (*shared, *own)}
        return command

    return make
