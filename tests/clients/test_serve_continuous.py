"""`transformers serve --continuous-batching` and its clients: many at once, one that cancels, one that goes away.

The package is installed where the server runs, and nobody imports it.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from helpers.clients import ANSWERS, ask, chatter_folder, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve-continuous")


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with served(folder, "--continuous-batching", has_package=True) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", timeout=200)


def test_it_is_continuous_batching(client, folder):
    assert ask(client, "count").choices[0].message.content == ANSWERS["count"]
    log = (folder / "serve.log").read_text()
    assert "does not support continuous batching" not in log and "Traceback" not in log


def test_thirty_two_at_once(client):
    """Requests of both kinds, streamed and not, of several lengths: each gets its own answer."""

    def one(number: int) -> tuple[str, str]:
        question = ("greet", "count")[number % 2]
        # A cut in the middle of a character would show as a replacement character; `count` is plain ascii.
        length = 60 if number % 4 < 2 or question == "greet" else 3 + number // 4
        if number % 3:
            text = ask(client, question, max_tokens=length).choices[0].message.content
        else:
            chunks = ask(client, question, max_tokens=length, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return text, ANSWERS[question] if length == 60 else ANSWERS[question][:length]

    with ThreadPoolExecutor(32) as pool:
        for text, expected in pool.map(one, range(32)):
            assert text == expected


def test_completions_and_responses(client):
    arguments = {"model": chatter_folder(), "prompt": "user: greet\n\nassistant: ", "max_tokens": 60}
    assert client.completions.create(**arguments).choices[0].text == ANSWERS["greet"]
    response = client.responses.create(model=chatter_folder(), input="greet", max_output_tokens=60, stream=False)
    assert response.output_text == ANSWERS["greet"]


def test_a_client_that_goes_away_leaves_the_others(client, url):
    """A stream that is closed after its first piece, and a connection that is cut: both requests leave the batch."""
    stream = ask(client, "greet", stream=True, max_tokens=5000)
    next(iter(stream))
    stream.close()

    def cut():
        body = {"model": chatter_folder(), "messages": [{"role": "user", "content": "greet"}], "max_tokens": 5000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/chat/completions", json={**body, "stream": False}, timeout=httpx.Timeout(10, read=0.05))

    thread = threading.Thread(target=cut)
    thread.start()
    started = time.monotonic()
    assert ask(client, "count").choices[0].message.content == ANSWERS["count"]
    thread.join()
    assert time.monotonic() - started < 100
