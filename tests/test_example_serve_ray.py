"""`examples/serve_ray.py`: two replicas behind one address, one of which is killed under load.

`make test-vllm` installs Ray, which the other tests do without.
"""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("ray", reason="Ray is not installed")
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "pretrained" / "blt-5m"
PROMPTS = ["The import statement ", "Das Paket ", "dog (noun): ", "A list "]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    # What replicas import, in processes that know nothing of this one.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT / "src", ROOT / "examples"]))
    sys.path.insert(0, str(ROOT / "examples"))
    import ray
    import serve_ray
    from ray import serve

    try:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield serve_ray.start({"model": str(MODEL), "least": 2, "most": 2, "cpus": 1}, serve_ray.free_port())
    finally:
        sys.path.pop(0)
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
@torch.no_grad()
def expected() -> dict[str, str]:
    """What `generate` makes of each prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=100, do_sample=False)
        texts[prompt] = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return texts


def replicas(address: str) -> set[int]:
    """The processes that answer."""
    answers = (httpx.get(f"{address}/replica", timeout=60) for _ in range(16))
    return {answer.json()["pid"] for answer in answers if answer.status_code == 200}


def ask(client: openai.OpenAI, number: int) -> str:
    prompt = PROMPTS[number % len(PROMPTS)]
    options = {"model": "blt-5m", "prompt": prompt, "max_tokens": 100, "temperature": 0}
    if number % 2:
        return client.completions.create(**options).choices[0].text
    stream = client.completions.create(**options, stream=True)
    chunks = list(stream)
    if not chunks or chunks[-1].choices[0].finish_reason is None:
        raise openai.APIError("the stream broke off", stream.response.request, body=None)
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_texts_are_those_of_generate_on_both_replicas(address, client, expected):
    assert len(replicas(address)) == 2
    with ThreadPoolExecutor(12) as pool:
        for number, text in enumerate(pool.map(lambda number: ask(client, number), range(12))):
            assert text == expected[PROMPTS[number % len(PROMPTS)]]


def test_a_replica_is_killed_under_load(address, client, expected):
    """What ran on it fails, with an error; all else is answered, then and later, and another replica takes its place."""
    pids = replicas(address)
    killed = pids.pop()

    def one(number: int) -> str | Exception:
        time.sleep(0.02 * number)
        try:
            return ask(client, number)
        except (openai.APIError, httpx.HTTPError) as error:
            return error

    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(one, number) for number in range(24)]
        time.sleep(1.0)
        os.kill(killed, signal.SIGKILL)
        found = [future.result(timeout=200) for future in waiting]
    failed = [answer for answer in found if isinstance(answer, Exception)]
    for number, answer in enumerate(found):
        assert isinstance(answer, Exception) or answer == expected[PROMPTS[number % len(PROMPTS)]]
    assert len(failed) < 24 * 3 // 4
    for number in range(4):
        assert ask(client, number) == expected[PROMPTS[number % len(PROMPTS)]]
    for _ in range(60):
        if len(replicas(address) - {killed}) == 2:
            return
        time.sleep(1)
    raise AssertionError("no replica took the place of the one that was killed")
