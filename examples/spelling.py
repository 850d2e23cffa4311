"""Teaches a small BLT and a BPE token model of the same size to spell, and counts how often they do on unseen words.

    python examples/spelling.py                            # words of Python's own documentation
    python examples/spelling.py --words text.txt           # words of another text
    python examples/spelling.py --models blt               # one of the two; the other one on another core
    python examples/spelling.py --small --output-dir out   # seconds, with models that learn nothing

Two tasks, as in the CUTE benchmark: `Spell the word: hello ->` is answered with ` h e l l o`, and `Join the letters:
h e l l o ->` with ` hello`. Both models see the same examples in the same order, and the loss counts the
answer alone. The last line printed is JSON; `results-blt-bpe.json` in the output folder also has every wrong answer.
"""

import argparse
import ast
import json
import random
import re
import string
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from blt_hf import BltConfig, BltForCausalLM, BltTokenizer


TASKS = ("spelling", "inverse")
WORD = re.compile(r"(?<![\w'])[a-z]{3,12}(?![\w'])")


def stdlib_texts(docstrings: bool = True) -> Iterator[str]:
    """Prose that every Python carries: the language reference, then the docstrings of the standard library."""
    from pydoc_data.topics import topics

    yield from topics.values()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")) if docstrings else ():
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the library's tests have broken files on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def find_words(texts: list[str]) -> list[str]:
    """The distinct words of 3 to 12 lowercase ASCII letters, sorted."""
    return sorted({word for text in texts for word in WORD.findall(text)})


def split_words(words: list[str], num_held_out: int) -> tuple[list[str], list[str]]:
    """Training words and held-out words, the same ones each time."""
    words = random.Random(0).sample(words, len(words))
    return words[num_held_out:], words[:num_held_out]


def invent_words(count: int, taken: list[str]) -> list[str]:
    """Strings of 3 to 12 random letters, none of them in `taken`: copied letter by letter or not at all.

    Each is drawn from a few letters of its own, so that many repeat: who looks for "what came after this letter"
    loses the place.
    """
    chance, taken, words = random.Random(1), set(taken), []
    for _ in range(count):
        letters = chance.sample(string.ascii_lowercase, chance.randint(2, 26))
        words.append("".join(chance.choices(letters, k=chance.randint(3, 12))))
    return [word for word in words if word not in taken]


def make_example(task: str, word: str) -> tuple[str, str]:
    """Prompt and answer: `"inverse", "cat" -> "Join the letters: c a t ->", " cat"`."""
    letters = " ".join(word)
    if task == "spelling":
        return f"Spell the word: {word} ->", f" {letters}"
    return f"Join the letters: {letters} ->", f" {word}"


def encode(tokenizer, prompt: str, answer: str) -> dict[str, list[int]]:
    """BOS, prompt, answer and EOS as ids; labels begin with the answer."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids}


def train_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts a BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_blt(small: bool) -> BltForCausalLM:
    width, global_width = (32, 64) if small else (128, 128)
    heads = {"num_attention_heads": 2 if small else 4}
    local = {**heads, "hidden_size": width, "intermediate_size": 3 * width, "hidden_size_global": global_width}
    config = BltConfig(
        patching_mode="space",
        patch_in_forward=False,
        encoder_config={**local, "num_hidden_layers": 1},
        decoder_config={**local, "num_hidden_layers": 1 if small else 3},
        global_config={
            **heads,
            "hidden_size": global_width,
            "num_hidden_layers": 1,
            "intermediate_size": 3 * global_width,
        },
        encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_vocab=300 if small else 1000,
        local_attention_window_len=128,
    )
    model = BltForCausalLM(config)
    model.set_attn_implementation("eager")  # the fastest for texts as short as these
    return model


def make_llama(small: bool, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    width = 48 if small else 128
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2 if small else 6,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model, tokenizer, examples: list[tuple[str, str]], steps: int, batch: int, rate: float, folder: Path
) -> None:
    """The order of the examples follows from the seed and their number, which are the same for both models."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    data = [encode(tokenizer, *example) for example in examples]
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.eval()


@torch.no_grad()
def write_answers(model, tokenizer, prompts: list[str], longest: int, batch: int = 250) -> list[str]:
    """What the model writes after each prompt, greedily, until its EOS."""
    answers = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], padding=True, return_tensors="pt", padding_side="left")
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return answers


def measure(model, tokenizer, words: list[str], known: set[str]) -> tuple[dict, list[dict]]:
    """Exact-match accuracy of each task, over all words and over those in `known`; and the wrong answers."""
    accuracies, errors = {}, []
    for task in TASKS:
        prompts, expected = zip(*(make_example(task, word) for word in words))
        longest = max(len(encode(tokenizer, "", answer)["input_ids"]) for answer in expected) + 2
        answers = write_answers(model, tokenizer, list(prompts), longest)
        right = [answer == truth for answer, truth in zip(answers, expected)]
        right_known = [is_right for is_right, word in zip(right, words) if word in known]
        accuracies[task] = sum(right) / len(right)
        accuracies[f"{task}_known_tokens"] = sum(right_known) / len(right_known) if right_known else None
        errors += [
            {"task": task, "word": word, "answer": answer.strip()}
            for word, answer, is_right in zip(words, answers, right)
            if not is_right
        ]
    return accuracies, errors


def words_of_known_tokens(tokenizer, train_words: list[str], held_out: list[str]) -> set[str]:
    """The held-out words each of whose tokens occurs in a training word."""

    def tokens(word: str) -> set[int]:
        return set(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])

    seen = set().union(*map(tokens, train_words))
    return {word for word in held_out if tokens(word) <= seen}


def show(report: dict, errors: dict[str, list[dict]]) -> None:
    table = Table(box=None)
    for heading in ("", "parameters", "spelling", "inverse", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, result in report["models"].items():
        accuracies = (f"{result[task]:.1%}" for task in TASKS)
        table.add_row(name, f"{result['parameters']:,}", *accuracies, f"{result['seconds']:.0f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{report['held_out_words']} held-out words, exact answers:")
    console.print(table)
    for name, wrong in errors.items():
        for task in TASKS:
            for error in [error for error in wrong if error["task"] == task][:3]:
                console.print(f"{name}, {task}: {error['word']} -> {error['answer']}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=Path, help="UTF-8 text or list; its words are used, and BPE learns from it")
    parser.add_argument("--models", nargs="+", choices=("blt", "bpe"), default=["blt", "bpe"], help="default: both")
    parser.add_argument("--steps", type=int, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=1000, help="words kept from training; half at most")
    parser.add_argument("--invented", type=int, default=40_000, help="words of random letters that are trained on too")
    parser.add_argument("--vocabulary", type=int, default=4000, help="tokens of the BPE tokenizer")
    parser.add_argument("--output-dir", type=Path, default=Path("spelling-output"))
    parser.add_argument("--small", action="store_true", help="tiny models and a few steps: seconds, and no sense")
    arguments = parser.parse_args()
    small = arguments.small
    steps = arguments.steps or (4 if small else 10_000)

    texts = [arguments.words.read_text()] if arguments.words else list(stdlib_texts(docstrings=not small))
    words = find_words(texts)
    train_words, held_out = split_words(words, min(40 if small else arguments.held_out, len(words) // 2))
    train_words += invent_words(arguments.invented, held_out)
    examples = [make_example(task, word) for word in train_words for task in TASKS]
    bpe = train_bpe(texts, 512 if small else arguments.vocabulary)
    known = words_of_known_tokens(bpe, train_words, held_out)
    report = {
        "words": len(words),
        "held_out_words": len(held_out),
        "held_out_words_of_known_tokens": len(known),
        "tokens_per_word": sum(len(bpe(f" {word}")["input_ids"]) - 1 for word in words) / len(words),
        "steps": steps,
        "examples": steps * arguments.batch,
        "models": {},
    }
    errors = {}
    for name in arguments.models:
        set_seed(0)
        tokenizer = BltTokenizer() if name == "blt" else bpe
        model = make_blt(small) if name == "blt" else make_llama(small, bpe)
        started = time.monotonic()
        folder = arguments.output_dir / name
        train(model, tokenizer, examples, steps, arguments.batch, arguments.learning_rate, folder)
        seconds = time.monotonic() - started
        accuracies, errors[name] = measure(model, tokenizer, held_out, known)
        report["models"][name] = {"parameters": model.num_parameters(), "seconds": round(seconds, 1), **accuracies}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    show(report, errors)
    (arguments.output_dir / f"results-{'-'.join(arguments.models)}.json").write_text(
        json.dumps({**report, "errors": errors}, indent=1) + "\n"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
