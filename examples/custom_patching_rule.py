"""A patching rule of your own: patches that end with a word, and inside a word where the next byte is hard to guess.

Takes about 2 minutes on two cores.

    python examples/custom_patching_rule.py                        # the bundled model learns to live with the rule
    python examples/custom_patching_rule.py --model my-blt --steps 200

A rule is a function of the last bytes and entropies. The configuration holds its name; whoever loads the saved model
runs the code that registers it first. The model learned with other patches, so it is measured under the new rule before
and after it has trained with it.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import blt_hf
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.data import BltDataCollator, byte_ids


SPACE = ord(" ") + 4  # byte b has id b + 4


@blt_hf.register_patching_rule("words-and-surprises", window=2)
def words_and_surprises(ids, entropies, positions, rule):
    """Whether each byte is the last of its patch.

    `ids` and `entropies` are `(rows, bytes, window)`: `[..., -1]` is the byte itself, `[..., -2]` the one before it.
    """
    ends_word = (ids[..., -1] == SPACE) & (ids[..., -2] != SPACE)  # a run of spaces opens the next patch
    is_hard_to_guess = entropies[..., -1] > rule.threshold
    return ends_word | is_hard_to_guess


def try_to_cheat() -> None:
    """A rule may not look ahead: the patches of a text would change while it is written."""

    def before_a_space(ids, entropies, positions, rule):
        return ids[..., -1].roll(-1, dims=1) == SPACE

    try:
        blt_hf.register_patching_rule("before-a-space", before_a_space)
    except ValueError as error:
        print(f"Refused: {error}\n")


@torch.no_grad()
def show_patches(model, tokenizer, text: str) -> None:
    ids = tokenizer(text, return_tensors="pt").input_ids
    lengths = model(ids, output_patches=True).patch_lengths[0].tolist()
    lengths[-1] -= 1  # the last patch counts the next, not yet known byte
    print("|".join(tokenizer.decode(patch) for patch in ids[0].split(lengths)))


def train(model, texts: list[str], steps: int, context: int, output_dir: Path) -> None:
    rows = [byte_ids(text) for text in texts]
    rows = [[1, *row[first : first + context - 1]] for row in rows for first in range(0, len(row), context - 1)]
    arguments = TrainingArguments(
        str(output_dir / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        warmup_steps=steps // 10,
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
    )
    dataset = [{"input_ids": row} for row in rows]
    Trainer(model, arguments, train_dataset=dataset, data_collator=BltDataCollator()).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/blt-5m", help="folder of a BLT with an entropy model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=512, help="bytes of a row in training")
    parser.add_argument("--output-dir", type=Path, default=Path("blt-with-own-rule"))
    options = parser.parse_args()
    torch.manual_seed(0)
    try_to_cheat()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    learned, held_out = list(topics.values())[:-4], list(topics.values())[-4:]
    sample = "A function call always returns some value."

    def report(what: str) -> None:
        found = measure_bits_per_byte(model, [text[:2000] for text in held_out], max_length=options.context)
        print(f"{what}: {found.bits_per_byte:.3f} bits per byte, {found.bytes_per_patch:.2f} bytes a patch")
        show_patches(model, tokenizer, sample)

    report("Its own rule")
    model.config.patching_mode = "words-and-surprises"
    model.config.validate_patching()
    report("The new rule, before training")
    train(model, learned, options.steps, options.context, options.output_dir)
    report("The new rule, after training")

    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    model = AutoModelForCausalLM.from_pretrained(options.output_dir)  # the name in its configuration finds the rule
    prompt = tokenizer("The import statement ", return_tensors="pt")
    cached, uncached = (model.generate(**prompt, max_new_tokens=40, use_cache=cache) for cache in (True, False))
    print(tokenizer.decode(cached[0], skip_special_tokens=True))
    print("With and without a cache the same:", torch.equal(cached, uncached))


if __name__ == "__main__":
    main()
