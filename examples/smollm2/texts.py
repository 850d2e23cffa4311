"""Makes the texts and the prompts that `blt-smollm2-135m` learns from; none holds a question that it is asked.

    python examples/pretrain_small/corpus.py corpus
    python examples/smollm2/texts.py corpus texts.jsonl prompts.txt

`texts.jsonl` has pieces of English from the corpus's training part, in an order that mixes the sources. `prompts.txt` has
short questions in the manner of those of `questions.json`, about words of WordNet and other things, for `blt-hf byteify
write --chat`. A text or prompt that shares six words in a row with a question or its answer is left out.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

from overlap import held_runs


MEGABYTES = {  # of each source
    "WordNet": 4.0, "Jargon File": 1.2, "Devil's Dictionary": 0.4, "handbook, en": 1.5, "Python's documentation": 1.5,
    "Python code": 0.4,
}  # fmt: skip
PIECE = 6000  # bytes
ENTRY = re.compile(r"(.*?) \((noun|verb|adj)\):")
TEMPLATES = {
    "noun": [
        "What is a {}?", "What is {}?", "Write one sentence about {}.", "Tell me something about {}.",
        "What is a {} used for?", "Describe a {} in one sentence.", "What does the word {} mean?",
        "Name three kinds of {}.", "Where do you find a {}?", "Why is {} important?",
    ],
    "verb": [
        "What does it mean to {}?", "Use the word {} in a sentence.", "How do you {}?", "What is another word for {}?",
    ],
    "adj": [
        "What does {} mean?", "What is the opposite of {}?", "Use the word {} in a sentence.",
        "Name something that is {}.", "Give me a synonym of {}.",
    ],
}  # fmt: skip
NAME_TEMPLATES = [
    "What is {}?", "Where is {}?", "Who was {}?", "Tell me one thing about {}.", "What is {} known for?",
    "Write one sentence about {}.",
]  # fmt: skip
COUNTS = {"noun": 900, "verb": 300, "adj": 350}
MORE_COUNTS = {"noun": 600, "verb": 100, "adj": 200, "name": 900}  # of the prompts that the third sitting added
SUMS = [
    "What is {} plus {}?",
    "What is {} times {}?",
    "What is {} minus {}?",
    "Add {} and {}.",
    "How much is {} plus {}?",
]


def _split(words: str, separator: str = " ") -> list[str]:
    return words.split(separator)


COUNTRIES = _split(
    "Australia Canada Mexico Brazil Argentina Chile Peru Colombia Cuba Austria Belgium Bulgaria Croatia Denmark "
    "Estonia Hungary Iceland Latvia Lithuania Malta Netherlands Romania Serbia Slovakia Switzerland Ukraine India "
    "Pakistan Nepal Iran Iraq Israel Jordan Lebanon Thailand Vietnam Indonesia Malaysia Mongolia Kenya Nigeria "
    "Ghana Ethiopia Morocco Algeria Tunisia Libya Sudan Angola Zambia Texas California"
)
ANIMALS = _split(
    "dog cat horse cow sheep goat pig chicken duck goose rabbit mouse rat bear wolf fox lion tiger elephant giraffe "
    "zebra monkey snake frog turtle shark whale dolphin eagle owl bee ant spider butterfly"
)
BOOKS = _split(
    "Hamlet;Moby Dick;War and Peace;Don Quixote;The Odyssey;Faust;Frankenstein;Dracula;Oliver "
    "Twist;Emma;Ulysses;The Hobbit;Treasure Island;Robinson Crusoe;The Divine Comedy;Les Miserables;Great "
    "Expectations;Jane Eyre",
    ";",
)
THINGS = _split(
    "sun moon earth water ice fire air gold iron blood heart brain tree leaf flower bread milk sugar salt egg book "
    "school teacher doctor king queen river ocean mountain winter summer Monday January red blue green square "
    "triangle clock car train ship"
)
GREETINGS = [
    "Hello!", "Who are you?", "How are you?", "Thank you!", "What can you do?", "Tell me a joke.",
    "Tell me a short story.", "Good morning!", "What is your name?", "Write a short poem.",
]  # fmt: skip


def make_texts(documents: list[dict], chance: random.Random) -> list[dict]:
    """Pieces of the documents, up to the share of each source."""
    pieces, sizes = [], Counter()
    for document in documents:
        source, text = document["source"], document["text"]
        if sizes[source] >= MEGABYTES.get(source, 0) * 1e6:
            continue
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            piece = piece[piece.find(" ") + 1 :] if start else piece
            sizes[source] += len(piece.encode())
            pieces.append({"source": source, "text": piece})
    chance.shuffle(pieces)
    return [piece for piece in pieces if not held_runs(piece["text"])]


def common_words(documents: list[dict]) -> dict[str, list[str]]:
    """Words of WordNet that the English texts use most, by part of speech."""
    counts, found = Counter(), {part: Counter() for part in TEMPLATES}
    for document in documents:
        if document["source"] in ("WordNet", "handbook, en", "Devil's Dictionary", "Jargon File"):
            counts.update(re.findall(r"[a-z]{3,12}", document["text"]))
    for document in documents:
        for line in document["text"].split("\n") if document["source"] == "WordNet" else ():
            if match := ENTRY.match(line):
                words = (word for word in match[1].split(", ") if re.fullmatch(r"[a-z]{3,12}", word))
                found[match[2]].update({word: counts[word] for word in words})
    return {part: [word for word, count in words.most_common(2500) if count >= 6] for part, words in found.items()}


def names(documents: list[dict]) -> list[str]:
    """Names of WordNet in one or two words, the first of each entry, that the texts use three times or more."""
    counts, found = Counter(), {}
    for document in documents:
        if document["source"] in MEGABYTES:
            counts.update(re.findall(r"(?=\b([A-Z][a-z]+(?: [A-Z][a-z]+)?)\b)", document["text"]))
    for document in documents:
        for line in document["text"].split("\n") if document["source"] == "WordNet" else ():
            if match := re.match(r"([A-Z][a-z]+(?: [A-Z][a-z]+)?)[,\w .'-]* \(noun\):", line):
                found[match[1]] = None
    return [name for name in found if counts[name] >= 3]


def more_prompts(words: dict[str, list[str]], known: list[str], chance: random.Random) -> list[str]:
    """Prompts about other words, and about names."""
    templates = {**TEMPLATES, "name": NAME_TEMPLATES}
    words = {**words, "name": known}
    prompts = [
        chance.choice(templates[part]).format(chance.choice(words[part]))
        for part, count in MORE_COUNTS.items()
        for _ in range(count if words[part] else 0)
    ]
    chance.shuffle(prompts)
    return untested(prompts)


def untested(prompts: list[str]) -> list[str]:
    asked = {entry["question"].lower() for entry in json.loads((Path(__file__).parent / "questions.json").read_text())}
    return [prompt for prompt in prompts if prompt.lower() not in asked and not held_runs(prompt)]


def make_prompts(words: dict[str, list[str]], chance: random.Random) -> list[str]:
    prompts = [
        chance.choice(TEMPLATES[part]).format(chance.choice(words[part]))
        for part in COUNTS
        for _ in range(COUNTS[part])
    ]
    for name in COUNTRIES:
        prompts += [
            f"What is the capital of {name}?",
            f"Where is {name}?",
            f"What language do people speak in {name}?",
        ]
    for _ in range(150):
        low, high = sorted(chance.randint(0, 9) for _ in range(2))
        prompts.append(chance.choice(SUMS).format(high, low))
    for name in ANIMALS:
        prompts += [
            f"What sound does a {name} make?",
            f"What does a {name} eat?",
            f"How many legs does a {name} have?",
        ]
        prompts.append(f"What is a baby {name} called?")
    for name in BOOKS:
        prompts += [f"Who wrote {name}?", f"What is {name} about?"]
    for name in THINGS:
        prompts += [f"What color is {name}?", f"What is {name} made of?"]
        prompts.append(f"What is the difference between {name} and {chance.choice(THINGS)}?")
    prompts = [*dict.fromkeys(prompts + GREETINGS)]
    chance.shuffle(prompts)
    return untested(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that examples/pretrain_small/corpus.py wrote")
    parser.add_argument("texts", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    documents = [json.loads(line) for line in (arguments.corpus / "train.jsonl").open()]
    chance = random.Random(arguments.seed)
    texts = make_texts(documents, chance)
    arguments.texts.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))
    words = common_words(documents)
    prompts = make_prompts(words, chance)
    prompts = [*dict.fromkeys(prompts + more_prompts(words, names(documents), chance))]
    arguments.prompts.write_text("\n".join(prompts) + "\n")
    print(f"{sum(len(text['text'].encode()) for text in texts):,} bytes of text, {len(prompts):,} prompts")


if __name__ == "__main__":
    main()
