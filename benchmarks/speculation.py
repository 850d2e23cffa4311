"""Self-speculation (BLT-S): what a trained model accepts, and what that is worth, there and at the 1B's proportions.

python benchmarks/speculation.py                    # the pretrained model of this repository
python benchmarks/speculation.py --model some/blt --device cuda --dtype bfloat16
python benchmarks/speculation.py --only parts       # what byte, draft and verification cost: the most to win

Everything is timed in `generate()`, compiled, in turns: plain decoding, windows of drafts, eight rows at once, and a
Llama of the global transformer's shape at 4.4 bytes a token. No model with the proportions of the released 1B is trained
here, so a random one stands in, whose drafts are accepted about as often as the trained model's: its global transformer
says little, and how little is set by the acceptance.
"""

import argparse
import statistics
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import (
    BYTES_PER_TOKEN,
    SHAPES,
    Contestant,
    add_arguments,
    build_blt,
    interleave,
    llama_of,
    random_ids,
    report,
    set_up,
    timed,
)
from transformers import CompileConfig, set_seed

from blt_hf import BltCache, BltForCausalLM, BltTokenizer, speculation


PROMPTS = ["with", "import", "class", "exceptions", "while", "lambda", "numbers", "strings"]
PROMPT_BYTES = 300
ROOT = Path(__file__).parent.parent
SHAPES["1b-proportions"] = ((192, 14, 4, 512), (256, 1, 4, 704), (256, 9, 4, 704), (512, 25, 8, 1408), 2, 5000)
WAYS = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 0}}


class Counts:
    """Drafts that were verified and accepted, and passes of the whole model, since the last `clear`."""

    def __init__(self):
        self.clear()
        make = speculation.make_source

        def counted(*arguments):
            source = make(*arguments)
            update = source.update

            def count(drafted: list[int], accepted: list[int]) -> None:
                self.drafted += sum(drafted)
                self.accepted += sum(accepted)
                self.passes += sum(1 for number in drafted if number)
                update(drafted, accepted)

            source.update = count
            return source

        speculation.make_source = counted

    def clear(self) -> None:
        self.drafted = self.accepted = self.passes = 0


def windows_of(arguments) -> dict[str, dict]:
    schedules = {"none": {}}
    for window in arguments.windows:
        schedules[str(window)] = {"self_speculation_window": window}
    schedules["adaptive"] = {"self_speculation_window": 8, "self_speculation_schedule": "heuristic"}
    schedules["auto"] = {"self_speculation_window": "auto"}
    return schedules


def compare(
    model, batches: list[dict], arguments, sampling: dict, schedules: dict[str, dict], facts: dict
) -> list[dict]:
    """A row for each window: what was accepted, and bytes a second, against plain decoding in the same turns."""
    counts, num_bytes = Counts(), arguments.new_bytes
    settings = {"max_new_tokens": num_bytes, "min_new_tokens": num_bytes, "eos_token_id": None, "pad_token_id": 0}
    settings.pop("min_new_tokens")  # which would be a processor of its own; no text ends without an `eos`
    if not arguments.no_compile:
        settings["cache_implementation"] = "static"
    rows = sum(len(batch["input_ids"]) for batch in batches)

    def generate(more: dict) -> list[torch.Tensor]:
        set_seed(0)
        return [model.generate(**batch, **settings, **sampling, **more) for batch in batches]

    contestants, learned, plain = [], [], None
    for name, more in schedules.items():
        counts.clear()
        texts = generate(more)
        plain = texts if plain is None else plain
        if not sampling["do_sample"] and not all(a.equal(b) for a, b in zip(texts, plain)):
            raise SystemExit(f"window {name} changed the text: no timing from a wrong result")
        accepted = counts.accepted / counts.drafted if counts.drafted else None
        passes = (counts.passes + rows) / (num_bytes * rows) if counts.passes else 1.0
        learned.append({**facts, "window": name, "accepted": accepted, "passes a byte": passes})
        contestants.append(Contestant(name, lambda more=more: generate(more), num_bytes * rows, arguments.repeats))
    results = interleave(contestants, arguments.device, warm_up=False)
    return [
        {
            **fact,
            "bytes/s": result["units_per_s"],
            "spread": result["spread"],
            "speed": result["units_per_s"] / results[0]["units_per_s"],
        }
        for fact, result in zip(learned, results)
    ]


def measure_trained(arguments) -> tuple[list[dict], dict]:
    local = ROOT / arguments.model
    folder = local if local.is_dir() else arguments.model
    model = BltForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    tokenizer = BltTokenizer()
    texts = [topics[name].encode()[:PROMPT_BYTES].decode(errors="ignore") for name in PROMPTS]
    single = [dict(tokenizer(text, return_tensors="pt").to(arguments.device)) for text in texts[: arguments.prompts]]
    batch = [dict(tokenizer(texts, padding=True, return_tensors="pt").to(arguments.device))]
    schedules, rows = windows_of(arguments), []
    for way, sampling in WAYS.items():
        rows += compare(model, single, arguments, sampling, schedules, {"way": way, "rows": 1})
    few = {name: schedules[name] for name in ("none", "4", "8") if name in schedules}
    rows += compare(model, batch, arguments, WAYS["greedy"], few, {"way": "greedy", "rows": len(texts)})
    return rows, measure_llama(model, arguments)


def measure_llama(model, arguments) -> dict:
    """A Llama of the global transformer's shape, plain, at 4.4 bytes a token."""
    llama = llama_of(model.config.global_config, arguments.device, arguments.dtype)
    tokens = max(round(arguments.new_bytes / BYTES_PER_TOKEN), 8)
    prompt = random_ids(1, round(PROMPT_BYTES / BYTES_PER_TOKEN), arguments.device)

    def run():
        llama.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    result = interleave([Contestant("llama", run, tokens * BYTES_PER_TOKEN, 3 * arguments.repeats)], arguments.device)[
        0
    ]
    return {"bytes/s": result["units_per_s"], "spread": result["spread"]}


@torch.no_grad()
def measure_parts(arguments, turns: int = 20) -> dict:
    """Milliseconds of a compiled byte, draft, and verification of 8 bytes, and what they would give at best."""
    local = ROOT / arguments.model
    model = BltForCausalLM.from_pretrained(local if local.is_dir() else arguments.model)
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    ids = BltTokenizer()(topics["with"] * 2, return_tensors="pt").input_ids[:, :1024].to(arguments.device)
    cache = BltCache(model.config)
    cache.fix_steps(CompileConfig(mode=None), 1024)
    model(ids[:, :PROMPT_BYTES], use_cache=True, past_key_values=cache)
    runner = model.make_runner(cache)

    def read(count: int) -> float:
        start = cache.get_seq_length()
        return timed(lambda: runner.step(ids[:, start : start + count]), arguments.device)

    def draft() -> float:
        start = cache.get_seq_length()
        return timed(
            lambda: speculation.draft(runner, ids[:, start : start + 1], 1, lambda logits, step: (ids[:, :1],)),
            arguments.device,
        )

    parts = {"byte": lambda: read(1), "draft": draft, "verification of 8": lambda: read(8)}
    seconds = {name: [] for name in parts}
    for turn in range(turns + 3):
        for name, part in parts.items():
            new = [part() for _ in range(1 if name == "verification of 8" else 8)]
            seconds[name] += new if turn >= 3 else []  # the first ones compile
    cost = {name: 1000 * statistics.mean(values) for name, values in seconds.items()}  # only some bytes end a patch
    best = 8 * cost["byte"] / (7 * cost["draft"] + cost["verification of 8"])
    return {**{f"ms a {name}": value for name, value in cost.items()}, "speed with all drafts right": best}


def measure_proportions(arguments, trained: list[dict]) -> list[dict]:
    """The same, on a random model whose drafts are accepted about as often as the trained model's."""
    model = build_blt("1b-proportions", arguments.patch_bytes, arguments.device, arguments.dtype)
    prompt = {"input_ids": random_ids(1, PROMPT_BYTES, arguments.device)}
    goal = next(row["accepted"] for row in trained if row["window"] == "8" and row["rows"] == 1)
    weights = [cross.v_proj.weight for cross in model.model.local_decoder.cross_attn_layers]
    counts, low, high, scale = Counts(), 0.0, 1.0, 1.0
    for _ in range(7):  # how much the global transformer says, by bisection
        counts.clear()
        model.generate(
            **prompt, max_new_tokens=96, do_sample=False, self_speculation_window=8, eos_token_id=None, pad_token_id=0
        )
        accepted = counts.accepted / counts.drafted
        low, high = (scale, high) if accepted > goal else (low, scale)
        new = (low + high) / 2
        with torch.no_grad():
            for weight in weights:
                weight.mul_(new / scale)
        scale = new
    schedules = {name: more for name, more in windows_of(arguments).items() if name != "adaptive"}
    facts = {"way": "greedy", "rows": 1}
    return compare(model, [prompt], arguments, WAYS["greedy"], schedules, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--model", default="pretrained/blt-5m", help="a trained BLT, seen from the root of the repository"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--new-bytes", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="decode without torch.compile")
    parser.add_argument("--only", choices=["trained", "proportions", "parts"], help="one of the tables")
    arguments = parser.parse_args()
    set_up(arguments)
    if arguments.only == "parts":
        report("speculation: what the parts cost", [measure_parts(arguments)], arguments)
        return
    if arguments.only != "proportions":
        trained, llama = measure_trained(arguments)
        report("speculation: a trained model", trained, arguments, llama_of_equal_shape=llama)
    else:
        trained = [{"window": "8", "rows": 1, "accepted": 0.94}]
    if arguments.only != "trained":
        report("speculation: proportions of the 1B", measure_proportions(arguments, trained), arguments)


if __name__ == "__main__":
    main()
