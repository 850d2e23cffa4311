"""`examples/serve_ray.py`: two replicas behind one address, one of which is killed under load, and one that gets company.

`make test-vllm` installs Ray, which the other tests do without.
"""

import os
import signal
import sys
import threading
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
def example():
    """The example, as a module."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"  # 10 by default
    # What replicas import, in processes that know nothing of this one.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT / "src", ROOT / "examples"]))
    sys.path.insert(0, str(ROOT / "examples"))
    import serve_ray

    yield serve_ray
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def address(example):
    import ray
    from ray import serve

    try:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield example.start({"model": str(MODEL), "least": 2, "most": 2, "cpus": 1}, example.free_port())
    finally:
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


def test_models_chats_usage_and_log_probabilities_come_through(address, client, expected):
    assert [model.id for model in client.models.list()] == ["blt-5m"]
    assert httpx.get(f"{address}/health", timeout=60).status_code == 200
    options = {"model": "blt-5m", "prompt": PROMPTS[0], "max_tokens": 12}
    answer = client.completions.create(**options, temperature=0, logprobs=0)
    assert expected[PROMPTS[0]].startswith(answer.choices[0].text)
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == 1 + len(PROMPTS[0])
    seeded = [client.completions.create(**options, temperature=1, seed=5).choices[0].text for _ in range(4)]
    assert len(set(seeded)) == 1
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 12
    stop = expected[PROMPTS[0]][5:8]
    found = client.completions.create(**{**options, "max_tokens": 100}, temperature=0, stop=stop).choices[0].text
    assert found == expected[PROMPTS[0]].partition(stop)[0]
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(**options, presence_penalty=1)


def test_who_leaves_is_taken_out(address, client):
    stream = client.completions.create(model="blt-5m", prompt="A list ", max_tokens=3000, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(60):
        busy = [httpx.get(f"{address}/replica", timeout=60).json()["requests"] for _ in range(8)]
        if not any(busy):
            return
        time.sleep(0.5)
    raise AssertionError(f"requests still run: {busy}")


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


def test_options_say_how_many_replicas_there_may_be(example):
    deployment = example.app({"least": "1", "most": "3", "target": "4", "delay": "2", "max_requests": "10"})
    config = deployment._bound_deployment._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 4)
    assert scaling.upscale_delay_s == 2 and config.max_ongoing_requests == 20


def test_replicas_are_added_under_load(example, address, client, expected):
    """And no more than allowed; a replica that has as many requests as it takes says so. The last test: it starts anew."""
    from ray import serve

    serve.delete("default")
    options = {"model": str(MODEL), "least": 1, "most": 2, "target": 1, "delay": 0.5, "max_requests": 3}
    assert example.start(options, int(address.rpartition(":")[2])) == address
    assert len(replicas(address)) == 1
    is_done, refused = threading.Event(), []

    def ask_again_and_again(number: int) -> None:
        while not is_done.is_set():
            try:
                assert ask(client, number) == expected[PROMPTS[number % len(PROMPTS)]]
            except openai.RateLimitError as error:
                refused.append(error)
                time.sleep(0.2)

    found = set()
    with ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask_again_and_again, number) for number in range(5)]
        try:
            for _ in range(200):
                found |= replicas(address)
                if len(found) > 1:
                    break
                time.sleep(1)
        finally:
            is_done.set()
        for future in asking:
            future.result(timeout=200)
    assert len(found) == 2
    assert refused and all(error.status_code == 429 for error in refused)
    assert replicas(address) <= found
