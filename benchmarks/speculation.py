"""Self-speculation (BLT-S): what a trained model accepts, and what that is worth at the proportions of the released 1B.

python benchmarks/speculation.py                    # the pretrained model of this repository
python benchmarks/speculation.py --model some/blt --device cuda --dtype bfloat16

The first table times `generate()` with and without `self_speculation_window` on a trained model, and counts. The second
takes the bytes that a pass gave there and the time that drafting and verifying take in a random model with the 1B's
proportions: a calculation from two measurements, because no such model is trained here.
"""

import argparse
import copy
import statistics
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import SHAPES, Contestant, add_arguments, build_blt, interleave, random_ids, report, timed
from transformers import set_seed

from blt_hf import BltForCausalLM, BltTokenizer


PROMPTS = ["with", "import", "class", "exceptions"]
PROMPT_BYTES = 300
ROOT = Path(__file__).parent.parent
SHAPES["1b-proportions"] = ((192, 14, 4, 512), (256, 1, 4, 704), (256, 9, 4, 704), (512, 25, 8, 1408), 2, 5000)


class Counts:
    """Passes of the whole model and of the drafting one, since the last `clear`."""

    def __init__(self, model: BltForCausalLM):
        self.clear()
        model.model.register_forward_hook(self.count_pass)
        draft = model.draft_logits

        def counted(*args):
            self.drafts += 1
            return draft(*args)

        model.draft_logits = counted

    def count_pass(self, *args) -> None:
        self.passes += 1

    def clear(self) -> None:
        self.passes = self.drafts = 0


def generate(model, prompts: list[torch.Tensor], num_bytes: int, sampling: dict, **settings) -> list[torch.Tensor]:
    set_seed(0)
    return [
        model.generate(p, max_new_tokens=num_bytes, min_new_tokens=num_bytes, **sampling, **settings) for p in prompts
    ]


def measure_trained(arguments) -> list[dict]:
    local = ROOT / arguments.model
    folder = local if local.is_dir() else arguments.model
    model = BltForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    tokenizer, counts = BltTokenizer(), Counts(model)
    texts = [topics[name].encode()[:PROMPT_BYTES].decode(errors="ignore") for name in PROMPTS]
    prompts = [tokenizer(text, return_tensors="pt").input_ids.to(arguments.device) for text in texts]
    schedules = {"none": {}}
    for window in arguments.windows:
        schedules[str(window)] = {"self_speculation_window": window}
    schedules["adaptive"] = {"self_speculation_window": 4, "self_speculation_schedule": "heuristic"}
    rows = []
    ways = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 0}}
    for way, sampling in ways.items():
        contestants, facts, plain = [], [], None
        for name, settings in schedules.items():
            counts.clear()
            texts = generate(model, prompts, arguments.new_bytes, sampling, **settings)
            plain = texts if plain is None else plain
            if way == "greedy" and not all(a.equal(b) for a, b in zip(texts, plain)):
                raise SystemExit(f"window {name} changed the text: no timing from a wrong result")
            count = arguments.new_bytes * len(prompts)
            drafts, passes = counts.drafts, counts.passes
            # Each pass gives one byte of its own and those drafts that it accepts.
            accepted = (count - passes) / drafts if drafts else None
            facts.append({"way": way, "window": name, "accepted": accepted, "passes a byte": passes / count})

            def run(settings=settings, sampling=sampling):
                return generate(model, prompts, arguments.new_bytes, sampling, **settings)

            contestants.append(Contestant(name, run, count, arguments.repeats))
        results = interleave(contestants, arguments.device)
        for fact, result in zip(facts, results):
            speed = result["units_per_s"] / results[0]["units_per_s"]
            rows.append({**fact, "bytes/s": result["units_per_s"], "spread": result["spread"], "speed": speed})
    return rows


@torch.no_grad()
def measure_proportions(arguments, trained: list[dict]) -> list[dict]:
    device, repeats = arguments.device, 12 * arguments.repeats
    model = build_blt("1b-proportions", arguments.patch_bytes, device, arguments.dtype)
    ids = random_ids(1, 512 + 64 + repeats, device)
    start = model(ids[:, :512], use_cache=True).past_key_values
    cache, at = copy.deepcopy(start), 512

    def one_byte():
        nonlocal at
        model(ids[:, at : at + 1], past_key_values=cache)
        at += 1

    plain = statistics.mean(timed(one_byte, device) for _ in range(repeats))  # a mean: only some bytes end a patch
    rows = []
    for row in trained:
        if row["way"] != "greedy" or not row["window"].isdigit():
            continue
        window = int(row["window"])
        cache = copy.deepcopy(start)
        cache.activate_past_recording()
        model(ids[:, 512:513], past_key_values=cache)
        state = cache.snapshot()

        def draft(cache=cache, state=state, window=window):
            for index in range(window):
                model.draft_logits(ids[:, 513 + index : 514 + index], cache)
            cache.restore(state)

        def verify(start=start, window=window):
            cache = copy.deepcopy(start)
            cache.activate_past_recording()
            seconds = timed(lambda: model(ids[:, 512 : 513 + window], past_key_values=cache), device)
            return seconds + timed(lambda: cache.crop(-(window // 2 + 1)), device)

        drafting = statistics.median(timed(draft, device) for _ in range(repeats // 4))
        verifying = statistics.median(verify() for _ in range(repeats // 4))
        given = 1 / row["passes a byte"]
        rows.append(
            {
                "window": window,
                "ms a byte, plain": 1000 * plain,
                "ms to draft": 1000 * drafting,
                "ms to verify": 1000 * verifying,
                "bytes a pass": given,
                "calculated speed": plain * given / (drafting + verifying),
                "speed if all were accepted": plain * (window + 1) / (drafting + verifying),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--model", default="pretrained/blt-5m", help="a trained BLT, seen from the root of the repository"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--new-bytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trained = measure_trained(arguments)
    report("speculation: a trained model", trained, arguments)
    report("speculation: proportions of the 1B", measure_proportions(arguments, trained), arguments)


if __name__ == "__main__":
    main()
