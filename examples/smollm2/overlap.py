"""Finds texts that hold one of the hundred questions, or its answer, so that no training text or prompt does.

    python examples/smollm2/overlap.py texts.jsonl prompts.jsonl             # status 1 if there is one
    python examples/smollm2/overlap.py texts.jsonl --clean clean.jsonl       # and the others are written there

Six words in a row, in small letters and without marks, are enough. A file in .jsonl holds a text in each line, as a
string, in the field `text`, or in the contents of `messages`; another file is one text.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path


QUESTIONS = Path(__file__).with_name("questions.json")
NUM_WORDS = 6
_WORD = re.compile(r"\w+")


def word_runs(text: str, num_words: int = NUM_WORDS) -> Iterator[str]:
    """Yields each run of `num_words` words of `text`, joined by spaces."""
    words = _WORD.findall(text.lower())
    for start in range(len(words) - num_words + 1):
        yield " ".join(words[start : start + num_words])


@cache
def tested_runs() -> frozenset[str]:
    """Returns all runs of six words of the questions and their answers."""
    entries = json.loads(QUESTIONS.read_text())
    return frozenset(run for entry in entries for name in ("question", "answer") for run in word_runs(entry[name]))


def held_runs(text: str) -> list[str]:
    """Returns the runs of six words that `text` shares with a question or its answer."""
    return [run for run in word_runs(text) if run in tested_runs()]


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields each entry of a file as it stands there, and its text."""
    if path.suffix != ".jsonl":
        text = path.read_text(errors="replace")
        yield text, text
        return
    with path.open() as file:
        for line in file:
            entry = json.loads(line)
            if isinstance(entry, dict) and "messages" in entry:
                yield line, "\n".join(str(message["content"]) for message in entry["messages"])
            elif isinstance(entry, dict) and "text" in entry:
                yield line, entry["text"]
            elif isinstance(entry, str):
                yield line, entry
            else:
                raise ValueError(f"{path}: a line must be a string or have `text` or `messages`; got {line[:80]!r}.")


def compare(paths: Iterable[Path]) -> tuple[int, list[dict], list[str]]:
    """Returns the number of texts, those that hold a question (`file`, `entry`, `runs`), and the others as they stand."""
    number, found, clean = 0, [], []
    for path in paths:
        for index, (entry, text) in enumerate(read_texts(path)):
            number += 1
            if runs := held_runs(text):
                found.append({"file": str(path), "entry": index, "runs": sorted(set(runs))})
            else:
                clean.append(entry)
    return number, found, clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--clean", type=Path, help="write the texts that hold no question to this file")
    arguments = parser.parse_args()
    number, found, clean = compare(arguments.files)
    if arguments.clean is not None:
        arguments.clean.write_text("".join(clean))
    for entry in found:
        print(f"{entry['file']}, entry {entry['entry']}: {'; '.join(entry['runs'])}")
    print(json.dumps({"texts": number, "texts_that_hold_a_question": len(found)}))
    sys.exit(1 if found and arguments.clean is None else 0)


if __name__ == "__main__":
    main()
