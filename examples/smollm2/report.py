"""Writes what `measure.py` measured as tables into `card.md`, which becomes the model card of the folder.

python examples/smollm2/report.py
"""

import argparse
import json
import re
from pathlib import Path


FOLDER = Path(__file__).parent
MARKS = "<!-- figures -->", "<!-- end of figures -->"


def questions_table(found: dict) -> list[str]:
    number = found["blt"]["questions"]
    lines = [f"| of {number} questions | BLT | token model |", "|---|---|---|"]
    for name, words in (("right", "answered rightly"), ("stopped", "ended by the model itself")):
        lines.append(f"| {words} | {found['blt'][name]} | {found['teacher'][name]} |")
    for kind, right in found["blt"]["right_by_kind"].items():
        lines.append(f"| right: {kind} | {right} | {found['teacher']['right_by_kind'][kind]} |")
    if "of_the_teachers" in found:
        lines.append(f"| right, of those that the token model answers rightly | {found['of_the_teachers']:.0%} | |")
    return lines


def speed_table(found: dict) -> list[str]:
    lines = ["| | bytes a second | first byte, ms | weights, MB | most memory, MB |", "|---|---|---|---|---|"]
    for name, label in (("blt", "BLT"), ("blt, drafts", "BLT, with drafts"), ("teacher", "token model")):
        row = found[name]
        memory = [f"{row[key]:.0f}" if key in row else "" for key in ("weights_mb", "peak_mb")]
        first = 1000 * row["seconds_to_first_byte"]
        lines.append(f"| {label} | {row['bytes_per_second']:.0f} | {first:.0f} | {memory[0]} | {memory[1]} |")
    return lines


def bits_table(found: dict) -> list[str]:
    lines = ["| bits a byte | bytes | BLT | token model |", "|---|---|---|---|"]
    for kind in ("prose", "code", "chat"):
        row = found[kind]
        lines.append(f"| {kind} | {row['bytes']:,} | {row['blt']:.3f} | {row['teacher']:.3f} |")
    return lines


def noise_table(found: dict) -> list[str]:
    lines = ["| noise before clean text: bits a byte (lost) | BLT | token model |", "|---|---|---|"]
    for kind, row in found["blt"].items():
        other = found["teacher"][kind]
        label = f"{kind}, used in training" if kind in found["in_training"] else kind
        lost = [f" ({side['lost']:+.3f})" if kind != "none" else "" for side in (row, other)]
        lines.append(f"| {label} | {row['bits_per_byte']:.3f}{lost[0]} | {other['bits_per_byte']:.3f}{lost[1]} |")
    return lines


def letters_table(found: dict) -> list[str]:
    lines = [f"| of {found['words']} words | BLT | token model |", "|---|---|---|"]
    for state, label in (("as_it_is", "as it is"), ("fine_tuned", f"fine-tuned on {found['examples']:,} examples")):
        for task in ("spelling", "reversal"):
            shares = [f"{found[name][state][task]['right']:.0%}" for name in ("blt", "teacher")]
            lines.append(f"| {task}, {label} | {shares[0]} | {shares[1]} |")
    return lines


TABLES = {
    "questions": questions_table,
    "speed": speed_table,
    "bits": bits_table,
    "noise": noise_table,
    "letters": letters_table,
}


def make_tables(results: Path) -> str:
    """Returns a table for each part that was measured for both models, and what it was measured with."""
    parts = []
    for name, make in TABLES.items():
        path = results / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if {"blt", "teacher"} <= found.get("prose", found).keys():  # `bits` are by kind of text first
            machine = found["machine"]
            threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
            with_what = f"{machine['processor']}, {threads}, torch {machine['torch']}, {machine['date']}"
            parts.append("\n".join([*make(found), "", f"{with_what}; both models in {machine['dtype']}."]))
    return "\n\n".join(parts) or "Not measured yet."


def put_between(text: str, new: str) -> str:
    """Returns `text` with what is between the two marks replaced."""
    start, end = map(re.escape, MARKS)
    return re.sub(f"({start}\n).*?(\n{end})", lambda found: found[1] + new + found[2], text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--card", type=Path, default=FOLDER / "card.md")
    arguments = parser.parse_args()
    tables = make_tables(arguments.results)
    arguments.card.write_text(put_between(arguments.card.read_text(), tables))
    print(tables)


if __name__ == "__main__":
    main()
