"""Random arrivals, lengths, preemptions and drafts: every text is the one that the model writes greedily.

`BLT_VLLM_CASES` says how many texts (1,000), shared out among the engines; `BLT_VLLM_SEED` which.
"""

import os
import random

import pytest
import torch
from vllm import SamplingParams

from conftest import MODES, encode, engine, expected


CASES, SEED = int(os.environ.get("BLT_VLLM_CASES", 1000)), int(os.environ.get("BLT_VLLM_SEED", 0))
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ENGINES = {
    "pieces": {"max_num_batched_tokens": 40, "max_num_seqs": 6},
    "preempted": {"max_num_seqs": 12, "async_scheduling": False},
    "drafts": {"speculative_config": DRAFTS, "max_num_batched_tokens": 96, "max_num_seqs": 8},
}
MEMORY = {"byte": 3_900_000, "space": 3_900_000, "static": 2_600_000, "entropy": 5_000_000}  # of one long request
RUNS = [(mode, name) for mode in MODES for name in ENGINES]


def serve(llm, requests: list[tuple[list[int], int]], generator: random.Random) -> list[list[tuple[int, float]]]:
    """Ids and log-probabilities of each request; they come at random steps."""
    waiting, found = list(enumerate(requests)), {}
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and (generator.random() < 0.2 or not llm.llm_engine.has_unfinished_requests()):
            number, (prompt, count) = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        for output in llm.llm_engine.step():
            if output.finished:
                steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
                found[int(output.request_id.split("-")[0])] = [(i, step[i].logprob) for i, step in steps]
    return [found[number] for number in range(len(requests))]


@torch.no_grad()
def check(model, requests: list, found: list) -> None:
    """Each id is the likeliest after those before it, with the model's own log-probability."""
    for (prompt, count), steps in zip(requests, found):
        assert len(steps) == count
        ids = [*prompt, *(i for i, _ in steps)]
        right = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for (token, logprob), row in zip(steps, right):
            assert float(row[token]) > float(row.max()) - 1e-4  # else a tie
            assert abs(float(row[token]) - logprob) < 5e-5


@pytest.mark.fuzz
@pytest.mark.parametrize(("mode", "name"), RUNS)
def test_random_requests(saved, mode, name):
    model, folder = saved(mode, **({"max_patch_length": 20} if mode != "byte" else {}))
    generator = random.Random(f"{SEED} {mode} {name}")
    number = RUNS.index((mode, name))
    count = CASES // len(RUNS) + (number < CASES % len(RUNS))
    words = ["a", "the ", "x = 1\n", "żółw ", "速い", "0" * 30, "aaaa", ", "]
    requests = [
        (encode("".join(generator.choices(words, k=generator.randrange(0, 30)))), generator.choice([1, 5, 20, 60]))
        for _ in range(count)
    ]
    options = dict(ENGINES[name])
    if name == "preempted":
        options["kv_cache_memory_bytes"] = MEMORY[mode]
    with engine(folder, disable_log_stats=False, **options) as llm:
        found = serve(llm, requests, generator)
        if count > 20:
            metrics = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
            if name == "preempted":
                assert metrics["vllm:num_preemptions"] > 0
            if name == "drafts":
                accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
                assert 0 < accepted < metrics["vllm:spec_decode_num_draft_tokens"]
    check(model, requests, found)
    for (prompt, length), steps in list(zip(requests, found))[::10]:  # and by `generate` itself
        ids = expected(model, prompt, length)[0]
        if ids != [i for i, _ in steps]:
            check(model, [(prompt, length)], [steps])  # two of a tie
