"""Draws how cost grows with bytes, from the JSON lines in `benchmarks/results`.

python benchmarks/decode.py --compile | tail -1 > benchmarks/results/decode.json
python benchmarks/train_step.py | tail -1 > benchmarks/results/train_step.json
python benchmarks/plot.py                           # writes docs/images/cost.png
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator


ROOT = Path(__file__).parent.parent
LABELS = {
    "blt_hf": "blt_hf",
    "blt_hf, compiled": "blt_hf, compiled",
    "blt_hf, precomputed patches": "blt_hf, patches computed before",
    "in-tree": "in-tree class",
    "no cache (ours)": "blt_hf without a cache",
    "llama": "Llama of the global's shape",
}
STYLES = {"in-tree": "s-", "llama": "^:", "no cache (ours)": "x--"}


def read(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def draw(axes, rows: list[dict], x: str, y, title: str, label: str) -> None:
    for name in LABELS:
        points = sorted((row[x], y(row)) for row in rows if row["name"] == name)
        if points:
            axes.plot(*zip(*points), STYLES.get(name, "o-"), label=LABELS[name], markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel=label, title=title)
    ticks = sorted({row[x] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    decoding = [row for row in read("decode") if row["batch"] == 1 and row["name"] in LABELS]
    decoding = [row for row in decoding if "blt_hf is faster by" in row]  # not the rows about batches
    draw(left, decoding, "context", lambda row: row["ms_per_unit"], "Generating a byte after so many", "ms a byte")
    draw(right, read("train_step"), "bytes", lambda row: row["s_per_step"], "A training step on so many", "seconds")
    figure.savefig(ROOT / "docs" / "images" / "cost.png", dpi=120)


if __name__ == "__main__":
    main()
