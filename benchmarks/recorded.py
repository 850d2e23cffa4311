"""Steps captured as CUDA graphs: milliseconds a byte of `generate()`, kernels a byte, what capturing costs, prompts.

python benchmarks/recorded.py --shape 1b --dtype bfloat16                # on a GPU; four minutes
python benchmarks/recorded.py --shape tiny --device cpu --tape           # a CPU plays one: its times mean nothing

Each part prints its rows and is in the JSON line at the end, also where the time runs out (`--seconds`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from common import (
    BYTES_PER_TOKEN,
    Contestant,
    add_arguments,
    bandwidth,
    build_blt,
    build_in_tree,
    build_llama,
    interleave,
    random_ids,
    report,
    set_up,
    timed,
    weight_bytes_a_byte,
)
from torch.profiler import ProfilerActivity, profile

from blt_hf.model import generation_blt, step_blt


DRAWN = {"do_sample": True, "top_k": 0, "temperature": 4.0, "eos_token_id": None, "pad_token_id": 0}
PLAIN = {"cache_implementation": "dynamic"}
WAYS = {
    "as it is": PLAIN,
    "captured (the default)": {},
    "captured, window 8": {"self_speculation_window": 8},
    'captured, window "auto"': {"self_speculation_window": "auto"},
}


def write(model, prompt: torch.Tensor, count: int, **settings) -> Callable[[], torch.Tensor]:
    """A call of `generate`. Sampling, so that the bytes of a random model and so its patches vary."""
    return lambda: model.generate(prompt, max_new_tokens=count, **{**DRAWN, **settings})


def of_a_byte(model, prompt: torch.Tensor, count: int, device: str, repeats: int, **settings) -> dict:
    """Milliseconds a byte of all rows: with what a call costs beside its prompt, and of bytes that follow.

    Both from the least of `repeats`, as other programs only ever add to it.
    """
    runs = [write(model, prompt, number, **settings) for number in (1, count, 2 * count)]
    runs[1]()
    first, half, whole = (min(timed(run, device) for _ in range(repeats)) for run in runs)
    units = 1000 / len(prompt)
    return {"ms a byte": units * (half - first) / (count - 1), "later": units * (whole - half) / count}


def check(model, prompt: torch.Tensor, count: int) -> None:
    """Equal texts, or no figures."""
    for settings in ({}, {"do_sample": False}):
        texts = []
        for more in (PLAIN, {}):
            torch.manual_seed(0)
            texts.append(write(model, prompt, count, **settings, **more)())
        same = float((texts[0] == texts[1]).float().mean())
        print(f"texts agree in {same:.3f} of their bytes", file=sys.stderr, flush=True)
        if same < 1 and model.dtype == torch.float32:
            raise SystemExit("captured steps write another text: no timing from a wrong result")


def decode(arguments, model) -> Iterator[dict]:
    """One row and many, each way."""
    device, count = arguments.device, arguments.new_bytes
    for context in arguments.contexts:
        prompt = random_ids(1, context, device, seed=2)
        for name, settings in WAYS.items():
            found = of_a_byte(model, prompt, count, device, arguments.repeats, **settings)
            yield {"context": context, "rows": 1, "name": name, **found}
    prompt = random_ids(arguments.rows, 256, device, seed=3)
    for name, settings in list(WAYS.items())[:2]:
        found = of_a_byte(model, prompt, count, device, arguments.repeats, **settings)
        yield {"context": 256, "rows": arguments.rows, "name": name, **found, "bytes/s": 1000 / found["later"]}


def llama(arguments, model) -> Iterator[dict]:
    """The global transformer's shape, as it is and with a static cache, at so many bytes a token."""
    device, peer = arguments.device, build_llama(arguments.shape, arguments.device, arguments.dtype)
    tokens = max(round(arguments.contexts[0] / BYTES_PER_TOKEN), 2)
    count = max(round(arguments.new_bytes / BYTES_PER_TOKEN), 8)
    ways = {"Llama": {}, "Llama, static and compiled": {"cache_implementation": "static"}}
    for name, settings in list(ways.items())[: 1 if arguments.tape else 2]:
        found = of_a_byte(peer, random_ids(1, tokens, device), count, device, arguments.repeats, **settings)
        found = {key: value / BYTES_PER_TOKEN for key, value in found.items()}
        yield {"context": arguments.contexts[0], "rows": 1, "name": name, **found}


def kernels(arguments, model) -> Iterator[dict]:
    """Kernels a byte by CUPTI, and launches by the host; on a CPU operations."""
    prompt, is_gpu = random_ids(1, arguments.contexts[0], arguments.device, seed=2), arguments.device != "cpu"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    for name, settings in list(WAYS.items())[:2]:
        found = []
        for count in (32, 64):
            with profile(activities=kinds) as seen:
                write(model, prompt, count, **settings)()
            events = seen.events()
            on_device = [e for e in events if "CUDA" in str(e.device_type)]
            launches = sum(e.name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch") for e in events)
            us = sum(e.device_time for e in on_device)
            found.append((len(on_device), launches, us / 1000, sum(e.name.startswith("aten::") for e in events)))
        each = [(more - less) / 32 for less, more in zip(*found)]
        yield {"name": name, **dict(zip(("kernels", "launches", "ms of kernels", "operations"), each))}


def short_texts(arguments, model) -> Iterator[dict]:
    """From how many bytes on capturing pays: whole calls."""
    prompt = random_ids(1, 64, arguments.device, seed=2)
    least, generation_blt._LEAST_CAPTURED = generation_blt._LEAST_CAPTURED, 1
    try:
        for count in (4, 8, 16, 32, 64):
            plain, captured = (
                min(timed(write(model, prompt, count, **more), arguments.device) for _ in range(arguments.repeats))
                for more in (PLAIN, {})
            )
            yield {"bytes": count, "as it is, ms": 1000 * plain, "captured, ms": 1000 * captured}
    finally:
        generation_blt._LEAST_CAPTURED = least


def prompts(arguments, model) -> Iterator[dict]:
    """Bytes a second of prompts, for a cache, beside the in-tree class."""
    in_tree = build_in_tree(model)
    for length in arguments.prompts:
        ids = random_ids(1, length, arguments.device, seed=4)

        def run(which, use_cache: bool, ids=ids):
            with torch.no_grad():
                which(ids, use_cache=use_cache, logits_to_keep=1)

        contestants = [
            Contestant("blt_hf, for a cache", lambda r=run: r(model, True), length, arguments.repeats),
            Contestant("blt_hf", lambda r=run: r(model, False), length, arguments.repeats),
            Contestant("in-tree", lambda r=run: r(in_tree, False), length, arguments.repeats),
        ]
        for found in interleave(contestants, arguments.device):
            yield {"bytes": length, **found}


PARTS = (decode, kernels, short_texts, prompts, llama)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--new-bytes", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=240, help="begin no part after so long")
    parser.add_argument("--tape", action="store_true", help="a CPU plays a GPU, by the tape of the tests")
    arguments = parser.parse_args()
    set_up(arguments)
    step_blt.CAPTURES_BY_DEFAULT = True
    started, found = time.perf_counter(), {}
    with ExitStack() as stack:
        if arguments.tape:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            from helpers.tape import record_on_tapes

            stack.enter_context(record_on_tapes())
        model = build_blt(arguments.shape, arguments.patch_bytes, arguments.device, arguments.dtype)
        check(model, random_ids(1, arguments.contexts[0], arguments.device, seed=2), 64)
        for part in PARTS:
            if time.perf_counter() - started > arguments.seconds:
                print(f"{part.__name__}: no time left", file=sys.stderr, flush=True)
                continue
            rows = found[part.__name__] = []
            try:
                for row in part(arguments, model):
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
            except (Exception, KeyboardInterrupt) as error:  # the other parts have their figures
                rows.append({"name": f"failed: {type(error).__name__}: {error}"[:300]})
                print(rows[-1], file=sys.stderr, flush=True)
                if isinstance(error, KeyboardInterrupt):
                    break
    if arguments.device == "cpu":
        speed = None
    else:
        read, speed = weight_bytes_a_byte(model, arguments.patch_bytes), bandwidth(arguments.device)
        speed = 1000 * read / speed
    report("captured steps", found.pop("decode"), arguments, ms_a_byte_to_read_weights=speed, **found)


if __name__ == "__main__":
    main()
