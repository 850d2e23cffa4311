"""Builds the corpus of the small pretrained BLT from texts that Debian ships, all under licences that allow it.

    python examples/pretrain_small/corpus.py corpus      # needs apt-get and dpkg-deb; about 60 MB of downloads

Writes `corpus/train.jsonl` and `corpus/heldout.jsonl`, a document a line with its `source` and `text`, and prints what
each source gave. A page of the handbook is held out in all its languages or in none.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path


PACKAGES = {  # Debian package: licence of what is taken from it
    "debian-handbook": "CC-BY-SA 3.0 or GPL 2+, Raphaël Hertzog, Roland Mas and translators",
    "python3.11-doc": "PSF licence",
    "libpython3.11-stdlib": "PSF licence",
    "wordnet-base": "WordNet licence, Princeton University",
    "dict-jargon": "public domain, the Jargon File",
    "dict-devil": "public domain, The Devil's Dictionary by Ambrose Bierce",
}
LANGUAGES = ["en-US", "de-DE", "fr-FR", "es-ES", "pt-BR", "ru-RU", "ja-JP", "zh-CN", "ar-MA"]
HELD_OUT_SHARE = 40  # one document in so many


def fetch(folder: Path) -> None:
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)


class Paragraphs(HTMLParser):
    """Text of the paragraphs, headings, items and listings of a page, without its navigation."""

    BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "pre", "td", "div"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._parts: list[str] = []
        self._hidden = 0  # depth of tags inside something that is not text
        self._listing = False

    def handle_starttag(self, tag, attributes):
        kind = dict(attributes).get("class") or ""
        if self._hidden or tag in ("head", "script") or "docnav" in kind or kind == "toc":
            self._hidden += tag not in ("br", "img", "link", "meta", "hr", "input")
        elif tag in self.BLOCKS:
            self._close()
            self._listing = tag == "pre"

    def handle_endtag(self, tag):
        if self._hidden:
            self._hidden -= 1
        elif tag in self.BLOCKS:
            self._close()

    def handle_data(self, data):
        if not self._hidden:
            self._parts.append(data)

    def _close(self):
        text = "".join(self._parts)
        text = text.strip("\n") if self._listing else " ".join(text.split())
        if text.strip() and [text] != self.found[-1:]:  # a page's title stands on it twice
            self.found.append(text)
        self._parts, self._listing = [], False


def read_handbook(root: Path) -> Iterator[tuple[str, str, str]]:
    pages = root / "usr/share/doc/debian-handbook/html"
    english: set[str] = set()  # what a translation left in English is not repeated
    for language in LANGUAGES:
        for page in sorted((pages / language).glob("*.html")):
            parser = Paragraphs()
            parser.feed(page.read_text(errors="replace"))
            kept = parser.found if language == "en-US" else [p for p in parser.found if p not in english]
            english.update(parser.found if language == "en-US" else ())
            yield f"handbook, {language[:2]}", page.name, "\n\n".join(kept)


def read_python_docs(root: Path) -> Iterator[tuple[str, str, str]]:
    for page in sorted(root.rglob("*.rst.txt")):
        yield "Python's documentation", page.name, page.read_text()


def read_python_code(root: Path) -> Iterator[tuple[str, str, str]]:
    for file in sorted((root / "usr/lib/python3.11").rglob("*.py")):
        if file.is_file() and not {"test", "tests", "encodings", "pydoc_data", "idle_test"} & set(file.parts):
            yield "Python code", file.name, file.read_text(errors="replace")


def read_dictionaries(root: Path) -> Iterator[tuple[str, str, str]]:
    for name, source in (("jargon", "Jargon File"), ("devil", "Devil's Dictionary")):
        text = gzip.decompress((root / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode(errors="replace")
        entries = re.split(r"\n(?=\S)", text)
        for start in range(0, len(entries), 20):
            yield source, f"{name}-{start}", "\n".join(entries[start : start + 20])


def read_wordnet(root: Path) -> Iterator[tuple[str, str, str]]:
    for part in ("noun", "verb", "adj", "adv"):
        entries = []
        for line in (root / f"usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith(" ") or "|" not in line:
                continue  # the licence text
            facts, gloss = line.split("|", 1)
            fields = facts.split()
            words = [fields[4 + 2 * index].replace("_", " ") for index in range(int(fields[3], 16))]
            entries.append(f"{', '.join(words)} ({part}): {gloss.strip()}")
        entries = entries[:: 3 if part == "noun" else 1]
        for start in range(0, len(entries), 100):
            yield "WordNet", f"{part}-{start}", "\n".join(entries[start : start + 100])


READERS = [read_handbook, read_python_docs, read_python_code, read_dictionaries, read_wordnet]


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the two files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict]] = {"train": [], "heldout": []}
    sizes: dict[str, Counter] = {part: Counter() for part in parts}
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        for read in READERS:
            for source, name, text in read(Path(folder) / "root"):
                if len(text) < 200:
                    continue
                part = "heldout" if is_held_out(name) else "train"
                parts[part].append({"source": source, "text": text})
                sizes[part][source] += len(text.encode())
    for part, documents in parts.items():
        random.Random(0).shuffle(documents)
        with (arguments.output / f"{part}.jsonl").open("w") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    for source, size in sizes["train"].items():
        print(f"{source:24s} {size / 1e6:7.2f} MB to train, {sizes['heldout'][source] / 1e3:7.1f} kB held out")


if __name__ == "__main__":
    main()
