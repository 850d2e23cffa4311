"""`blt-hf byteify`: a BLT around the layers of a token model, which learns from that model."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .common import Quiet, TextColumn, Texts, command_with, plain_messages, print_rows


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback()
def _byteify() -> None:
    """Make a BLT of a token model (Llama, Mistral, SmolLM2): its layers stay, what makes and reads patches is learned.

    Each command runs alone, may be stopped, and goes on where it stopped when it is called again.

    - `blt-hf byteify write llama prompts.txt -o texts.jsonl --chat`
    - `blt-hf byteify states llama texts.jsonl -o states --config config.json`
    - `blt-hf byteify encoder llama states -o encoder --config config.json --steps 1000 --layers 4`
    - `blt-hf byteify decoder llama states -o decoder --config config.json --steps 1000 --start encoder`
    - `blt-hf byteify joint llama states -o joint --config config.json --steps 1000 --start decoder --lora 8`
    - `blt-hf byteify save llama joint -o my-blt --config config.json`
    """


TokenModel = Annotated[str, typer.Argument(help="Folder or Hub id of the token model.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of a GGUF file in that folder.")]
ConfigFile = Annotated[
    str, typer.Option("--config", "-c", help="JSON file with fields of BltConfig, as `byteify_config` takes them.")
]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")]
Specials = Annotated[
    list[str] | None,
    typer.Option("--special", help="NAME=ID: id of a special token of the token model in the BLT; may be repeated."),
]
EndToken = Annotated[str | None, typer.Option(help="Token that ends a text. Default: the tokenizer's eos_token.")]


Cpu = Annotated[bool, typer.Option("--cpu", help="Use no GPU.")]


def _load(name: str, gguf_file: str | None, dtype=None, cpu: bool = True):
    import torch

    from blt_hf.training.token_models import load_token_model

    from .common import load

    model, tokenizer = load(load_token_model, name, gguf_file=gguf_file)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    return model.to(device, dtype), tokenizer


def _read_config(path: str) -> dict:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config: there is no file {path}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} holds a {type(content).__name__}; an object with fields is needed.")
    return content


def _special_ids(specials: list[str] | None) -> dict[str, int]:
    found = {}
    for entry in specials or []:
        name, equals, number = entry.rpartition("=")
        if not equals or not number.isdigit():
            raise ValueError(f"--special takes NAME=ID; got {entry!r}.")
        found[name] = int(number)
    return found


@app.command()
def write(
    token_model: TokenModel,
    prompts: Annotated[str, typer.Argument(help="File with a prompt in each line.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A .jsonl file, which grows.")],
    gguf_file: GgufFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages of a user.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chats.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are written to each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 is greedy.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16/--fp32", help="Type of the weights.")] = True,
    cpu: Cpu = False,
    quiet: Quiet = False,
) -> None:
    """Let the token model write texts from prompts."""
    import torch

    from blt_hf.conversion.files import progress_bar
    from blt_hf.training.teacher_texts import write_texts

    with plain_messages():
        if not Path(prompts).is_file():
            raise ValueError(f"there is no file {prompts}.")
        lines = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        model, tokenizer = _load(token_model, gguf_file, torch.bfloat16 if bf16 else None, cpu)
        before = 0
        with progress_bar(len(lines), "Prompts", not quiet) as advance:
            made = write_texts(
                model, tokenizer, lines, output, max_new_tokens, batch_size, temperature,
                chat=chat, system=system, seed=seed,
            )  # fmt: skip
            for done, _ in made:
                advance(done - before)
                before = done


@app.command()
def states(
    token_model: TokenModel,
    texts: Texts,
    output: Output,
    config: ConfigFile,
    gguf_file: GgufFile = None,
    special: Specials = None,
    end_token: EndToken = None,
    early_layer: Annotated[int | None, typer.Option(help="Also keep states behind so many layers.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many bytes of text.")] = None,
    row_bytes: Annotated[int, typer.Option(min=64, help="Bytes of a row.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 4,
    bf16: Annotated[bool, typer.Option("--bf16/--fp32", help="Type of the weights.")] = True,
    cpu: Cpu = False,
    text_column: TextColumn = "text",
    quiet: Quiet = False,
) -> None:
    """Run the token model over texts once, and keep what the other commands learn from."""
    import math

    import torch

    from blt_hf.conversion.files import progress_bar
    from blt_hf.model.patching_blt import PatchingRule
    from blt_hf.training.byteify import byteify_config
    from blt_hf.training.data import read_texts
    from blt_hf.training.teacher_data import TeacherWriter
    from blt_hf.training.token_models import TokenAlphabet

    with plain_messages():
        model, tokenizer = _load(token_model, gguf_file, torch.bfloat16 if bf16 else None, cpu)
        rule = PatchingRule.from_config(byteify_config(model.config, **_read_config(config)))
        alphabet = TokenAlphabet.of(tokenizer, _special_ids(special), end_token)
        writer = TeacherWriter(model, tokenizer, alphabet, rule, output, early_layer, row_bytes, batch_size)
        found = _first_bytes(read_texts(texts, text_column), limit)
        size = sum(map(len, found))
        needs = writer.estimate(size)
        if not quiet:
            typer.echo(
                f"{size / 1e6:.1f} MB of text: about {needs['disk'] / 1e6:,.0f} MB on disk, "
                f"{needs['operations'] / 1e12:,.1f} TFLOP."
            )
        totals = {"rows": 0, "bytes": 0, "patches": 0, "nats": 0.0}
        with progress_bar(size, "States", not quiet) as advance:
            for facts in writer.write(found):
                totals = {name: totals[name] + facts[name] for name in totals}
                advance(facts["bytes"])
        bits = totals["nats"] / math.log(2) / max(totals["bytes"], 1)
        print_rows(
            [
                ("rows", f"{totals['rows']:,}"),
                ("bytes", f"{totals['bytes']:,}"),
                ("bytes a patch", f"{totals['bytes'] / max(totals['patches'], 1):.2f}"),
                ("bits per byte of the token model", f"{bits:.3f}"),
            ]
        )


def _first_bytes(texts: list[bytes], limit: int | None) -> list[bytes]:
    kept, size = [], 0
    for text in texts:
        if limit is not None and size >= limit:
            break
        kept.append(text)
        size += len(text)
    return kept


@dataclasses.dataclass(kw_only=True)
class _Run:
    """The options that the three stages have."""

    token_model: TokenModel
    data: Annotated[
        list[str], typer.Argument(help="Folders that `blt-hf byteify states` wrote; for `encoder` texts, too.")
    ]
    output: Output
    config: ConfigFile
    gguf_file: GgufFile = None
    special: Specials = None
    end_token: EndToken = None
    start: Annotated[
        str | None, typer.Option(help="Folder of another stage, or a file of its kind, to start from.")
    ] = None
    held_out: Annotated[list[str] | None, typer.Option(help="Folders of states to measure on.")] = None
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")]
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 2
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps until the peak.")] = 50
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100
    seed: Annotated[int, typer.Option(help="Of new weights and of the order of rows.")] = 0
    bf16: Annotated[bool, typer.Option("--bf16/--fp32", help="Products in bf16, and layers that are frozen.")] = True
    cpu: Cpu = False
    quiet: Quiet = False

    def run(self, make_stage, lora: int = 0, make_rows=None, make_collate=None) -> None:
        """Makes the model and runs the stage that `make_stage(model, token_model)` returns.

        `make_rows(tokenizer, rule)` makes the rows; None: they are those of the folders.
        `make_collate(token_model, tokenizer, rule, rows)` makes what batches them; None: they are padded.
        """
        import torch
        from transformers import set_seed

        from blt_hf.model.patching_blt import PatchingRule
        from blt_hf.training import learned
        from blt_hf.training.byteify import byteify
        from blt_hf.training.distillation import freeze_layers, run_stage
        from blt_hf.training.teacher_data import TeacherData, collate_teacher_rows

        rows = TeacherData(self.data) if make_rows is None else None
        held_out = TeacherData(self.held_out) if self.held_out else None
        set_seed(self.seed)
        token_model, tokenizer = _load(self.token_model, self.gguf_file)
        model = byteify(token_model, alphabet=self.alphabet(tokenizer), **_read_config(self.config))
        if self.cpu or not torch.accelerator.is_available():
            model.set_attn_implementation("eager")  # on a CPU, the backward of SDPA takes longer
        rule = PatchingRule.from_config(model.config)
        if make_rows is not None:
            rows = make_rows(tokenizer, rule)
        collate = collate_teacher_rows
        if make_collate is not None:
            collate = make_collate(token_model, tokenizer, rule, rows)
        freeze_layers(model, torch.bfloat16 if self.bf16 else torch.float32)
        started = _learned_file(self.start) if self.start else None
        if rank := lora or (learned.rank_of(started) if started else 0):  # no stage loses the adapters of one before
            learned.add_lora(model, rank)
        begun = learned.load(model, started) if started else {}
        stage = make_stage(model, token_model)
        if stage.name != "encoder":
            stage.whiten(rows, is_new=begun.get("stage") not in ("decoder", "joint"))
        del token_model
        if not self.quiet:
            _say_size(stage, rows, self.steps, self.batch_size)
        figures = run_stage(
            stage, rows, collate, self.output, held_out, max_steps=self.steps,
            per_device_train_batch_size=self.batch_size, learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps, save_steps=self.save_steps, seed=self.seed, bf16=self.bf16,
            disable_tqdm=self.quiet, use_cpu=self.cpu,
        )  # fmt: skip
        shown = [(name, f"{value:.4f}") for name, value in figures.items() if isinstance(value, float)]
        print_rows([*shown, ("learned", str(_learned_file(self.output)))])

    def alphabet(self, tokenizer):
        """Reads what the tokens of the token model are in the ids of the BLT."""
        from blt_hf.training.token_models import TokenAlphabet

        return TokenAlphabet.of(tokenizer, _special_ids(self.special), self.end_token)


def _learned_file(path: str) -> Path:
    from blt_hf.training.distillation import LEARNED_FILE

    return Path(path) / LEARNED_FILE if Path(path).is_dir() else Path(path)


def _say_size(stage, rows, steps: int, batch_size: int) -> None:
    learns = sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    held = sum(parameter.numel() * parameter.element_size() for parameter in stage.parameters())
    passes = steps * batch_size / len(rows)
    typer.echo(
        f"{learns:,} numbers learn. Weights and optimizer: {(held + 12 * learns) / 1e6:,.0f} MB. {len(rows):,} rows, "
        f"{rows.num_bytes / 1e6:.2f} MB, read {passes:.1f} times. The log tells how long it will take."
    )


Swap = Annotated[
    float, typer.Option(min=0, max=1, help="Share of words that are exchanged for words of the vocabulary.")
]
ByteShare = Annotated[
    float, typer.Option(min=0, max=1, help="Of the byte that came in the loss; the rest is the token model's.")
]


@app.command()
@command_with(_Run)
def encoder(
    run: _Run,
    layers: Annotated[int, typer.Option(min=0, help="Layers that run, and behind which states are compared.")] = 0,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of words that are misspelled.")] = 0.0,
    swap: Swap = 0.0,
    text_column: TextColumn = "text",
) -> None:
    """Train stage 1: the encoder learns to make what the layers take for tokens.

    DATA may be texts: then the token model's first layers run beside the encoder, and nothing needs to be kept on disk.
    """
    import torch

    from blt_hf.training.data import read_texts
    from blt_hf.training.distillation import EncoderStage, NoisyRows, embeddings_of
    from blt_hf.training.teacher_data import TextRows, collate_teacher_rows
    from blt_hf.training.word_swaps import WordTokens

    def make_stage(model, token_model):
        stage = EncoderStage(model, embeddings_of(token_model), layers, token_model=token_model if is_text else None)
        if stage.teacher is not None and run.bf16:
            stage.teacher.to(torch.bfloat16)
        return stage

    def make_rows(tokenizer, rule):
        alphabet = run.alphabet(tokenizer)
        change = partial(WordTokens(alphabet, run.seed).swap_in_text, share=swap) if swap else None
        return TextRows(read_texts(run.data, text_column), tokenizer, alphabet, rule, change=change)

    def make_collate(*unused):
        return NoisyRows(collate_teacher_rows, noise, seed=run.seed) if noise else collate_teacher_rows

    is_text = not any(Path(path).is_dir() and any(Path(path).glob("shard-*.json")) for path in run.data)
    if swap and not is_text:
        raise ValueError("--swap of the encoder needs texts: words that are exchanged have other states.")
    run.run(make_stage, make_rows=make_rows if is_text else None, make_collate=make_collate)


@app.command()
@command_with(_Run)
def decoder(
    run: _Run,
    swap: Swap = 0.0,
    swap_rows: Annotated[float, typer.Option(min=0, max=1, help="Share of rows in which words are exchanged.")] = 1.0,
    encoder_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the encoder's loss, with which it learns as well; 0: it stays.")
    ] = 0.0,
    layers: Annotated[int, typer.Option(min=0, help="Of that loss: layers that run.")] = 0,
    byte_share: ByteShare = 0.0,
    own_states: Annotated[
        bool, typer.Option("--own-states", help="From this model's states, not the token model's: after `joint`.")
    ] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="With --own-states, .jsonl files besides, with `prompt` and `completion`, which is learned."
        ),
    ] = None,
) -> None:
    """Train stage 2: the decoder learns to spell what the token model's states say.

    With --encoder-weight, the encoder learns with it: its n-grams can hold how words are spelled. With --swap, states are
    moved so that they say words of the vocabulary, which few texts hold often enough. States behind the first layers say
    nothing of new words, so the encoder learns from them in the other rows alone (--swap-rows).
    """
    from blt_hf.training.data import read_texts
    from blt_hf.training.distillation import DecoderStage, EncoderDecoderStage, embeddings_of
    from blt_hf.training.teacher_data import JoinedRows, PromptRows, TeacherData, collate_teacher_rows
    from blt_hf.training.word_swaps import SwappedStates, WordTokens

    def make_rows(tokenizer, rule):
        parts = [[text.decode() for text in read_texts(prompts, name)] for name in ("prompt", "completion")]
        if len(parts[0]) != len(parts[1]):
            raise ValueError(f"--prompts: every line of {', '.join(prompts)} must hold both texts; some are empty.")
        return JoinedRows([TeacherData(run.data), PromptRows(zip(*parts), tokenizer, run.alphabet(tokenizer))])

    def make_collate(token_model, tokenizer, rule, rows):
        if not swap:
            return collate_teacher_rows
        alphabet = run.alphabet(tokenizer)
        words = WordTokens(alphabet, run.seed)
        states = rows.some_states()
        return SwappedStates(collate_teacher_rows, token_model, words, rule, states, alphabet, swap, swap_rows)

    def make_stage(model, token_model):
        if not encoder_weight:
            return DecoderStage(model, byte_share, own_states)
        return EncoderDecoderStage(model, embeddings_of(token_model), layers, encoder_weight, byte_share)

    if layers and not encoder_weight:
        raise ValueError("--layers are those of the encoder's loss; it needs --encoder-weight above 0.")
    if own_states and (swap or encoder_weight):
        raise ValueError(
            "--own-states goes with neither --swap nor --encoder-weight, which move states or make others."
        )
    if prompts and not own_states:
        raise ValueError("--prompts needs --own-states: the token model has no states of such texts.")
    run.run(make_stage, make_rows=make_rows if prompts else None, make_collate=make_collate)


@app.command()
@command_with(_Run)
def joint(
    run: _Run,
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters on the layers; 0: none.")] = 0,
    state_weight: Annotated[float, typer.Option(min=0, help="Weight of the error of patch states.")] = 0.1,
    early_layer: Annotated[int | None, typer.Option(help="Also compare states behind so many layers.")] = None,
    byte_share: ByteShare = 0.5,
    token_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the divergence between the next tokens that the head reads.")
    ] = 0.3,
    word_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the error of a word with a mark, against the word's embedding.")
    ] = 0.1,
) -> None:
    """Train stage 3: bytes in, bytes out, through all layers."""
    from blt_hf.training.distillation import JointStage

    def make_stage(model, token_model):
        return JointStage(model, state_weight, early_layer, byte_share, token_model, token_weight, word_weight)

    run.run(make_stage, lora=lora)


@app.command()
def save(
    token_model: TokenModel,
    learned_file: Annotated[str, typer.Argument(metavar="LEARNED", help="Folder of a stage, or a file of its kind.")],
    output: Output,
    config: ConfigFile,
    gguf_file: GgufFile = None,
    special: Specials = None,
    end_token: EndToken = None,
) -> None:
    """Put layers and what was learned together: a folder that any client loads."""
    from blt_hf import BltTokenizer
    from blt_hf.training import learned
    from blt_hf.training.byteify import byteify
    from blt_hf.training.token_models import TokenAlphabet

    with plain_messages():
        model, tokenizer = _load(token_model, gguf_file)
        alphabet = TokenAlphabet.of(tokenizer, _special_ids(special), end_token)
        blt = byteify(model, alphabet=alphabet, **_read_config(config))
        learned.load(blt, _learned_file(learned_file))
        blt.save_pretrained(output)
        BltTokenizer().save_pretrained(output)
        typer.echo(f"Saved in {output}.")


__all__ = ["app"]
