"""Draws `patches.png`: how hard each byte of some sentences is to guess, and the patches that follow from it.

python docs/images/patches.py [MODEL]        # MODEL: a BLT, by default the one that comes with the project
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

import blt_hf


SENTENCES = [
    "A function call always returns some value, possibly None, unless it raises an exception.",
    "Größere Änderungen: Это пример текста, ένα παράδειγμα, 日本語の文, एक वाक्य.",
]
PRETRAINED = Path(__file__).parents[2] / "pretrained" / "blt-5m"


def main(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    figure = blt_hf.plot_patches(model.get_patches(SENTENCES))
    figure.savefig(Path(__file__).with_name("patches.png"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(PRETRAINED))
