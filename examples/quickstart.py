"""Train a small Byte Latent Transformer from nothing, look at its patches, let it write, save it, load it again.

Takes about two minutes on two idle cores and downloads nothing: the text is the language reference that comes with
every Python.

    python examples/quickstart.py [--steps N] [--output-dir DIR] [--small]
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
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

from blt_hf import BltConfig, BltForCausalLM, BltPatcher, BltPatcherConfig, BltTokenizer


BYTES_PER_PATCH = 4.5
PROMPT = "The import statement "
SENTENCE = "A function call always returns some value, possibly None."

console = Console(highlight=False)


def load_text() -> tuple[str, str]:
    """Training and held-out text. Whole topics are held out, and paragraphs that occur twice are taken once."""
    train, held_out, seen = [], [], set()
    for index, name in enumerate(sorted(topics)):
        paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        (held_out if index % 10 == 5 else train).extend(paragraphs)
    return "\n\n".join(train), "\n\n".join(held_out)


def make_blocks(tokenizer: BltTokenizer, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """Rows of `length` ids, BOS and bytes, as `Trainer` takes them."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    bos = torch.tensor([tokenizer.bos_token_id])
    rows = [torch.cat([bos, row]) for row in ids.split(length - 1) if len(row) == length - 1]
    return [{"input_ids": row, "labels": row} for row in rows]


def make_patcher(small: bool) -> BltPatcher:
    width = 32 if small else 96
    return BltPatcher(
        BltPatcherConfig(
            hidden_size=width,
            num_hidden_layers=1 if small else 2,
            num_attention_heads=4,
            intermediate_size=3 * width,
            sliding_window=64,
        )
    )


def make_model(small: bool, patcher: BltPatcher, threshold: float) -> BltForCausalLM:
    width, global_width = (32, 64) if small else (96, 256)
    local = {
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 3 * width,
        "hidden_size_global": global_width,
    }
    config = BltConfig(
        patcher_config=patcher.config,
        encoder_config={**local, "num_hidden_layers": 1},
        decoder_config={**local, "num_hidden_layers": 1 if small else 2},
        global_config={
            "hidden_size": global_width,
            "num_hidden_layers": 1 if small else 3,
            "num_attention_heads": 4,
            "intermediate_size": 3 * global_width,
        },
        encoder_hash_byte_group_vocab=500 if small else 3000,
        local_attention_window_len=128,
        patching_threshold=threshold,
    )
    model = BltForCausalLM(config)
    model.set_patcher(patcher)
    return model


def train(model, blocks: list, steps: int, learning_rate: float, output_dir: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=blocks).train()
    model.eval()


@torch.no_grad()
def evaluate(model, blocks: list) -> tuple[float, list]:
    """Bits per byte, and all that the model gave for each batch."""
    rows = torch.stack([block["input_ids"] for block in blocks])
    outputs = [model(batch, labels=batch, output_patches=True) for batch in rows.split(16)]
    nats = sum(output.loss * len(output.logits) for output in outputs) / len(rows)
    return float(nats) / math.log(2), outputs


@torch.no_grad()
def cut_into_patches(model, tokenizer: BltTokenizer, text: str) -> list[str]:
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


def write(model, tokenizer: BltTokenizer, num_bytes: int, streamer: TextStreamer | None = None) -> str:
    """Samples a continuation of the prompt, the same one each time."""
    set_seed(0)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    result = generator(PROMPT, max_new_tokens=num_bytes, do_sample=True, temperature=0.5, min_p=0.1, streamer=streamer)
    return result[0]["generated_text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps of each of the two models")
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--small", action="store_true", help="tiny models and a few steps: seconds, and no sense")
    args = parser.parse_args()
    steps = args.steps or (4 if args.small else 400)
    num_bytes = 40 if args.small else 400
    started = time.monotonic()
    set_seed(0)

    console.rule("1. Text")
    tokenizer = BltTokenizer()
    train_text, held_out_text = load_text()
    blocks, held_out = (make_blocks(tokenizer, text, 256) for text in (train_text, held_out_text))
    held_out = held_out[:8] if args.small else held_out
    sizes = [f"{len(text.encode()) / 1000:.0f} kB" for text in (train_text, held_out_text)]
    console.print(f"{sizes[0]} of English to learn from, {sizes[1]} held out; each byte is a token.")

    console.rule("2. Entropy model: a small byte LM that says where the text is hard to guess")
    patcher = make_patcher(args.small)
    train(patcher, blocks, steps, 6e-3, args.output_dir)
    bits, outputs = evaluate(patcher, held_out)
    entropies = torch.cat([output.entropies for output in outputs])
    threshold = float(entropies.quantile(1 - 1 / BYTES_PER_PATCH))
    console.print(f"Held-out text: {bits:.2f} bits per byte.")
    console.print(f"One byte in {BYTES_PER_PATCH} is harder to guess than {threshold:.2f} nats; patches start there.")

    console.rule("3. Patches")
    model = make_model(args.small, patcher, threshold)
    patches = cut_into_patches(model, tokenizer, SENTENCE)
    show_patches(patches)
    console.print(f"{len(SENTENCE.encode())} bytes in {len(patches)} patches.")

    console.rule("4. Byte Latent Transformer")
    num_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_hashed = model.model.encoder_hash_tok_embedding.weight.numel()
    console.print(
        f"{num_weights / 1e6:.1f} million weights to train, {num_hashed / 1e6:.1f} million of them hash embeddings."
    )
    train(model, blocks, steps, 4e-3, args.output_dir)
    bits, outputs = evaluate(model, held_out)
    num_patches = sum(int((output.patch_lengths > 0).sum()) for output in outputs)
    bytes_per_patch = sum(len(block["input_ids"]) for block in held_out) / num_patches
    console.print(f"Held-out text: {bits:.2f} bits per byte, {bytes_per_patch:.2f} bytes a patch.")

    console.rule("5. Generation, streamed")
    text = write(model, tokenizer, num_bytes, TextStreamer(tokenizer, skip_special_tokens=True))

    console.rule("6. Saved and loaded again")
    folder = args.output_dir / "blt"
    model.save_pretrained(folder)
    patcher.save_pretrained(args.output_dir / "entropy-model")
    for name in ("blt", "entropy-model"):
        tokenizer.save_pretrained(args.output_dir / name)
    again = write(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), num_bytes)
    if again != text:
        raise SystemExit(f"The loaded model wrote something else: {again!r}")
    console.print(f"{folder} writes the same text. {time.monotonic() - started:.0f} seconds in all.")


if __name__ == "__main__":
    main()
