"""Seconds and memory of a training step (forward, backward, AdamW): ours against the in-tree class.

python benchmarks/train_step.py
python benchmarks/train_step.py --lengths 16384 --only blt_hf      # peak memory of one contestant alone
"""

import argparse

import torch
from common import (
    Contestant,
    adamw,
    add_arguments,
    build_pair,
    interleave,
    make_step,
    matmul_peak,
    peak_memory_mb,
    random_ids,
    report,
    set_up,
)

from blt_hf.evaluation.flops import flops_per_byte
from blt_hf.model.patching_blt import PatchingRule
from blt_hf.patches.lengths import compute_patch_lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["blt_hf", "in-tree"], help="one contestant, for its peak memory")
    arguments = parser.parse_args()
    set_up(arguments)
    device = arguments.device
    model, in_tree, difference = build_pair(arguments)
    model.train()
    in_tree.train()
    optimizer = adamw(model, 1e-5)
    rows, peak = [], matmul_peak(device, arguments.dtype)
    for length in arguments.lengths:
        ids = random_ids(1, length, device, seed=4)
        with torch.no_grad():
            found = model(ids, output_patches=True, use_cache=False)
        rule = PatchingRule.from_config(model.config)
        patch_lengths = compute_patch_lengths(rule, ids, found.entropies)
        repeats = 1 if length > 8192 else arguments.repeats
        contestants = [
            Contestant("blt_hf", make_step(model, ids, optimizer), 1, repeats),
            Contestant(
                "blt_hf, precomputed patches",
                make_step(model, ids, optimizer, patch_lengths=patch_lengths),
                1,
                repeats,
            ),
            Contestant("in-tree", make_step(in_tree, ids, adamw(in_tree, 1e-5)), 1, repeats),
        ]
        if arguments.only:
            contestants = [c for c in contestants if c.name == arguments.only]
        results = interleave(contestants, device)
        base = results[0]["ms_per_unit"]
        flops = flops_per_byte(model.config, arguments.patch_bytes, length).training()
        for result in results:
            # What the model needs, whoever computes it: half of a causal attention, and no more than the windows.
            needed = flops.without_patcher if "precomputed" in result["name"] else flops.total
            rows.append(
                {
                    "bytes": length,
                    "name": result["name"],
                    "s_per_step": result["ms_per_unit"] / 1000,
                    "bytes_per_s": length * result["units_per_s"],
                    "spread": result["spread"],
                    "share of matmul peak": needed * length / (result["ms_per_unit"] / 1000) / peak,
                    "blt_hf is faster by": result["ms_per_unit"] / base,
                    "peak_mb_so_far": peak_memory_mb(device),
                }
            )
    report("train_step: seconds a step", rows, arguments, logit_difference=difference, matmul_tflops=peak / 1e12)


if __name__ == "__main__":
    main()
