"""Seconds to read a prompt: ours (with and without a cache), the in-tree class, and a Llama of equal shape.

python benchmarks/prefill.py
"""

import argparse

import torch
from common import (
    BYTES_PER_TOKEN,
    Contestant,
    add_arguments,
    build_llama,
    build_pair,
    interleave,
    random_ids,
    report,
    set_up,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    set_up(arguments)
    device = arguments.device
    model, in_tree, difference = build_pair(arguments)
    llama = build_llama(arguments.shape, device, arguments.dtype)
    rows = []
    for length in arguments.lengths:
        ids = random_ids(1, length, device, seed=5)
        tokens = ids[:, : round(length / BYTES_PER_TOKEN)]

        def run(contestant, inputs=ids, use_cache=True):
            with torch.no_grad():
                contestant(inputs, use_cache=use_cache, logits_to_keep=1)

        contestants = [
            Contestant("blt_hf", lambda run=run: run(model), length, arguments.repeats),
            Contestant("blt_hf, no cache", lambda run=run: run(model, use_cache=False), length, arguments.repeats),
            Contestant("in-tree, no cache", lambda run=run: run(in_tree, use_cache=False), length, arguments.repeats),
            Contestant("llama", lambda run=run, tokens=tokens: run(llama, tokens), length, arguments.repeats),
        ]
        results = interleave(contestants, device)
        base = results[0]["units_per_s"]
        for result in results:
            rows.append({"bytes": length, **result, "blt_hf is faster by": base / result["units_per_s"]})
    report("prefill: bytes a second", rows, arguments, logit_difference=difference)


if __name__ == "__main__":
    main()
