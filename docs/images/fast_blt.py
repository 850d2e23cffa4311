"""Draws the two pictures of docs/fast_blt.md.

python docs/images/fast_blt.py runs/fast        # what examples/fast_blt.py wrote

The first is the mask that the decoder's attention uses in training, on a short text; the second a block being filled in.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from blt_hf import BltForCausalLM, BltTokenizer
from blt_hf.fast_blt.blocks import Unmasking
from blt_hf.fast_blt.masked import BlockNoise, TwoStreamSpan


HERE = Path(__file__).parent
MASK_TEXT, MASK_SIZE = "It imports a module", 4
PROMPT = "The import statement is used to "
BLOCK_SIZE, NUM_BLOCKS = 8, 3
MASK = "▒"


def printable(token: int) -> str:
    return {1: "‹", 2: "›", ord(" ") + 4: "␣", ord("\n") + 4: "↵"}.get(token, chr(token - 4) if token >= 36 else "·")


def draw_mask(model: BltForCausalLM, path: Path) -> None:
    ids = BltTokenizer()(MASK_TEXT, return_tensors="pt").input_ids
    noise = BlockNoise(ids, MASK_SIZE, model.mask_embedding.weight[0], torch.Generator().manual_seed(4))
    with torch.no_grad():
        blocks = model.model(ids, use_cache=False, block_noise=noise).blocks
    span = TwoStreamSpan(blocks, None, ids.shape[1], model.config.local_attention_window_len, "sdpa")
    length, num_blocks = ids.shape[1], blocks.ids.shape[1]
    # Equal queries and keys give each visible key the same weight, and its value says which it is.
    attention, total = model.model.local_decoder.layers[0].self_attn, length + blocks.ids.numel()
    states = torch.zeros(1, model.config.decoder_config.num_attention_heads, total, total)
    with torch.no_grad():
        seen = span.attend(attention, states, states, states + torch.eye(total))[0][0, :, 0] > 0
    exists = torch.cat([torch.ones(length, dtype=torch.bool), blocks.exists[0].flatten()])
    # 0: nothing, 1: text sees text, 2: a block sees the text before it, 3: a block sees itself
    kind = seen.long()
    kind[length:] *= 2
    kind[length:, length:] = seen[length:, length:] * 3
    kind = kind[exists][:, exists]
    masked = torch.where(blocks.is_masked, -1, blocks.ids)[0].flatten()[exists[length:]].tolist()
    labels = [printable(i) for i in ids[0].tolist()] + [MASK if i < 0 else printable(i) for i in masked]
    figure, axes = plt.subplots(figsize=(9, 9.3), layout="constrained")
    axes.imshow(kind, cmap=ListedColormap(["#ffffff", "#9ecae1", "#fdae6b", "#e6550d"]), vmin=0, vmax=3)
    for edge in range(len(kind) + 1):
        axes.axhline(edge - 0.5, color="#dddddd", linewidth=0.4)
        axes.axvline(edge - 0.5, color="#dddddd", linewidth=0.4)
    edges, sizes = length, blocks.exists[0].sum(dim=1).tolist()
    for size in sizes:
        axes.axhline(edges - 0.5, color="black", linewidth=0.8)
        axes.axvline(edges - 0.5, color="black", linewidth=0.8)
        edges += size
    axes.set_xticks(range(len(labels)), labels, family="monospace", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, family="monospace", fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("is seen: the text, then its blocks")
    axes.set_ylabel("sees")
    names = ("text sees the text before it", "a block sees the text before it", "a block sees itself")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("#9ecae1", "#fdae6b", "#e6550d")]
    axes.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    print(f"{length} bytes, {num_blocks} blocks")


def readings(model: BltForCausalLM, prompt: str) -> tuple[torch.Tensor, list[dict]]:
    """What `generate` writes, and for each reading of a block: probabilities, what was masked, and what is kept."""
    found, choose = [], Unmasking.choose

    def recorded(self, scores, is_masked):
        kept = choose(self, scores, is_masked)
        probability, best = scores[0].softmax(dim=-1).max(dim=-1)
        found.append({"p": probability, "best": best, "masked": is_masked[0], "kept": kept[0]})
        return kept

    Unmasking.choose = recorded
    try:
        ids = BltTokenizer()(prompt, return_tensors="pt").input_ids
        new = 1 + (BLOCK_SIZE - 1) * NUM_BLOCKS + NUM_BLOCKS - 1
        text = model.generate(
            ids, diffusion_block_size=BLOCK_SIZE, max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    finally:
        Unmasking.choose = choose
    return text[0, ids.shape[1] :], found


def draw_unmasking(model: BltForCausalLM, path: Path) -> None:
    written, found = readings(model, PROMPT)
    figure, axes = plt.subplots(figsize=(9, 0.42 * (len(found) + NUM_BLOCKS) + 1.1), layout="constrained")
    row, start = 0, 0
    chosen = None
    for reading in found:
        if bool(reading["masked"].all()):
            row += 0.5 if chosen is not None else 0
            start = 0 if chosen is None else start + BLOCK_SIZE
            chosen = [None] * (BLOCK_SIZE - 1)
        axes.text(
            start, row, printable(int(written[start])), ha="center", va="center", family="monospace", weight="bold"
        )
        for index in range(BLOCK_SIZE - 1):
            is_masked, is_kept = bool(reading["masked"][index]), bool(reading["kept"][index])
            token, probability = int(reading["best"][index]), float(reading["p"][index])
            if is_masked:
                color = plt.cm.YlGn(0.85 * probability) if is_kept else plt.cm.Greys(0.1 + 0.35 * probability)
                axes.add_patch(plt.Rectangle((start + index + 0.52, row - 0.46), 0.96, 0.92, color=color))
                axes.text(
                    start + index + 1.34,
                    row + 0.3,
                    f"{probability:.2f}".lstrip("0"),
                    ha="center",
                    va="center",
                    fontsize=5,
                )
            if is_kept:
                chosen[index] = token
            text = printable(token if is_masked else chosen[index])
            weight, tone = ("bold", "black") if not is_masked or is_kept else ("normal", "#777777")
            axes.text(
                start + index + 0.95,
                row,
                text,
                ha="center",
                va="center",
                family="monospace",
                weight=weight,
                color=tone,
            )
        row += 1
    axes.set(xlim=(-0.6, start + BLOCK_SIZE - 0.3), ylim=(row - 0.4, -0.7))
    axes.set_title(
        f"{PROMPT!r} goes on in blocks of {BLOCK_SIZE}: each line is a reading of a block by the decoder\n"
        "green: kept (probability in the corner); grey: a mask still, with what it would be",
        fontsize=9,
    )
    axes.axis("off")
    figure.savefig(path, dpi=120)
    print(repr(bytes(b - 4 for b in written.tolist() if b >= 4).decode(errors="replace")))


def main(path: str) -> None:
    model = BltForCausalLM.from_pretrained(path).eval()
    draw_mask(model, HERE / "fast_blt_mask.png")
    draw_unmasking(model, HERE / "fast_blt_unmasking.png")


if __name__ == "__main__":
    main(sys.argv[1])
