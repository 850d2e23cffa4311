"""Time to import blt_hf and its names, against importing the same names from transformers.

Each measurement is a fresh interpreter; the two sides alternate, so that what else the machine does hits both. Goal:
at most 1.3 times the time.

    python benchmarks/import_time.py --rounds 15
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time


NAMES = "AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer"
BLT_NAMES = "BltConfig, BltModel, BltForCausalLM, BltPatcher"
SIDES = {
    "transformers": f"from transformers import {NAMES}, {BLT_NAMES}",
    "blt_hf": f"import blt_hf; from transformers import {NAMES}; from blt_hf import {BLT_NAMES}",
}
GOAL = 1.3


def seconds(statement: str) -> float:
    """Wall-clock seconds of `statement` inside a new interpreter, without the interpreter's own start."""
    code = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each side")
    rounds = parser.parse_args().rounds
    for statement in SIDES.values():
        seconds(statement)  # fills the file cache and writes bytecode
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(rounds):
        sides = list(SIDES)
        for side in sides if index % 2 else reversed(sides):
            times[side].append(seconds(SIDES[side]))
        print(f"\rround {index + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    # Rounds are pairs: the median of their ratios is steadier than the ratio of the medians.
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times["blt_hf"], times["transformers"]))
    print(f"{'import':<14}{'median s':>10}{'fastest s':>11}{'slowest s':>11}")
    for side, values in times.items():
        print(f"{side:<14}{statistics.median(values):>10.3f}{min(values):>11.3f}{max(values):>11.3f}")
    print(f"ratio {ratio:.3f} (goal: at most {GOAL})")
    result = {
        "benchmark": "import_time",
        "ratio": round(ratio, 4),
        "goal": GOAL,
        "median_seconds": {side: round(statistics.median(values), 4) for side, values in times.items()},
        "rounds": rounds,
        "python": sys.version.split()[0],
        "transformers": importlib.metadata.version("transformers"),
        "torch": importlib.metadata.version("torch"),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
