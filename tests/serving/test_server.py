"""OpenAI's protocol on continuous batching, spoken by OpenAI's own client."""

import asyncio
import time

import httpx
import openai
import pytest
import torch

from blt_hf import BltTokenizer
from blt_hf.serving.server import QueueFullError, TextServer, make_app
from helpers.models import make_model, tiny_config


pytestmark = pytest.mark.anyio
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def model():
    model = make_model(tiny_config(), seed=4)
    with torch.no_grad():  # texts of letters, so that stop strings are found, and none ends by itself
        model.lm_head.weight[:101] = -model.lm_head.weight[101:202].roll(3, 0) * 3
        model.lm_head.weight[127:] = 0
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = BltTokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def server(model, tokenizer):
    server = TextServer(model, tokenizer, "tiny", max_rows=4, max_requests=6, max_bytes=400)
    yield server
    server.stop()


@pytest.fixture
def client(server):
    transport = httpx.ASGITransport(make_app(server))
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(transport=transport)
    )


@torch.no_grad()
def expected(model, tokenizer, ids: list[int], count: int) -> list[int]:
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0)
    return output[0, len(ids) :].tolist()


async def test_completion(client, model, tokenizer):
    answer = await client.completions.create(model="tiny", prompt="to be", max_tokens=20, temperature=0, logprobs=0)
    ids = expected(model, tokenizer, tokenizer("to be").input_ids, 20)
    assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 20)
    whole = [*tokenizer("to be").input_ids, *ids]
    right = model(torch.tensor([whole])).logits[0, 5:-1].log_softmax(-1)
    found = answer.choices[0].logprobs.token_logprobs
    assert found == pytest.approx([float(row[i]) for row, i in zip(right, ids)], abs=1e-4)


async def test_a_stream_is_the_same_text(client):
    options = {"model": "tiny", "prompt": "or not", "max_tokens": 30, "temperature": 0}
    whole = (await client.completions.create(**options)).choices[0].text
    stream = await client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    assert chunks[-2].choices[0].finish_reason == "length" and len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == 30


async def test_chat(client, model, tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True}
    answer = await client.chat.completions.create(**options)
    ids = tokenizer("user: hi\nassistant:", add_special_tokens=False).input_ids
    text = tokenizer.decode(expected(model, tokenizer, ids, 12), skip_special_tokens=True)
    assert answer.choices[0].message.content == text
    assert len(answer.choices[0].logprobs.content) == 12
    stream = await client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0].delta.content async for chunk in stream]
    assert "".join(pieces) == text


async def test_seeds_and_neighbours(client):
    """A seed repeats a sample, whoever runs beside it."""

    async def sampled(seed: int) -> str:
        answer = await client.completions.create(model="tiny", prompt="x", max_tokens=24, temperature=1, seed=seed)
        return answer.choices[0].text

    alone = await sampled(1)
    together = await asyncio.gather(*(sampled(seed) for seed in (1, 2, 1)))
    assert together[0] == together[2] == alone != together[1]


async def test_stop_strings(client):
    options = {"model": "tiny", "prompt": "stop", "max_tokens": 40, "temperature": 0}
    text = (await client.completions.create(**options)).choices[0].text
    stop = text[3:5]
    answer = await client.completions.create(**options, stop=[stop, "never there"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 6


async def test_models_and_health(client, server):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    transport = httpx.ASGITransport(make_app(server))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
        assert (await web.get("/health")).status_code == 200
        server._manager._batch.step = lambda: 1 / 0  # the thread dies of it
        with pytest.raises(openai.InternalServerError, match="division by zero"):
            await client.completions.create(model="tiny", prompt="a", max_tokens=4)
        for _ in range(100):
            if not server._manager.is_running():
                break
            await asyncio.sleep(0.05)
        response = await web.get("/health")
        assert response.status_code == 503 and "division by zero" in response.text
    with pytest.raises(RuntimeError, match="dead"):
        server.check_health()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 2}, "n"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"extra_body": {"wishes": 3}}, "wishes"),
        ({"max_tokens": 1000}, "max_tokens=1000"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [5, 900]}, "input_ids"),
        ({"prompt": []}, "input_ids"),
        ({"logprobs": 4}, "logprobs"),
    ],
    ids=str,
)
async def test_what_cannot_be_is_refused(client, options, named):
    with pytest.raises(openai.BadRequestError, match=named):
        await client.completions.create(**{"model": "tiny", "prompt": "a", **options})
    assert (await client.completions.create(model="tiny", prompt="a", max_tokens=2)).choices[0].text is not None


async def test_too_many_requests(client, server):
    async def one():
        return await client.completions.create(model="tiny", prompt="a", max_tokens=60, temperature=0)

    found = await asyncio.gather(*(one() for _ in range(10)), return_exceptions=True)
    refused = [error for error in found if isinstance(error, openai.RateLimitError)]
    assert len(refused) == 4 and len({a.choices[0].text for a in found if a not in refused}) == 1
    assert server.num_requests == 0


async def test_who_leaves_is_taken_out(server):
    """The row is free again, and nothing more is made for it."""
    step, steps = server._manager._batch.step, []

    def slow_step():
        steps.append(time.sleep(0.02))
        return step()

    server._manager._batch.step = slow_step
    pieces = server.answer([1, 100], 300)
    await anext(pieces)
    assert server.num_requests == 1
    await pieces.aclose()
    for _ in range(100):
        if server._manager._batch.is_idle:
            break
        await asyncio.sleep(0.05)
    assert server._manager._batch.is_idle and server.num_requests == 0
    assert 0 < len(steps) < 300  # the text did not end by itself
    with pytest.raises(QueueFullError):
        server.max_requests = 0
        await anext(server.answer([1], 2))
