"""Random models, arrivals, lengths, preemptions, drafts and cancellations: every text is what `generate` writes.

    python integrations/vllm/tests/fuzz.py --cases 1000 --seed 0

in the environment of `make test-vllm`, or `make test-vllm-fuzz`, which makes it. A case is one request: its ids and their
log-probabilities are compared with those of `generate`. Cases are shared out among 16 runs, each an engine with a random
model of its own. The result of a run is in the file of results as soon as it is there, so the command may be stopped; it
then goes on behind the last run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import MODES, SHAPES, encode, engine, expected, expected_texts, make_model, metric, ragged_of, save


# isort: split
# Behind `conftest`, which says how vLLM is to run.
import torch
import transformers
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from blt_hf.serving.ragged import largest_patch
from blt_hf_vllm.settings import MemoryPlan


ROOT = Path(__file__).parents[3]
DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}
ENGINES = {
    "pieces": {"max_num_batched_tokens": 40, "max_num_seqs": 6},
    "preempted": {"max_num_batched_tokens": 128, "max_num_seqs": 12, "max_model_len": 200, "async_scheduling": False},
    "drafts": {"max_num_batched_tokens": 96, "max_num_seqs": 8, **DRAFTS},
    "preempted_drafts": {"max_num_batched_tokens": 64, "max_num_seqs": 12, "max_model_len": 200, **DRAFTS},
}
RUNS = [(mode, name) for mode in MODES for name in ENGINES]
ARRIVALS = (0.1, 0.3, 1.0)  # how likely a request comes before a step; 1: many at once
SCENARIO = 16  # requests that come so, before another is drawn
WORDS = ["a", "the ", "x = 1\n", "żółw ", "速い", "0" * 30, "aaaa", ", "]


def draw_model(mode: str, generator: random.Random) -> dict:
    """Options of a model."""
    options = {"local_attention_window_len": generator.choice([7, 24, 40, None])}
    if mode != "byte":
        options["max_patch_length"] = generator.choice([None, 5, 20])
    if mode == "entropy":
        options["patcher_config"] = {"sliding_window": generator.choice([5, 16, None])}
        if generator.random() < 0.3:
            options |= {"monotonicity": True, "patching_threshold": 0.02}
    if generator.random() < 0.5:
        options = {**SHAPES["heads"], **options}
    return options


def draw_prompt(generator: random.Random) -> list[int]:
    kind = generator.random()
    if kind < 0.1:
        return [1]
    if kind < 0.3:  # any ids but padding, which `generate` would take out
        return [1, *(generator.randrange(1, 260) for _ in range(generator.randrange(1, 200)))]
    return encode("".join(generator.choices(WORDS, k=generator.randrange(0, 30))))


def tight_memory(folder: str, options: dict) -> int:
    """Memory that a few requests fill when they start, so that one of them is put off as soon as another grows.

    vLLM asks for what one request of the greatest length needs, so that many start.
    """
    values = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    plan = MemoryPlan.of(EngineArgs(model=folder, **values, **options).create_engine_config())
    short = long = 1  # page of state
    for name, shape in plan.stacks.items():
        short += 1
        if shape.window is None:
            long += -(-options["max_model_len"] // (plan.slots[name] * plan.bytes_per_slot))
        else:  # bytes that are seen and bytes of one step, and a page that they begin in the middle of
            held = min(options["max_model_len"], shape.window - 1 + options["max_num_batched_tokens"])
            long += -(-held // plan.slots[name]) + 1
    pages = -(-long // short) * short + 1  # vLLM keeps one
    return pages * plan.page_size


def serve(llm, requests: list[tuple[list[int], int]], generator: random.Random) -> list[list[tuple[int, float]]]:
    """Ids and log-probabilities of each request. They come at random steps; where one is cancelled, its count changes."""
    waiting, found, core, cancelled = list(enumerate(requests)), [[]] * len(requests), llm.llm_engine, set()
    rates = [generator.choice(ARRIVALS) for _ in range(0, len(requests) + 1, SCENARIO)]
    while waiting or core.has_unfinished_requests():
        while waiting and (not core.has_unfinished_requests() or generator.random() < rates[len(waiting) // SCENARIO]):
            number, (prompt, count) = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
            core.add_request(str(number), {"prompt_token_ids": prompt}, params)
        for output in core.step():
            number, made = int(output.request_id.split("-")[0]), output.outputs[0]
            found[number] = [(i, step[i].logprob) for i, step in zip(made.token_ids, made.logprobs)]
            if not output.finished and generator.random() < 0.003:
                core.abort_request([str(number)])
                cancelled.add(number)
    for number in cancelled:
        requests[number] = requests[number][0], len(found[number])
    return found


def compare(model, requests: list[tuple[list[int], int]], found: list) -> tuple[int, list[str]]:
    """Compares ids and log-probabilities with those of `generate`: how many texts rounding has decided, and what is wrong.

    `generate` writes many texts at once; one that differs is written again alone, as a batch rounds in its own way.
    """
    ties, failures = 0, []
    for (prompt, count), steps, right in zip(requests, found, expected_texts(model, requests)):
        ids, logprobs = [i for i, _ in steps], torch.tensor([logprob for _, logprob in steps])
        if len(ids) != count:
            failures.append(f"after {prompt} come {len(ids)} bytes; asked for were {count}")
        elif not is_equal(ids, logprobs, right) and not is_equal(ids, logprobs, expected(model, prompt, count)):
            error = find_error(model, prompt, ids, logprobs)
            ties += error is None
            failures += [error] if error else []
    return ties, failures


def is_equal(ids: list[int], logprobs: torch.Tensor, right: tuple[list[int], list[float]]) -> bool:
    return ids == right[0] and is_close(logprobs, torch.tensor(right[1]))


def is_close(logprobs: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(logprobs, right, rtol=0, atol=5e-5)


@torch.no_grad()
def find_error(model, prompt: list[int], ids: list[int], logprobs: torch.Tensor) -> str | None:
    """Says what is wrong in a text that differs.

    None, if two bytes were equally likely, or an entropy was at the threshold, but for rounding, and all else is the
    model's.
    """
    threshold = model.config.patching_threshold
    try:
        for model.config.patching_threshold in (threshold, threshold - 1e-5, threshold + 1e-5):
            rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            right = rows[torch.arange(len(ids)), torch.tensor(ids)]
            if is_close(logprobs, right) and bool((right > rows.max(dim=-1).values - 2e-5).all()):
                return None
    finally:
        model.config.patching_threshold = threshold
    return f"after {prompt} come {ids} with log-probabilities {logprobs.tolist()}, where {right.tolist()} is right"


def run(mode: str, name: str, count: int, seed: int) -> dict:
    """Serves `count` random requests by an engine with a random model.

    Returns:
        what happened, and `failures`: sentences that say what is wrong.
    """
    generator, start = random.Random(f"{seed} {mode} {name}"), time.process_time()
    model = make_model(mode, **draw_model(mode, generator))
    requests = [(draw_prompt(generator), generator.choice([1, 2, 5, 20, 60, 120])) for _ in range(count)]
    options = dict(ENGINES[name])
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        if "preempted" in name:  # by requests that begin short and grow
            requests = [(prompt[:20], max(20, count)) for prompt, count in requests]
            options["kv_cache_memory_bytes"] = tight_memory(folder, options)
        with engine(folder, disable_log_stats=False, **options) as llm:
            found = serve(llm, requests, generator)
            names = ("num_preemptions", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
            preempted, drafted, accepted = (metric(llm, f"vllm:{one}") for one in names)
            split, merged = ragged_of(llm).num_split, ragged_of(llm).num_merged
    model.config.max_patch_length = largest_patch(model.config)  # as the engine has split patches
    ties, failures = compare(model, requests, found)
    if ties > count // 50:
        failures.append(f"rounding has decided {ties} of {count} texts, which are too many to be chance")
    if merged:
        failures.append(f"{merged} patches were merged, in memory for all")
    if count > 20:  # else what is named may not happen
        if (preempted > 0) != ("preempted" in name):
            failures.append(f"{preempted} requests were put off")
        if not (0 < accepted < drafted if "drafts" in name else drafted == 0):
            failures.append(f"{accepted} of {drafted} drafts were accepted")
    return {
        "rule": mode,
        "engine": name,
        "cases": count,
        "failures": failures,
        "bytes": sum(map(len, found)),
        "preemptions": preempted,
        "drafts": drafted,
        "accepted drafts": accepted,
        "split patches": split,
        "decided by rounding": ties,
        "processor seconds": round(time.process_time() - start, 1),
    }


def commit() -> str:
    """The commit of this checkout, with a mark if the code that runs here was changed after it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "integrations/vllm/blt_hf_vllm", "integrations/vllm/tests")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def start_summary(output: Path, cases: int, seed: int) -> dict:
    """What the file of results says so far.

    Raises:
        ValueError: it is of other code, another version or other cases.
    """
    summary = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "seed": seed,
        "asked": cases,
        "cases": 0,
        "failures": 0,
        "runs": [],
    }
    if not output.exists():
        return summary
    found = json.loads(output.read_text())
    for name in ("vllm", "torch", "transformers", "commit", "seed", "asked"):
        if found.get(name) != summary[name]:
            raise ValueError(
                f"`output` must be a new file or one of the same code and cases; got {output}, whose {name} is "
                f"{found.get(name)!r}, where this is {summary[name]!r}. Remove it to begin anew."
            )
    return found


def fuzz(output: Path, cases: int, seed: int) -> dict:
    """Runs what `output` does not have yet, and writes it after each run, whole."""
    summary = start_summary(output, cases, seed)
    done = {(one["rule"], one["engine"]) for one in summary["runs"]}
    for number, (mode, name) in enumerate(RUNS):
        count = cases // len(RUNS) + (number < cases % len(RUNS))
        if count and (mode, name) not in done:
            summary["runs"].append(run(mode, name, count, seed))
            print(json.dumps(summary["runs"][-1]), flush=True)
            for total in ("cases", "failures"):
                values = (one[total] for one in summary["runs"])
                summary[total] = sum(len(value) if total == "failures" else value for value in values)
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_suffix(".tmp")
            temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
            os.replace(temporary, output)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    results = ROOT / "integrations" / "vllm" / "results"
    parser.add_argument("--output", type=Path, default=results / f"fuzz-{vllm.__version__}.json")
    arguments = parser.parse_args()
    summary = fuzz(arguments.output, arguments.cases, arguments.seed)
    print(f"vLLM {summary['vllm']}: {summary['cases']} cases, {summary['failures']} failures")
    sys.exit(summary["failures"] > 0)


if __name__ == "__main__":
    main()
