"""Random models, arrivals, lengths, preemptions, drafts and cancellations: every text is what `generate` writes.

`BLT_VLLM_CASES` says how many texts (1,000), shared out among the engines; `BLT_VLLM_SEED` which. With `-rP`, pytest
prints what happened in each engine.
"""

import os
import random

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from blt_hf.serving.ragged import largest_patch
from blt_hf_vllm.settings import MemoryPlan
from conftest import MODES, SHAPES, encode, engine, expected, metric, ragged_of


CASES, SEED = int(os.environ.get("BLT_VLLM_CASES", 1000)), int(os.environ.get("BLT_VLLM_SEED", 0))
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
    while waiting or core.has_unfinished_requests():
        while waiting and (generator.random() < 0.2 or not core.has_unfinished_requests()):
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


def check(model, requests: list, found: list) -> int:
    """Compares ids and log-probabilities with those of `generate`; returns how many texts rounding has decided."""
    ties = 0
    for (prompt, count), steps in zip(requests, found):
        ids, logprobs = [i for i, _ in steps], torch.tensor([logprob for _, logprob in steps])
        assert len(ids) == count
        right, right_logprobs = expected(model, prompt, count) if count else ([], [])
        if ids != right or not is_close(logprobs, torch.tensor(right_logprobs)):
            ties += 1
            check_tie(model, prompt, ids, logprobs)
    return ties


def is_close(logprobs: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(logprobs, right, rtol=0, atol=5e-5)


@torch.no_grad()
def check_tie(model, prompt: list[int], ids: list[int], logprobs: torch.Tensor) -> None:
    """Two bytes were equally likely, or an entropy at the threshold, but for rounding; all else is the model's."""
    threshold = model.config.patching_threshold
    try:
        for model.config.patching_threshold in (threshold, threshold - 1e-5, threshold + 1e-5):
            rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            right = rows[torch.arange(len(ids)), torch.tensor(ids)]
            if is_close(logprobs, right) and bool((right > rows.max(dim=-1).values - 2e-5).all()):
                return
    finally:
        model.config.patching_threshold = threshold
    raise AssertionError(
        f"after {prompt} come {ids} with log-probabilities {logprobs.tolist()}, where {right.tolist()} is right"
    )


@pytest.mark.fuzz
@pytest.mark.parametrize(("mode", "name"), RUNS)
def test_random_requests(saved, mode, name):
    generator = random.Random(f"{SEED} {mode} {name}")
    model, folder = saved(mode, **draw_model(mode, generator))
    model.config.max_patch_length = largest_patch(model.config)  # as an engine splits patches
    number = RUNS.index((mode, name))
    count = CASES // len(RUNS) + (number < CASES % len(RUNS))
    requests = [(draw_prompt(generator), generator.choice([1, 2, 5, 20, 60, 120])) for _ in range(count)]
    options = dict(ENGINES[name])
    if "preempted" in name:  # by requests that begin short and grow
        requests = [(prompt[:20], max(20, count)) for prompt, count in requests]
        options["kv_cache_memory_bytes"] = tight_memory(folder, options)
    with engine(folder, disable_log_stats=False, **options) as llm:
        found = serve(llm, requests, generator)
        names = ("num_preemptions", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
        preempted, drafted, accepted = (metric(llm, f"vllm:{one}") for one in names)
        split, merged = ragged_of(llm).num_split, ragged_of(llm).num_merged
    ties = check(model, requests, found)
    print(
        f"{mode} {name}: {count} texts, {sum(map(len, found))} bytes, {preempted} preemptions, {accepted} of {drafted} "
        f"drafts accepted, {split} patches split, {merged} merged, {ties} texts decided by rounding"
    )
    assert ties <= count // 50 and merged == 0
    if count > 20:
        assert (preempted > 0) == ("preempted" in name)
        assert 0 < accepted < drafted if "drafts" in name else drafted == 0
