"""Fast BLT: bytes a second and the quality of the text, for plain decoding, self-speculation, BLT-D and BLT-DV.

python benchmarks/fast_blt.py --model runs/fast  # what examples/fast_blt.py wrote
python benchmarks/fast_blt.py --model some/blt --device cuda --dtype bfloat16

The first table writes the same prompts, code and prose, in every way, in turns: bytes a second, passes of the whole
model and readings of a block for each byte, and how good the text is: bits per byte that plain scoring gives it behind its
prompt, and the share of its 12-byte strings that came before in it. Verified text must be that of plain decoding, or the
script stops. The second times the parts of each way in a random model with the 1B's proportions, and calculates what the
counts of the first table would give there.
"""

import argparse
import inspect
import math
import statistics
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import SHAPES, Contestant, add_arguments, build_blt, interleave, random_ids, report, set_up, timed

from blt_hf import BltForCausalLM, BltTokenizer, speculation
from blt_hf.fast_blt import blocks


ROOT = Path(__file__).parent.parent
PROMPT_BYTES = 300
REPEATED = 12  # bytes of the strings whose repetition is counted
SHAPES["1b-proportions"] = ((192, 14, 4, 512), (256, 1, 4, 704), (256, 9, 4, 704), (512, 25, 8, 1408), 2, 5000)
PROMPTS = {
    "prose": [topics[name] for name in ("with", "import", "exceptions")],
    "code": [inspect.getsource(thing) for thing in (textwrap.TextWrapper, statistics.NormalDist, argparse.Action)],
}


class Counts:
    """Passes of the whole model, drafts of the local models, readings of blocks, since the last `clear`."""

    def __init__(self, model: BltForCausalLM):
        self.clear()
        make, draft = model.make_runner, speculation.draft

        def made(*arguments):
            runner = make(*arguments)
            self._count(runner, "step")
            self._count(runner, "next")
            return runner

        def drafted(runner, input_ids, count: int, choose):
            self.drafts += count
            return draft(runner, input_ids, count, choose)

        model.make_runner, speculation.draft = made, drafted
        fill = blocks.fill_block

        def filled(*arguments):
            block = fill(*arguments)
            self.reads += block.num_reads
            return block

        blocks.fill_block = filled

    def _count(self, runner, name: str) -> None:
        method = getattr(runner, name)

        def counted(*arguments):
            self.passes += 1
            return method(*arguments)

        setattr(runner, name, counted)

    def clear(self) -> None:
        self.passes = self.drafts = self.reads = 0


def ways(arguments) -> dict[str, dict]:
    found = {"plain": {}}
    for window in arguments.windows:
        found[f"S, {window}"] = {"self_speculation_window": window}
    for size in arguments.block_sizes:
        found[f"DV, {size}"] = {"diffusion_block_size": size, "verify": True}
    for size in arguments.block_sizes:
        found[f"D, {size}"] = {"diffusion_block_size": size, "confidence_threshold": arguments.confidence}
    size = sorted(arguments.block_sizes)[len(arguments.block_sizes) // 2]
    found[f"D, {size}, entropy"] = {
        "diffusion_block_size": size, "unmasking": "entropy", "entropy_budget": arguments.entropy
    }  # fmt: skip
    return found


def bits_per_byte(model: BltForCausalLM, text: torch.Tensor, prompt_length: int) -> float:
    """What plain scoring needs for what was written behind the prompt."""
    with torch.no_grad():
        log_probs = model(text, use_cache=False).logits[0, prompt_length - 1 : -1].log_softmax(dim=-1)
    return -float(log_probs.gather(1, text[0, prompt_length:, None]).mean()) / math.log(2)


def repetition(text: list[int]) -> float:
    """Share of the strings of `REPEATED` bytes that occurred before."""
    strings = [tuple(text[i : i + REPEATED]) for i in range(len(text) - REPEATED + 1)]
    return 1 - len(set(strings)) / len(strings)


def measure_trained(arguments) -> list[dict]:
    local = ROOT / arguments.model
    folder = local if local.is_dir() else arguments.model
    model = BltForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    model.generation_config.update(do_sample=False, eos_token_id=None)
    tokenizer, counts, rows = BltTokenizer(), Counts(model), []
    compiled = {} if arguments.eager else {"cache_implementation": "static"}
    for kind, texts in PROMPTS.items():
        texts = [text.encode()[:PROMPT_BYTES].decode(errors="ignore") for text in texts]
        prompts = [tokenizer(text, return_tensors="pt").input_ids.to(arguments.device) for text in texts]
        contestants, facts, plain = [], [], None
        for name, settings in ways(arguments).items():

            def run(settings=settings, prompts=prompts):
                return [model.generate(p, max_new_tokens=arguments.new_bytes, **compiled, **settings) for p in prompts]

            run()  # compiles
            counts.clear()
            written = run()
            plain = written if plain is None else plain
            is_same = all(a.equal(b) for a, b in zip(written, plain))
            if not is_same and not name.startswith("D,"):
                raise SystemExit(f"{name} changed the text: no timing from a wrong result")
            count = arguments.new_bytes * len(prompts)
            new = [text[0, prompt.shape[1] :].tolist() for text, prompt in zip(written, prompts)]
            facts.append(
                {
                    "prompts": kind,
                    "way": name,
                    "passes a byte": counts.passes / count,
                    "drafts a byte": counts.drafts / count,
                    "readings a byte": counts.reads / count,
                    "bits a byte": statistics.mean(
                        bits_per_byte(model, text, prompt.shape[1]) for text, prompt in zip(written, prompts)
                    ),
                    "repetition": statistics.mean(map(repetition, new)),
                    "text": bytes(b - 4 for b in new[0] if b >= 4)[:80].decode(errors="replace"),
                }
            )
            contestants.append(Contestant(name, run, count, arguments.repeats))
        results = interleave(contestants, arguments.device, warm_up=False)
        for fact, result in zip(facts, results):
            speed = result["units_per_s"] / results[0]["units_per_s"]
            rows.append({**fact, "bytes/s": result["units_per_s"], "spread": result["spread"], "speed": speed})
    return rows


@torch.no_grad()
def measure_proportions(arguments, trained: list[dict]) -> list[dict]:
    """Milliseconds of the parts, not compiled, and the speed that the counts of the trained model would give."""
    device, turns = arguments.device, 6 * arguments.repeats
    largest = max(arguments.block_sizes)
    model = build_blt("1b-proportions", arguments.patch_bytes, device, arguments.dtype, diffusion_block_size=largest)
    ids = random_ids(1, 512 + 64 + turns, device)
    cache = model(ids[:, :512], use_cache=True).past_key_values
    cache.reserve_slack(largest + 1)
    runner = model.make_runner(cache)

    def one_byte(index: int) -> float:
        return timed(lambda: runner.step(ids[:, 512 + index : 513 + index]), device)

    plain = statistics.mean(one_byte(index) for index in range(turns))  # a mean: only some bytes end a patch
    start = 512 + turns

    def whole(size: int) -> float:
        seconds = timed(lambda: runner.step(ids[:, start : start + size]), device)
        cache.crop_rows([size])
        return seconds

    def draft() -> float:
        return timed(
            lambda: speculation.draft(runner, ids[:, start : start + 1], 1, lambda logits, step: (ids[:, :1],)), device
        )

    def reading(size: int) -> float:
        block = ids[:, start : start + size]
        is_masked = torch.arange(size, device=device)[None] > 0

        def read():
            cache.begin(1, size, True, block.device)
            state = blocks.read_last(model, runner.settings, cache, block[:, :1], runner.packed)
            blocks.read_block(model, runner.settings, cache, state, block, is_masked, runner.packed)

        return timed(read, device)

    def median(part, *arguments) -> float:
        return statistics.median(part(*arguments) for _ in range(turns))

    rows = []
    for name, settings in ways(arguments).items():
        if name == "plain":
            continue
        of_way = [row for row in trained if row["way"] == name]
        passes, drafts, reads = (
            statistics.mean(row[key] for row in of_way)
            for key in ("passes a byte", "drafts a byte", "readings a byte")
        )
        size = settings.get("diffusion_block_size", settings.get("self_speculation_window", 0) + 1)
        seconds = {"pass": median(whole, size), "draft": 0.0, "reading": 0.0}
        if drafts:
            seconds["draft"] = median(draft)
        if reads:
            seconds["reading"] = median(reading, size)
        byte = passes * seconds["pass"] + drafts * seconds["draft"] + reads * seconds["reading"]
        rows.append(
            {
                "way": name,
                "ms a byte, plain": 1000 * plain,
                **{f"ms a {part}": 1000 * value for part, value in seconds.items()},
                "calculated speed": plain / byte,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", required=True, help="a BLT that was trained with blocks")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--windows", type=int, nargs="+", default=[8], help="of self-speculation")
    parser.add_argument("--confidence", type=float, default=0.6)
    parser.add_argument("--entropy", type=float, default=0.9, help="budget, nats")
    parser.add_argument("--new-bytes", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--only", choices=["trained"], help="the first table alone")
    arguments = parser.parse_args()
    set_up(arguments)
    trained = measure_trained(arguments)
    report("Fast BLT: a trained model", trained, arguments)
    if arguments.only != "trained":
        proportions = measure_proportions(arguments, trained)
        report("Fast BLT: proportions of the 1B", proportions, arguments, trained=trained)


if __name__ == "__main__":
    main()
