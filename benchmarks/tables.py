"""Writes the tables of `docs/performance.md` from the JSON lines in `benchmarks/results`: the page holds no other figures.

python benchmarks/tables.py                         # after a benchmark has written its line there
python benchmarks/tables.py --check                 # fails if the page says something else

A table stands between `<!-- name -->` and `<!-- end -->`, and under it the commands and commits that it comes from.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__.replace("_", " ")] = function
    return function


def read(name: str) -> dict:
    """A result; of a file with several lines the last, which may hold the others."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text().splitlines()
    return json.loads(lines[-1])


def find(rows: list[dict], /, **fields) -> dict:
    """The row with these values; empty if there is none."""
    return next((row for row in rows if all(row.get(name) == value for name, value in fields.items())), {})


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """So many significant digits; nothing for None."""
    if value is None:
        return ""
    rounded = float(f"{value:.{digits}g}")
    return (f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")) + unit


def markdown(header: list[str], rows: list[list[str]], results: list[str]) -> str:
    """A table, and where its figures come from."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(source(name) for name in results)]
    return "\n".join(lines)


def source(name: str) -> str:
    result = read(name)
    found = result["environment"]
    return f"- `{name}.json`: `{found['command']}`, commit {result.get('blt_hf', found['commit'])}"


@table
def decoding() -> str:
    rows = read("decode")["rows"]
    contexts = sorted({row["context"] for row in rows if "blt_hf is faster by" in row})
    names = {
        "blt_hf": "this package",
        "llama": "Llama",
        "in-tree": "in-tree class, which has no working cache",
        "no cache (ours)": "this package without a cache",
    }
    times = {name: [find(rows, context=c, batch=1, name=name).get("ms_per_unit") for c in contexts] for name in names}
    lines = [[label, *(number(ms) for ms in times[name])] for name, label in names.items()]
    for name, label, is_ours_above in (
        ("llama", "**times the Llama**", True),
        ("in-tree", "**times as fast as the in-tree class**", False),
    ):
        ratios = [a / b if is_ours_above else b / a for a, b in zip(times["blt_hf"], times[name])]
        lines.append([label, *(f"**{number(ratio, 3 if is_ours_above else 2)}**" for ratio in ratios)])
    return markdown(["ms a byte", *(f"after {c:,} bytes" for c in contexts)], lines, ["decode"])


@table
def other_ways() -> str:
    lines = []
    for label, result, name in (
        ('compiled (`cache_implementation="static"`)', "decode_compiled", "blt_hf, compiled"),
        ("as it is, in the same run", "decode_compiled", "blt_hf"),
        ("beside a process that keeps a core busy", "decode_busy", "blt_hf"),
    ):
        rows = read(result)["rows"]
        ours, llama = find(rows, name=name), find(rows, name="llama")
        spread = f"{ours['spread']:.0%}, {llama['spread']:.0%}"
        ratio = number(ours["ms_per_unit"] / llama["ms_per_unit"], 3)
        lines.append([label, number(ours["ms_per_unit"]), number(llama["ms_per_unit"]), ratio, spread])
    header = ["after 512 bytes", "ms a byte", "Llama", "times", "runs differ by (ours, Llama)"]
    return markdown(header, lines, ["decode_compiled", "decode_busy"])


@table
def rows_at_once() -> str:
    rows = [row for row in read("decode")["rows"] if "blt_hf is faster by" not in row]
    one = find(rows, batch=1, name="blt_hf")
    lines = [
        [str(r["batch"]), number(r["units_per_s"], 3), number(r["units_per_s"] / one["units_per_s"], 2)] for r in rows
    ]
    return markdown(["rows, after 256 bytes", "bytes/s", "times one row"], lines, ["decode"])


@table
def operations() -> str:
    found = read("operations")
    results = found["results"]
    names = {
        "a byte": f"this package, one row, patches of {number(found['bytes_a_patch'])} bytes",
        "a byte that ends no patch": "a byte that ends no patch",
        "a byte that ends its patch": "a byte that ends its patch",
        "a draft": "a draft",
        "a verification of 8 bytes": "a verification of 8 bytes, all at once",
        "a byte of 16 rows": "16 rows, all at once",
        "a token of a Llama": "a token of the Llama",
    }
    lines = [
        [label, *(f"{value:,.0f}" for value in results[name].values())]
        for name, label in names.items()
        if name in results
    ]
    return markdown(["a byte", "operations", "that are not views", "calls of functions"], lines, ["operations"])


@table
def warm_up() -> str:
    lines = []
    for label, name in (("modules", "warmup_before"), ("packed weights", "warmup")):
        found = read(name)
        counts = [f"{found[key]:,}" for key in ("graphs", "nodes", "guards", "kernels")]
        lines.append([label, *counts, number(found["s_of_the_first_call"], 3), number(found["s_of_processors"], 3)])
    header = ["compiled steps of", "graphs", "nodes", "guards", "kernels", "s", "s of processors"]
    return markdown(header, lines, ["warmup_before", "warmup"])


@table
def drafts() -> str:
    rows, lines = read("speculation")["rows"], []
    columns = [("greedy", 1), ("sampling", 1), ("greedy", 8)]
    for window in dict.fromkeys(row["window"] for row in rows):
        cells = []
        for way, count in columns:
            row = find(rows, window=window, way=way, rows=count)
            accepted = row.get("accepted")
            cells += [number(row.get("units_per_s", row.get("bytes/s")), 3), number(row.get("speed"), 3)]
            cells += ["" if accepted is None else f"{accepted:.0%}"] if count == 1 else []
        lines.append([window, *cells])
    header = ["window", "greedy: bytes/s", "speed", "accepted", "sampling: bytes/s", "speed", "accepted"]
    return markdown([*header, "8 rows: bytes/s", "speed"], lines, ["speculation"])


@table
def prefill() -> str:
    rows, lines = read("prefill")["rows"], []
    names = ("blt_hf", "blt_hf, no cache", "in-tree, no cache", "llama")
    for length in dict.fromkeys(row["bytes"] for row in rows):
        speeds = [find(rows, bytes=length, name=name)["units_per_s"] for name in names]
        ratios = [number(speed / speeds[2], 3) for speed in speeds[:2]]
        lines.append([f"{length:,}", *(f"{speed:,.0f}" for speed in speeds), *ratios])
    header = ["bytes", "this package", "without a cache", "in-tree class, without", "Llama"]
    header += ["times the in-tree class", "without a cache"]
    return markdown(header, lines, ["prefill"])


@table
def training_step() -> str:
    lines = []
    for result in ("train_step", "train_step_16384"):
        rows = read(result)["rows"]
        for length in dict.fromkeys(row["bytes"] for row in rows):
            ours, given, theirs = (
                find(rows, bytes=length, name=name) for name in ("blt_hf", "blt_hf, precomputed patches", "in-tree")
            )
            seconds = [row["s_per_step"] for row in (ours, given, theirs)]
            ratios = [number(seconds[2] / mine, 3) for mine in seconds[:2]]
            share = ours.get("share of matmul peak")
            share = "" if share is None else f"{share:.0%}"
            lines.append([f"{length:,}", *(number(value, 3) for value in seconds), *ratios, share])
    header = ["bytes", "this package", "with precomputed patches", "in-tree class", "times as fast"]
    header += ["with precomputed patches", "share of the peak of matrix products"]
    return markdown(header, lines, ["train_step", "train_step_16384"])


@table
def hash_tables() -> str:
    names = {"dense": "dense, AdamW", "rows": "sparse, row-wise Adagrad (`BltAdamW`)"}
    rows = read("hash_tables")["rows"]
    lines = [
        [
            names[row["name"]],
            number(row["s_per_step"], 2, " s"),
            number(row["optimizer state of tables, MB"], 2 if row["name"] == "rows" else 3, " MB"),
        ]
        for row in rows
    ]
    return markdown(
        ["gradients and optimizer of the tables", "s a step", "optimizer state of the tables"], lines, ["hash_tables"]
    )


def fill(text: str) -> str:
    """Puts the tables in their places in a page."""

    def made(place: re.Match) -> str:
        try:
            return f"<!-- {place[1]} -->\n\n{TABLES[place[1]]()}\n\n<!-- end -->"
        except FileNotFoundError:  # not measured yet
            return place[0]

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page is not what would be written"
    )
    arguments = parser.parse_args()
    text = PAGE.read_text()
    filled = fill(text)
    if arguments.check and filled != text:
        sys.exit(
            f"{PAGE.relative_to(ROOT)} is not of the results in benchmarks/results: run python benchmarks/tables.py"
        )
    PAGE.write_text(filled)


if __name__ == "__main__":
    main()
