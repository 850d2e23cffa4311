"""Load the small BLT that comes with this project, let it write, look at its patches, fine-tune it with LoRA, compare.

Takes about a minute and a half on two cores and downloads nothing: what it learns is this project's own code.

    python examples/quickstart.py [--steps N] [--output-dir DIR] [--small]
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.data import BltDataCollator, PrecomputePatches, byte_ids


ROOT = Path(__file__).parent.parent
PRETRAINED = ROOT / "pretrained" / "blt-5m"
PROMPTS = ["The import statement ", "dog (noun): ", "Das Paket "]
SENTENCES = [
    "A function call always returns some value, possibly None.",
    "for name in sorted(os.listdir(path)): print(name)",
    "Die Installation des Pakets ist einfach.",
    "El paquete se instala con una sola orden.",
]
HELD_OUT = ("src/blt_hf/model/stacks_blt.py", "src/blt_hf/training/calibration.py")
CODE_PROMPT = "    def forward(self, "
BLOCK = 512

console = Console(highlight=False)


def write(model, tokenizer, prompt: str, num_bytes: int, streamer: TextStreamer | None = None) -> str:
    """Samples a continuation of the prompt, the same one each time."""
    set_seed(0)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    result = generator(prompt, max_new_tokens=num_bytes, do_sample=True, temperature=0.5, min_p=0.1, streamer=streamer)
    return result[0]["generated_text"]


@torch.no_grad()
def cut_into_patches(model, tokenizer, text: str) -> list[str]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    lengths = model(ids, output_patches=True).patch_lengths[0].tolist()
    lengths[-1] -= 1  # the last patch counts the next byte, which is not there yet
    pieces = [tokenizer.decode(piece, skip_special_tokens=True) for piece in ids[0].split(lengths)]
    return [piece for piece in pieces if piece]


def show_patches(patches: list[str]) -> None:
    line = Text("  ")
    for index, patch in enumerate(patches):
        line.append("|" if index else "")
        line.append(patch, style=("black on bright_yellow", "black on bright_cyan")[index % 2])
    console.print(line)


def load_code() -> tuple[list[str], list[str]]:
    """This project's code: files to learn from, and files held out."""
    files = sorted((ROOT / "src" / "blt_hf").rglob("*.py"))
    held_out = [ROOT / name for name in HELD_OUT]
    return [file.read_text() for file in files if file not in held_out], [file.read_text() for file in held_out]


def make_rows(model, texts: list[str]) -> list[dict]:
    """Rows of BOS and bytes with their patches, which the frozen entropy model finds once."""
    ids = [byte for text in texts for byte in byte_ids(text)]
    rows = [{"input_ids": [1, *ids[start : start + BLOCK - 1]]} for start in range(0, len(ids), BLOCK - 1)]
    find_patches = PrecomputePatches(model)
    return [{**row, **find_patches(row)} for row in rows]


def fine_tune(model, rows: list[dict], steps: int, output_dir: Path):
    """LoRA on every linear layer; the adapter is merged at the end."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear"))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=BltDataCollator()).train()
    return model.merge_and_unload().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--small", action="store_true", help="a few steps and short texts")
    args = parser.parse_args()
    num_bytes = 40 if args.small else 200
    started = time.monotonic()

    console.rule("1. Generate at once")
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED)
    weights = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{weights / 1e6:.1f} million weights, one token for each byte.")
    for prompt in PROMPTS:
        write(model, tokenizer, prompt, num_bytes, TextStreamer(tokenizer, skip_special_tokens=True))

    console.rule("2. Patches: the global transformer runs once for each")
    for sentence in SENTENCES:
        show_patches(cut_into_patches(model, tokenizer, sentence))

    console.rule("3. Fine-tune with LoRA, on this project's own code")
    learned, held_out = load_code()
    if args.small:
        learned, held_out = [learned[0][:8000]], [held_out[0][:2000]]
    before = measure_bits_per_byte(model, held_out, max_length=BLOCK)
    text_before = write(model, tokenizer, CODE_PROMPT, num_bytes)
    rows = make_rows(model, learned)
    model = fine_tune(model, rows, args.steps or (2 if args.small else 100), args.output_dir)

    console.rule("4. Compare")
    after = measure_bits_per_byte(model, held_out, max_length=BLOCK)
    console.print(f"Held-out files: {before.bits_per_byte:.2f} bits per byte before, {after.bits_per_byte:.2f} after.")
    text_after = write(model, tokenizer, CODE_PROMPT, num_bytes)
    for name, text in (("before", text_before), ("after", text_after)):
        console.print(f"[bold]{name}[/bold]")
        console.print(text, markup=False)

    console.rule("5. Saved and loaded again")
    folder = args.output_dir / "blt"
    model.save_pretrained(folder)
    model.model.patcher.save_pretrained(args.output_dir / "entropy-model")
    for name in ("blt", "entropy-model"):
        tokenizer.save_pretrained(args.output_dir / name)
    loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if write(*loaded, CODE_PROMPT, num_bytes) != text_after:
        raise SystemExit("The loaded model wrote something else.")
    console.print(f"{folder} writes the same text. {time.monotonic() - started:.0f} seconds in all.")


if __name__ == "__main__":
    main()
