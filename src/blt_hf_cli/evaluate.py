"""`blt-hf evaluate`."""

import dataclasses
import json
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
    load,
    load_model,
    plain_messages,
    print_rows,
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id: a BLT, an entropy model, or a token model.")],
    texts: Texts,
    max_length: Annotated[
        int | None, typer.Option(help="Ids in a window. Default: the limit of the config, at most 4096.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Ids from one window to the next. Default: half a window.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    tokenizer: Annotated[str | None, typer.Option(help="Of a token model, if it is not in MODEL.")] = None,
    text_column: TextColumn = "text",
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure bits per byte, bytes a patch and bytes a second of a model on texts.

    Bits per byte of a BLT, an entropy model and a token model can be compared.

    Examples:

    - `blt-hf evaluate pretrained/blt-5m docs/`
    - `blt-hf evaluate path/to/llama held-out.jsonl --batch-size 1 --json`
    """
    from transformers import AutoTokenizer

    from blt_hf.conversion.files import progress_bar
    from blt_hf.evaluation import measure_bits_per_byte
    from blt_hf.training.data import read_texts

    with plain_messages():
        found_texts = read_texts(texts, text_column)
        loaded = load_model(model, dtype, device, quiet or as_json)
        is_byte_model = loaded.config.model_type in ("blt", "blt_patcher")
        if is_byte_model and tokenizer is not None:
            raise ValueError("--tokenizer is for token models; this one reads bytes.")
        loaded_tokenizer = None if is_byte_model else load(AutoTokenizer.from_pretrained, tokenizer or model)
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
        print_rows(rows)
