"""`blt-hf generate`."""

import codecs
import json
import sys
import time
from typing import Annotated

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Weights,
    load,
    load_byte_model,
    model_or_default,
    plain_messages,
    read_input,
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The beginning of the text. Default, or -: stdin.")] = None,
    model: Model = None,
    max_new_bytes: Annotated[int, typer.Option("--max-new-bytes", "-n", min=1, help="Most bytes to write.")] = 200,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sample at this temperature. Default, or 0: greedy decoding.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest bytes of this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many of the likeliest bytes.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out bytes below this share of the highest probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: bytes that are in the text become less likely.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    speculate: Annotated[
        int | None, typer.Option(help="Bytes that the local models draft before the whole model verifies them.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat: each line of stdin is a message.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    dtype: Weights = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text and print it as it is written.

    The new text goes to stdout, without the prompt. A terminal shows signs for control codes. In a chat, `/reset`
    starts a new conversation and `/quit` (or the end of stdin) ends it.

    Examples:

    - `blt-hf generate "The import statement "`
    - `cat story.txt | blt-hf generate --temperature 0.7 --min-p 0.1 --seed 1 -n 500 > more.txt`
    - `blt-hf generate "def main(" --speculate 8 --json`
    - `blt-hf generate --chat --model my/blt-chat --system "You answer in one line."`
    """
    with plain_messages():
        if system is not None and not chat:
            raise ValueError("--system is for --chat.")
        if chat and (prompt is not None or as_json):
            raise ValueError(
                "--chat reads its messages from stdin, and answers in text: no PROMPT and no --json with it."
            )
        name = model_or_default(model)
        options = {"max_new_tokens": max_new_bytes, "do_sample": bool(temperature)}
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        given = {key: value for key, value in sampling.items() if value is not None}
        if given and not temperature and set(given) != {"temperature"}:
            raise ValueError(
                "--top-p, --top-k and --min-p choose among samples: give --temperature (1 is the model's own)."
            )
        if temperature:
            options |= {"top_k": 0, **given}
        if repetition_penalty is not None:
            options["repetition_penalty"] = repetition_penalty
        if speculate is not None:
            options["self_speculation_window"] = speculate
        data = None if chat else read_input(None if prompt is None else [prompt])[0]
        writer = _Writer(name, dtype, device, options, stop or [], seed)
        if chat:
            _chat(writer, system)
            return
        started = time.perf_counter()
        written = writer.write(writer.tokenizer(data, return_tensors="pt"), show=not as_json)
        seconds = time.perf_counter() - started
        if as_json:
            text = {"text": written.decode("utf-8", "replace"), "num_bytes": len(written), "seconds": seconds}
            told = {"model": name, "prompt": data.decode("utf-8", "replace"), **text, "bytes_hex": written.hex()}
            typer.echo(json.dumps(told))
        elif sys.stdout.isatty():
            typer.echo()


def _chat(writer: "_Writer", system: str | None) -> None:
    if writer.tokenizer.chat_template is None:
        raise ValueError("--chat needs a tokenizer with a chat template; this model's has none.")
    messages = start = [] if system is None else [{"role": "system", "content": system}]
    while True:
        if sys.stdin.isatty():
            typer.secho("> ", nl=False, fg="cyan")
        line = sys.stdin.readline()
        message = line.strip()
        if not line or message == "/quit":
            return
        if message == "/reset":
            messages = start
            continue
        if not message:
            continue
        messages = [*messages, {"role": "user", "content": message}]
        inputs = writer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = writer.write(inputs)
        typer.echo()
        messages = [*messages, {"role": "assistant", "content": answer.decode("utf-8", "replace")}]


class _Writer:
    """Generates texts and prints them to stdout at the same time."""

    def __init__(self, name: str, dtype: Dtype, device: str | None, options: dict, stop: list[str], seed: int):
        from transformers import AutoTokenizer, set_seed

        self.model = load_byte_model(name, dtype, device)
        self.tokenizer = load(AutoTokenizer.from_pretrained, name)
        self.options = options | ({"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {})
        set_seed(seed)

    def write(self, inputs, show: bool = True) -> bytes:
        from blt_hf.tokenizer.encoding import bytes_of

        streamer = ByteStreamer() if show else None
        inputs = inputs.to(self.model.device)
        ids = self.model.generate(**inputs, **self.options, streamer=streamer)
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return bytes_of(new)


class ByteStreamer:
    """Prints generated text to stdout as it comes.

    A terminal gets each character when it is complete, and signs for control codes, since a model may write anything.
    A file or a pipe gets each byte.
    """

    def __init__(self):
        self.is_terminal = sys.stdout.isatty()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_prompt = True

    def put(self, value) -> None:
        from blt_hf.tokenizer.encoding import bytes_of

        if self.is_prompt:  # `generate` shows it first
            self.is_prompt = False
            return
        self._show(bytes_of(value.reshape(-1).tolist()))

    def end(self) -> None:
        self._show(b"", is_last=True)

    def _show(self, data: bytes, is_last: bool = False) -> None:
        if not self.is_terminal:
            stream = getattr(sys.stdout, "buffer", None)
            stream.write(data)
            stream.flush()
            return
        for character in self.decoder.decode(data, is_last):
            sys.stdout.write(_printable(character))
        sys.stdout.flush()


def _printable(character: str) -> str:
    from blt_hf.patches.display import split_glyphs
    from blt_hf.tokenizer.encoding import byte_ids

    if character in "\n\t":
        return character
    (glyph,) = split_glyphs(byte_ids(character))
    return glyph.label if glyph.kind == "code" else character
