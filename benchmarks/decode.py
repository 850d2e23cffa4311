"""Bytes a second while generating: ours, the in-tree class, Meta's algorithm (no cache), and a Llama of equal shape.

python benchmarks/decode.py                         # the mid-size shape on this machine's CPU
python benchmarks/decode.py --shape 1b --dtype bfloat16 --device cuda --skip-in-tree
"""

import argparse
import copy
import subprocess
import sys

import torch
from common import (
    BYTES_PER_TOKEN,
    Contestant,
    add_arguments,
    bandwidth,
    build_blt,
    build_llama,
    build_pair,
    interleave,
    random_ids,
    report,
    set_up,
    timed,
    weight_bytes_a_byte,
)
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache

from blt_hf import BltCache


def decode_bytes(model, prompt: torch.Tensor, num_bytes: int):
    """Generates through `generate()`, sampling so that a random model's bytes, and so its patches, vary."""
    return model.generate(
        prompt, max_new_tokens=num_bytes, do_sample=True, top_k=0, temperature=4.0, eos_token_id=None, pad_token_id=0
    )


@torch.no_grad()
def calibrate(model, prompt: torch.Tensor, num_bytes: int, patch_bytes: float) -> None:
    """Sets the threshold by which the bytes written behind `prompt` make patches of `patch_bytes` bytes."""
    torch.manual_seed(0)
    text = decode_bytes(model, prompt.repeat(-(-16 // len(prompt)), 1), num_bytes)
    entropies = model(text, output_patches=True, use_cache=False).entropies[:, prompt.shape[1] - 1 :]
    model.config.patching_threshold = float(entropies.quantile(1 - 1 / patch_bytes))


class Continuation:
    """Generation from a prompt that was read once, outside the timing."""

    def __init__(
        self,
        model,
        prompt: torch.Tensor,
        num_bytes: int,
        make_cache=lambda: None,
        is_static=False,
        compile_config=None,
    ):
        self.model, self.prompt, self.num_bytes = model, prompt, num_bytes
        cache = make_cache()
        if is_static or compile_config is not None:
            cache = BltCache(model.config)
            cache.fix_steps(compile_config, prompt.shape[1] + num_bytes)
        with torch.no_grad():
            self.cache = model(prompt[:, :-1], use_cache=True, past_key_values=cache).past_key_values
        self.bytes, self.patches = 0, 0

    def __call__(self):
        cache = copy.deepcopy(self.cache)
        result = self.model.generate(
            self.prompt, past_key_values=cache, max_new_tokens=self.num_bytes, do_sample=True,
            top_k=0, temperature=4.0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        if isinstance(cache, BltCache):
            self.bytes += self.num_bytes * cache.batch_size
            self.patches += sum(cache.row_patches) - sum(self.cache.row_patches)
        return result


def whole(model, prompt: torch.Tensor, count: int):
    """A token model in its fastest form: a static cache and compiled steps, which `generate` keeps from call to call; with
    the prompt, because a copy of such a cache would be compiled for anew."""
    return lambda: model.generate(
        prompt, max_new_tokens=count, do_sample=True, top_k=0, temperature=4.0, eos_token_id=None, pad_token_id=0,
        cache_implementation="static",
    )  # fmt: skip


def full_forwards(model, ids: torch.Tensor, count: int):
    """What each new byte costs without a cache: a forward of everything so far."""
    with torch.no_grad():
        for _ in range(count):
            model(ids, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 2048, 4096])
    parser.add_argument("--new-bytes", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--compile", action="store_true", help="also with torch.compile (its time is not counted)")
    parser.add_argument("--skip-in-tree", action="store_true", help="leave out the two contestants without a cache")
    parser.add_argument("--busy", type=int, default=0, help="so many other processes that keep a core busy each")
    arguments = parser.parse_args()
    set_up(arguments)
    device = arguments.device
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        run(arguments, device)
    finally:
        for neighbour in neighbours:
            neighbour.kill()


def run(arguments: argparse.Namespace, device: str) -> None:
    if arguments.skip_in_tree:
        difference, in_tree = None, None
        model = build_blt(arguments.shape, arguments.patch_bytes, device, arguments.dtype)
    else:
        model, in_tree, difference = build_pair(arguments)
    llama = build_llama(arguments.shape, device, arguments.dtype)
    compile_config, is_gpu = CompileConfig(mode=None), device.startswith("cuda")
    rows, first_call = [], None
    if arguments.compile:
        # What the first call in this process waits for; empty torch's cache on disk to see what the first process does.
        settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
        first_call = timed(
            lambda: model.generate(random_ids(1, 64, device), compile_config=compile_config, **settings), device
        )
    for context in arguments.contexts:
        prompt = random_ids(1, context, device, seed=2)
        tokens = max(round(context / BYTES_PER_TOKEN), 2)
        new_tokens = max(round(arguments.new_bytes / BYTES_PER_TOKEN), 8)
        calibrate(model, prompt, arguments.new_bytes, arguments.patch_bytes)
        if in_tree is not None:
            in_tree.config.patching_threshold = model.config.patching_threshold
        contestants = [
            Contestant(
                "blt_hf", Continuation(model, prompt, arguments.new_bytes), arguments.new_bytes, arguments.repeats
            ),
            Contestant(
                "llama",
                Continuation(llama, prompt[:, :tokens], new_tokens, DynamicCache),
                new_tokens * BYTES_PER_TOKEN,
                arguments.repeats,
            ),
        ]
        if arguments.compile:
            compiled = Continuation(model, prompt, arguments.new_bytes, compile_config=compile_config)
            contestants.insert(1, Contestant("blt_hf, compiled", compiled, arguments.new_bytes, arguments.repeats))
        if is_gpu:
            recorded = Continuation(model, prompt, arguments.new_bytes, is_static=True)
            contestants.insert(1, Contestant("blt_hf, recorded", recorded, arguments.new_bytes, arguments.repeats))
        if is_gpu and arguments.compile:
            units = new_tokens * BYTES_PER_TOKEN
            compiled = whole(llama, prompt[:, :tokens], new_tokens)
            contestants.append(Contestant("llama, compiled, with its prompt", compiled, units, arguments.repeats))
        if in_tree is not None:
            count = 1 if context > 1024 else 3
            contestants += [
                Contestant("in-tree", lambda ids=prompt, n=count: full_forwards(in_tree, ids, n), count, 3),
                Contestant("no cache (ours)", lambda ids=prompt, n=count: full_forwards(model, ids, n), count, 3),
            ]
        results = interleave(contestants, device)
        base = results[0]["units_per_s"]
        for result in results:
            rows.append(
                {"context": context, "batch": 1, **result, "blt_hf is faster by": base / result["units_per_s"]}
            )
        rows[-len(results)]["bytes_a_patch"] = contestants[0].run.bytes / contestants[0].run.patches
    for batch in arguments.batch_sizes:
        prompt, count = random_ids(batch, 256, device, seed=3), arguments.new_bytes * batch
        calibrate(model, prompt, arguments.new_bytes, arguments.patch_bytes)
        contestants = [
            Contestant("blt_hf", Continuation(model, prompt, arguments.new_bytes), count, arguments.repeats)
        ]
        if arguments.compile:
            compiled = Continuation(model, prompt, arguments.new_bytes, compile_config=compile_config)
            contestants.append(Contestant("blt_hf, compiled", compiled, count, arguments.repeats))
        if is_gpu:
            recorded = Continuation(model, prompt, arguments.new_bytes, is_static=True)
            contestants.append(Contestant("blt_hf, recorded", recorded, count, arguments.repeats))
        results = interleave(contestants, device)
        for result in results:
            rows.append({"context": 256, "batch": batch, **result})
        rows[-len(results)]["bytes_a_patch"] = contestants[0].run.bytes / contestants[0].run.patches
    read, speed = weight_bytes_a_byte(model, arguments.patch_bytes), bandwidth(device)
    report(
        "decode: bytes a second",
        rows,
        arguments,
        logit_difference=difference,
        s_of_the_first_compiled_call=first_call,
        mb_of_weights_a_byte=read / 1e6,
        memory_gb_per_s=speed / 1e9,
        ms_a_byte_to_read_weights=1000 * read / speed,
    )


if __name__ == "__main__":
    main()
