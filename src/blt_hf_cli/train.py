"""`blt-hf train entropy`, `blt-hf train blt` and `blt-hf train lora`: a thin front to `Trainer` of transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AsJson,
    Dtype,
    Quiet,
    TextColumn,
    Texts,
    command_with,
    load,
    load_byte_model,
    need_extra,
    print_rows,
    read_config,
)


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)

SIZES = {  # encoder and decoder width, decoder layers, global width, global layers, rows of a hash table
    "tiny": (32, 1, 64, 1, 500),
    "small": (128, 3, 256, 6, 5_000),
    "base": (384, 6, 768, 12, 50_000),
    "1b": (1024, 9, 2048, 25, 500_002),
}
ENTROPY_SIZES = {"tiny": (32, 1), "small": (128, 4), "base": (384, 8), "1b": (768, 14)}  # width, layers


@app.callback()
def _train() -> None:
    """Train an entropy model, a BLT, or a LoRA adapter, with `Trainer` of transformers.

    Options may stand in a YAML file, with their long names (`--config recipe.yaml`); those of the command line win.

    Examples:

    - `blt-hf train entropy texts/ -o entropy-model`
    - `blt-hf train blt texts/ --patcher entropy-model -o my-blt`
    - `blt-hf train lora chats.jsonl --model my-blt -o my-adapter`
    """


@dataclasses.dataclass(kw_only=True)
class _Run:
    """Holds the options that all three commands have, in the order of their help, and does their common work."""

    texts: Texts
    output: Annotated[str, typer.Option("--output", "-o", help="Folder that gets the model and its tokenizer.")]
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", is_eager=True, callback=read_config, help="YAML file with options."),
    ] = None
    held_out: Annotated[
        list[str] | None, typer.Option(help="File or folder to measure on; else some of TEXTS are kept back.")
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")]
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step and process.")] = 8
    context: Annotated[int, typer.Option(min=16, help="Bytes of a row.")] = 1024
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of rows.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")] = (
        False
    )
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: any field of transformers' TrainingArguments; may be repeated."),
    ] = None
    text_column: TextColumn = "text"
    as_json: AsJson = False
    quiet: Quiet = False

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def shows_progress(self) -> bool:
        return not self.quiet and not self.as_json

    def read(self) -> tuple[list[dict], list[bytes]]:
        """Returns the rows to learn and the texts to measure on, and sets the seed."""
        from transformers import set_seed

        from blt_hf.training.corpus import pack_rows

        learned, kept = _read(self.texts, self.held_out, self.text_column)
        self.arguments()  # refuses settings before the work
        set_seed(self.seed)
        return [{"input_ids": row} for row in pack_rows(learned, self.context)], kept

    def arguments(self, **more):
        """Returns `TrainingArguments`; `more` fields replace those of here, and --set replaces all."""
        from transformers import TrainingArguments

        names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        values = {
            "output_dir": str(self.folder / "trainer"), "max_steps": self.steps, "seed": self.seed,
            "per_device_train_batch_size": self.batch_size, "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine", "warmup_steps": min(2000, self.steps // 10), "weight_decay": 0.1,
            "adam_beta2": 0.95, "max_grad_norm": 1.0, "logging_steps": max(self.steps // 20, 1),
            "save_steps": max(self.steps // 4, 1), "save_total_limit": 2, "report_to": "none", "use_cpu": self.cpu,
            "dataloader_pin_memory": False, "disable_tqdm": not self.shows_progress,
        }  # fmt: skip
        values |= more
        for setting in self.set or ():
            name, equals, value = setting.partition("=")
            if not equals or name not in names:
                why = "NAME=VALUE is needed" if not equals else f"TrainingArguments has no field {name!r}"
                raise ValueError(f"--set {setting}: {why}.")
            values[name] = _parsed(value)
        try:
            return TrainingArguments(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--set: TrainingArguments does not accept this: {error}") from error

    def fit(self, model, rows: list[dict], **more) -> None:
        """Runs `Trainer`, which saves its checkpoints and nothing else."""
        from transformers import Trainer
        from transformers.trainer_callback import PrinterCallback

        from blt_hf.training.data import BltDataCollator

        trainer = Trainer(model, self.arguments(**more), train_dataset=rows, data_collator=BltDataCollator())
        if self.as_json:
            trainer.remove_callback(PrinterCallback)  # stdout is for the result
        trainer.train(resume_from_checkpoint=self.resume or None)

    def save(self, model, tokenizer) -> None:
        for saved in (model, tokenizer):
            saved.save_pretrained(self.folder)

    def finish(self, model, held_out: list[bytes], more: dict) -> None:
        """Measures `model` on the texts that were kept back, and prints the result with `more`."""
        from blt_hf.conversion.files import progress_bar
        from blt_hf.evaluation import measure_bits_per_byte

        with progress_bar(sum(map(len, held_out)), "Scoring", self.shows_progress) as advance:
            measured = measure_bits_per_byte(model.eval(), held_out, max_length=self.context, on_progress=advance)
        result = {"output": self.output, "steps": self.steps, "bits_per_byte": measured.bits_per_byte, **more}
        if measured.bytes_per_patch is not None:
            result["bytes_per_patch"] = measured.bytes_per_patch
        if self.as_json:
            typer.echo(json.dumps(result))
            return
        rows = [(k.replace("_", " "), f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in result.items()]
        print_rows(rows, f"Held out, {measured.num_bytes:,} bytes:")


def _parsed(value: str):
    import yaml

    try:
        found = yaml.safe_load(value)
        return float(value) if isinstance(found, str) else found  # YAML reads 1e-3 as a string
    except (yaml.YAMLError, ValueError):
        return value


def _read(texts: list[str], held_out: list[str] | None, column: str) -> tuple[list[bytes], list[bytes]]:
    """Returns texts to learn and texts to measure on; of one text alone, its end is kept back."""
    from blt_hf.training.data import read_texts

    learned = read_texts(texts, column)
    if held_out:
        return learned, read_texts(held_out, column)
    if len(learned) == 1:
        (text,) = learned
        cut = len(text) - max(len(text) // 20, 1)
        return [text[:cut] or text], [text[cut:]]
    kept = range(0, len(learned), max(min(20, len(learned)), 2))
    return [text for i, text in enumerate(learned) if i not in kept], [learned[i] for i in kept]


def _with_patches(model, rows: list[dict], run: _Run) -> list[dict]:
    """Finds the patches of all rows once, before training, with the frozen entropy model."""
    import torch

    from blt_hf.conversion.files import progress_bar
    from blt_hf.training.data import PrecomputePatches

    find, found = PrecomputePatches(model, device="cuda" if torch.cuda.is_available() and not run.cpu else None), []
    with progress_bar(sum(len(row["input_ids"]) for row in rows), "Patches", run.shows_progress) as advance:
        for row in rows:
            found.append({**row, **find(row)})
            advance(len(row["input_ids"]))
    return found


def _shape(size: str, sizes: dict) -> tuple[int, ...]:
    if size not in sizes:
        raise ValueError(f"--size must be one of {', '.join(sizes)}; got {size!r}.")
    return sizes[size]


@app.command()
@command_with(_Run, 3, output="entropy-model", steps=500, batch_size=16, context=512, learning_rate=4e-3)
def entropy(
    run: _Run,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(ENTROPY_SIZES)}.")] = "small",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Go on with this one instead.")] = None,
    patch_size: Annotated[float, typer.Option(min=1, help="Mean bytes of a patch to calibrate for.")] = 4.5,
) -> None:
    """Train the small byte model that says where patches start, and calibrate its threshold.

    The folder also gets `calibration.json`, which `blt-hf train blt --patcher` reads.

    Examples:

    - `blt-hf train entropy texts/ -o entropy-model --steps 2000`
    - `blt-hf train entropy texts.jsonl --size base --patch-size 6 --set gradient_accumulation_steps=4`
    """
    from blt_hf import BltPatcher, BltPatcherConfig, BltTokenizer
    from blt_hf.training.calibration import calibrate_threshold

    width, layers = _shape(size, ENTROPY_SIZES)
    rows, kept = run.read()
    if model is not None:
        patcher = load_byte_model(model, Dtype.float32, "cpu", ("blt_patcher",))
    else:
        patcher = BltPatcher(
            BltPatcherConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(width // 64, 2),
                intermediate_size=-(-8 * width // 3 // 32) * 32, sliding_window=min(512, run.context),
            )
        )  # fmt: skip
    run.fit(patcher, rows)
    found = calibrate_threshold(patcher.eval(), kept, patch_size)
    run.save(patcher, BltTokenizer())
    (run.folder / "calibration.json").write_text(json.dumps(found.settings, indent=2) + "\n")
    run.finish(patcher, kept, {"threshold": found.threshold, "bytes_per_patch": found.mean_patch_size})


@app.command()
@command_with(_Run, 3, output="my-blt", steps=1000)
def blt(
    run: _Run,
    patcher: Annotated[
        str | None, typer.Option("--patcher", "-p", help="Entropy model; without one, patches follow the spaces.")
    ] = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Go on with this BLT instead.")] = None,
) -> None:
    """Train a BLT, from nothing or further. Its patches are found once, before the first step.

    Examples:

    - `blt-hf train blt texts/ --patcher entropy-model -o my-blt`
    - `blt-hf train blt more-texts/ --model my-blt --learning-rate 5e-4 --resume`
    - `blt-hf train blt --config recipe.yaml --steps 20000`
    """
    from blt_hf import BltTokenizer

    shape = _shape(size, SIZES)
    if model is not None and patcher is not None:
        raise ValueError("--model has an entropy model of its own; leave out --patcher.")
    rows, kept = run.read()
    trained = _new_blt(shape, patcher) if model is None else load_byte_model(model, Dtype.float32, "cpu", ("blt",))
    run.fit(trained, _with_patches(trained, rows, run))
    run.save(trained, BltTokenizer())
    run.finish(trained, kept, {})


def _new_blt(shape: tuple[int, ...], patcher_name: str | None):
    from blt_hf import BltConfig, BltForCausalLM

    width, decoder_layers, global_width, global_layers, hash_rows = shape
    rule, patcher = {"patching_mode": "space"}, None
    if patcher_name is not None:
        patcher = load_byte_model(patcher_name, Dtype.float32, "cpu", ("blt_patcher",))
        calibration = Path(patcher_name, "calibration.json")
        rule = json.loads(calibration.read_text()) if calibration.is_file() else {"patching_mode": "entropy"}
    local = {
        "hidden_size": width, "num_attention_heads": max(width // 64, 2), "intermediate_size": 11 * width // 4,
        "hidden_size_global": global_width,
    }  # fmt: skip
    config = BltConfig(
        **rule,
        patch_in_forward=patcher is not None,
        encoder_hash_byte_group_vocab=hash_rows,
        patcher_config=None if patcher is None else patcher.config.to_dict(),
        encoder_config=local,
        decoder_config={**local, "num_hidden_layers": decoder_layers},
        global_config={
            "hidden_size": global_width, "num_attention_heads": max(global_width // 128, 2),
            "num_hidden_layers": global_layers, "intermediate_size": 11 * global_width // 4,
        },
    )  # fmt: skip
    model = BltForCausalLM(config)
    if patcher is not None:
        model.set_patcher(patcher)
    return model


@app.command()
@command_with(_Run, 3, output="my-adapter", steps=200)
def lora(
    run: _Run,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the BLT to adapt.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter's matrices.")] = 16,
    alpha: Annotated[int | None, typer.Option(help="Scale of the adapter; twice the rank, if not given.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Save a whole model with the adapter merged into it, not the adapter.")
    ] = False,
) -> None:
    """Fine-tune a BLT with LoRA on every linear layer (needs peft: `pip install "blt-hf[train]"`).

    Examples:

    - `blt-hf train lora src/ --model pretrained/blt-5m -o code-adapter`
    - `blt-hf train lora chats.jsonl -m my-blt --rank 32 --merge -o my-blt-chat`
    """
    need_extra("peft", "train")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    rows, kept = run.read()
    base = load_byte_model(model, Dtype.auto, "cpu", ("blt",))
    rows = _with_patches(base, rows, run)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear")
    trained = get_peft_model(base, adapter)
    run.fit(trained, rows, weight_decay=0.0)
    tokenizer = load(AutoTokenizer.from_pretrained, model)
    if not merge:
        run.save(trained, tokenizer)
    whole = trained.merge_and_unload()
    if merge:
        run.save(whole, tokenizer)
    run.finish(whole, kept, {})
