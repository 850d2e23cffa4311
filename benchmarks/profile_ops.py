"""Where the time goes: operations of a training step and of decoding, by kind.

python benchmarks/profile_ops.py --threads 1
"""

import argparse
from collections import defaultdict

import torch
from common import adamw, add_arguments, build_blt, make_step, random_ids, report, set_up
from torch.profiler import ProfilerActivity, profile


KINDS = {  # the first that an operation's name begins with or holds
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention kernels": ("aten::_scaled_dot_product", "aten::_efficient_attention", "aten::_flash_attention"),
    "gather, scatter, index": ("index", "gather", "scatter", "embedding", "unfold"),
    "copies, concatenation": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_", "flip", "pad"),
    "optimizer": ("_foreach", "lerp", "addcdiv", "sqrt"),
    "norms, elementwise": (
        "mul", "add", "sub", "div", "pow", "sum", "mean", "rsqrt", "silu", "sigmoid", "exp", "neg", "where", "softmax",
        "rms_norm", "masked_fill", "cos", "sin", "max", "le", "ge", "lt", "gt", "and", "remainder", "cumsum",
    ),
}  # fmt: skip


def kind_of(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "shapes, views, the rest"


def shares(events, is_cuda: bool) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        totals[kind_of(event.key)] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    whole = sum(totals.values())
    return {kind: totals[kind] / whole for kind in sorted(totals, key=totals.get, reverse=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--length", type=int, default=4096, help="bytes of the training step")
    parser.add_argument("--context", type=int, default=512, help="bytes before those that are decoded")
    parser.add_argument("--new-bytes", type=int, default=96)
    arguments = parser.parse_args()
    set_up(arguments)
    device = arguments.device
    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    model = build_blt(arguments.shape, arguments.patch_bytes, device, arguments.dtype)
    train = make_step(model, random_ids(1, arguments.length, device, seed=4), adamw(model, 1e-5))
    text = random_ids(1, arguments.context + 2 * arguments.new_bytes, device, seed=2)

    @torch.no_grad()
    def decode():
        for index in range(start, start + arguments.new_bytes):
            model(text[:, index : index + 1], past_key_values=cache)

    found = {}
    model.train()
    train()
    with profile(activities=activities) as profiler:
        train()
    found[f"training step, {arguments.length:,} bytes"] = shares(profiler.key_averages(), is_cuda)
    model.eval()
    with torch.no_grad():
        cache = model(text[:, : arguments.context], use_cache=True).past_key_values
    start = arguments.context
    decode()
    start += arguments.new_bytes
    with profile(activities=activities) as profiler:
        decode()
    found[f"decoding after {arguments.context:,} bytes"] = shares(profiler.key_averages(), is_cuda)
    kinds = sorted(
        {kind for parts in found.values() for kind in parts}, key=lambda k: -sum(p[k] for p in found.values())
    )
    rows = [{"operations": kind, **{name: parts.get(kind, 0.0) for name, parts in found.items()}} for kind in kinds]
    report("profile_ops: shares of the time in operations", rows, arguments)


if __name__ == "__main__":
    main()
