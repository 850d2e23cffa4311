"""Draws `architecture.png`: how the bytes of a short text go through a BLT, and what a cache keeps of them.

python docs/images/architecture.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch


PATCHES = ["B", "A", " ", "function ", "call ", "al"]  # "B" stands for the BOS; the last patch is open
BLUE, ORANGE, GREY, GREEN = "#3b6fb6", "#e0952b", "#8a8a8a", "#3f8f5b"
BYTES = "".join(PATCHES)
OWNER = [index for index, patch in enumerate(PATCHES) for _ in patch]


def colour(patch: int) -> str:
    return (BLUE, ORANGE)[patch % 2]


def box(axes, x, y, width, height, text="", face="white", edge="black", size=10, **options):
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, **options))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, colour=GREY, width=0.9, zorder=3, **options):
    line = {
        "arrowstyle": "-|>",
        "color": colour,
        "lw": width,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 9,
        **options,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=line, zorder=zorder)


def label(axes, y, title, file):
    axes.text(-0.6, y + 0.16, title, ha="right", va="center", fontsize=10.5, weight="bold")
    axes.text(-0.6, y - 0.28, file, ha="right", va="center", fontsize=8.5, color=GREY, family="monospace")


def main() -> None:
    figure, axes = plt.subplots(figsize=(11.4, 8.2), dpi=120)
    last = len(BYTES)
    # From below: bytes, patcher, embeddings, encoder, latents, global transformer, latents, decoder, logits.
    rows = {
        "bytes": 0,
        "patcher": 1.3,
        "encoder": 3.2,
        "pool": 5,
        "global": 6.6,
        "split": 8.2,
        "decoder": 10,
        "head": 11.6,
    }
    for index, byte in enumerate(BYTES):
        shown = {" ": "␣", "B": "BOS"}.get(byte, byte)
        box(
            axes,
            index + 0.08,
            rows["bytes"],
            0.84,
            0.6,
            shown,
            size=7 if index == 0 else 11,
            edge=colour(OWNER[index]),
        )
        for part in ("encoder", "decoder"):
            box(axes, index + 0.18, rows[part] + 0.05, 0.64, 0.5, face=colour(OWNER[index]), edge="none", alpha=0.35)
        arrow(axes, (index + 0.5, rows["bytes"] + 0.62), (index + 0.5, rows["patcher"] - 0.02))
        arrow(
            axes,
            (index + 0.5, rows["encoder"] + 0.62),
            (index + 0.5, rows["decoder"] - 0.02),
            "#dddddd",
            0.7,
            zorder=0,
        )
        arrow(axes, (index + 0.5, rows["decoder"] + 0.62), (index + 0.5, rows["head"] - 0.02))
    question = "entropy model: how hard is the next byte?  ->  rule: where do patches start?"
    box(axes, 0, rows["patcher"], last, 0.6, question, face="#f3f3f3", size=9)
    embedded = "byte embedding + hash embeddings of the last 3 to 8 bytes"
    box(axes, 0, rows["patcher"] + 0.95, last, 0.45, embedded, face="#f3f3f3", size=9)
    for index in range(last):
        arrow(axes, (index + 0.5, rows["patcher"] + 1.42), (index + 0.5, rows["encoder"] + 0.03), width=0.7)
    box(axes, 0, rows["head"], last, 0.6, "head: 260 logits for the byte after each byte", face="#f3f3f3")

    first = 0
    centres = []
    for patch, text in enumerate(PATCHES):
        middle = first + len(text) / 2
        centres.append(middle)
        is_open = patch == len(PATCHES) - 1
        if is_open:
            box(
                axes,
                first + 0.05,
                rows["pool"],
                len(text) - 0.1,
                0.6,
                "open\npatch",
                edge=GREY,
                size=7.5,
                linestyle="--",
            )
        else:
            wide = len(text) - 0.16
            for row, name in (("pool", "pool + k queries"), ("global", ""), ("split", "k latents")):
                face = colour(patch) if row == "global" else "white"
                shown = name if wide > 3 else ""
                box(axes, middle - wide / 2, rows[row], wide, 0.6, shown, face=face, edge=colour(patch), size=8)
            arrow(axes, (middle, rows["pool"] + 0.62), (middle, rows["global"] - 0.02), colour(patch))
            arrow(axes, (middle, rows["global"] + 0.62), (middle, rows["split"] - 0.02), colour(patch))
        for index in range(first, first + len(text)):
            arrow(axes, (index + 0.5, rows["encoder"] + 0.6), (index + 0.5, rows["pool"] - 0.02), colour(patch), 1.1)
        first += len(text)
    # The global transformer is causal over all patches.
    axes.text(centres[3], rows["global"] + 0.3, "global transformer", ha="center", va="center", fontsize=10, zorder=4)
    for target in range(1, len(PATCHES) - 1):
        for source in range(target):
            start, end = (centres[source], rows["global"] + 0.6), (centres[target], rows["global"] + 0.6)
            arrow(axes, start, end, "black", 0.8, connectionstyle="arc3,rad=-0.25")

    # What one byte reads: the last patch that is complete when it is read.
    reader = last - 1
    arrow(axes, (centres[-2], rows["split"] + 0.62), (reader + 0.5, rows["decoder"] - 0.02), GREEN, 2.2)
    reads = "each byte reads the latents of one patch:\nthe last that is complete"
    axes.text(reader + 2.2, rows["split"] + 0.9, reads, fontsize=9, color=GREEN, va="center")
    for part in ("encoder", "decoder"):
        left, right = reader - 5, reader
        start, end = (left, rows[part] + 0.3), (right + 0.8, rows[part] + 0.3)
        arrow(axes, start, end, GREEN, 1.3, arrowstyle="|-|", mutation_scale=3)
    axes.text(last + 0.3, rows["encoder"] + 0.3, "window over bytes", fontsize=9, color=GREEN, va="center")
    axes.text(last + 0.3, rows["decoder"] + 0.3, "window over bytes", fontsize=9, color=GREEN, va="center")
    axes.text(last + 0.3, rows["global"] + 0.3, "all patches before", fontsize=9, color="black", va="center")
    arrow(axes, (last - 0.5, rows["head"] + 0.62), (last - 0.5, rows["head"] + 1.1), "black")
    axes.text(last - 0.5, rows["head"] + 1.35, '"w"', fontsize=11, ha="center")

    label(axes, rows["bytes"] + 0.3, "bytes", "tokenization.py")
    label(axes, rows["patcher"] + 0.3, "patcher", "stacks_blt.py, patching_blt.py")
    label(axes, rows["patcher"] + 1.2, "embeddings", "layers_blt.py")
    label(axes, rows["encoder"] + 0.3, "local encoder", "stacks_blt.py, layers_blt.py")
    label(axes, rows["pool"] + 0.3, "bytes to patches", "attention_blt.py")
    label(axes, rows["global"] + 0.3, "global transformer", "stacks_blt.py")
    label(axes, rows["split"] + 0.3, "patches to bytes", "attention_blt.py")
    label(axes, rows["decoder"] + 0.3, "local decoder", "stacks_blt.py")
    label(axes, rows["head"] + 0.3, "head", "modeling_blt.py")
    axes.set_xlim(-6.4, last + 5.2)
    axes.set_ylim(-0.3, rows["head"] + 1.8)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name("architecture.png"))


if __name__ == "__main__":
    main()
