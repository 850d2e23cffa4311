"""Gathers the logs of the stages to one file, and draws them.

    python examples/smollm2/curve.py RUNS -o examples/smollm2/results   # RUNS: folders of stages, in their order

Writes `curve.json` and `curve.png`.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt


FIGURES = {
    "bits_per_byte": "bits per byte",
    "state_error": "error of states",
    "embedding_error": "error of embeddings",
}


def read_log(folder: Path) -> list[dict]:
    """Entries with figures; the last of those with the same step."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").open()]
    kept = {}
    for entry in entries:
        figures = {name: value for name, value in entry.items() if name.removeprefix("eval_") in FIGURES}
        if figures and "train_runtime" not in entry:
            kept.setdefault(entry["step"], {}).update(figures)
    return [{"step": step, **figures} for step, figures in sorted(kept.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    curve = {folder.name: read_log(folder) for folder in arguments.runs}
    (arguments.output / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    start, named = 0, -math.inf
    total = sum(entries[-1]["step"] for entries in curve.values() if entries)
    for name, entries in curve.items():
        for key in FIGURES:
            for prefix, style in (("", "-"), ("eval_", "o")):
                points = [(start + entry["step"], entry[prefix + key]) for entry in entries if prefix + key in entry]
                color = f"C{list(FIGURES).index(key)}"
                axes[int(key != "bits_per_byte")].plot(
                    *zip(*points), style, color=color, markersize=5
                ) if points else None
        for axis in axes:
            axis.axvline(start, color="0.8", linewidth=1)
        if start - named > total / 20:  # names of short stages would lie on each other
            axes[0].annotate(
                name, (start, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=20, va="bottom"
            )
            named = start
        start += entries[-1]["step"] if entries else 0
    for key, label in FIGURES.items():
        axes[int(key != "bits_per_byte")].plot([], [], color=f"C{list(FIGURES).index(key)}", label=label)
    axes[0].plot([], [], "o", color="C0", label="held-out prose")
    axes[0].set(ylabel="bits per byte", ylim=(0.5, 4))
    axes[1].set(ylabel="share lost", xlabel="steps of all stages", ylim=(0, 2))
    for axis in axes:
        axis.legend(loc="upper right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
