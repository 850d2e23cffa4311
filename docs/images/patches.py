"""Draws `patches.png`: how hard each byte of a sentence is to guess, and the patches that follow from it.

python docs/images/patches.py [MODEL]        # MODEL: a BLT, by default the one that comes with the project
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import blt_hf  # noqa: F401 (the Auto classes know BLT from here on)


SENTENCE = "A function call always returns some value, possibly None, unless it raises an exception."
PRETRAINED = Path(__file__).parents[2] / "pretrained" / "blt-5m"
COLOURS = ("#3b6fb6", "#e0952b")


@torch.no_grad()
def main(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    output = model(ids, output_patches=True)
    # The entropy after byte `p - 1` says how hard byte `p` is to guess; position 0 is the BOS.
    entropies = output.entropies[0, :-1].tolist()
    lengths = output.patch_lengths[0].tolist()
    patches = [index for index, length in enumerate(lengths) for _ in range(length)][1 : len(entropies) + 1]
    labels = [chr(i - 4) if i > 4 + 32 else "␣" for i in ids[0, 1:].tolist()]

    figure, axes = plt.subplots(figsize=(14, 3.2), dpi=120)
    positions = range(1, len(entropies) + 1)
    axes.bar(positions, entropies, width=0.85, color=[COLOURS[patch % 2] for patch in patches])
    axes.axhline(model.config.patching_threshold, color="black", linestyle="--", linewidth=1)
    axes.text(len(entropies) + 0.8, model.config.patching_threshold, "threshold", va="center", fontsize=9)
    axes.set_xticks(positions, labels, fontfamily="monospace", fontsize=10)
    for label, patch in zip(axes.get_xticklabels(), patches):
        label.set_color(COLOURS[patch % 2])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0.2, len(entropies) + 0.8)
    axes.set_ylabel("entropy before\nthe byte (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("patches.png"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(PRETRAINED))
