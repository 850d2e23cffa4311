"""`transformers serve` and `transformers chat`: one server, started from the shell, and its clients.

The server knows this package by the code beside the weights alone (`--trust-remote-code`).
"""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pexpect
import pytest

from helpers.clients import ANSWERS, ask, chatter_folder, client_environment, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with served(folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", timeout=100)


def test_the_class_that_answers(client, folder):
    """The code beside the weights, and not the in-tree class, which cannot decode with a cache."""
    assert ask(client, "count").choices[0].message.content == ANSWERS["count"]
    assert "transformers/models/blt" not in (folder / "serve.log").read_text()


def test_chat(client):
    answer = ask(client, "greet")
    assert answer.choices[0].message.content == ANSWERS["greet"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(ANSWERS["greet"].encode()) + 1  # bytes, and the end
    cut = ask(client, "count", max_tokens=5)
    assert cut.choices[0].message.content == ANSWERS["count"][:5] and cut.choices[0].finish_reason == "length"


def test_conversation_of_several_turns(client):
    """Earlier turns are part of the prompt: the template puts an end after each answer."""
    messages = [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": ANSWERS["count"]},
        {"role": "user", "content": "count"},
    ]
    answer = client.chat.completions.create(model=chatter_folder(), messages=messages, max_tokens=8)
    before = f"user: count\n\nassistant: {ANSWERS['count']}"
    expected = 1 + len(before) + 1 + len("\n\nuser: count\n\nassistant: ")  # a start, and an end after the answer
    assert answer.usage.prompt_tokens == expected


def test_streams_whole_characters(client):
    """A character of several bytes comes as one piece."""
    chunks = list(ask(client, "greet", stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == ANSWERS["greet"]
    assert len(pieces) == len(ANSWERS["greet"]) and "速" in pieces
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["速い", ["x", "速い"]])
def test_stop_strings(client, stop):
    """As in `generate`, the text ends with the string that stopped it."""
    answer = ask(client, "greet", stop=stop)
    assert answer.choices[0].message.content == "Grüße! 速い"
    assert answer.choices[0].finish_reason == "stop"


def test_tools_are_told_to_the_model(client):
    """They stand in the prompt; a model that was not trained to call them answers as it can."""
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    plain, told = ask(client, "count", max_tokens=4), ask(client, "count", max_tokens=4, tools=tools)
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + len("look_up")
    assert told.choices[0].message.tool_calls is None


def test_completions(client):
    arguments = {"model": chatter_folder(), "prompt": "user: greet\n\nassistant: ", "max_tokens": 60}
    assert client.completions.create(**arguments).choices[0].text == ANSWERS["greet"]
    chunks = client.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWERS["greet"]


def test_responses(client):
    """The server streams unless it is told not to, so a client that wants one answer says `stream=False`."""
    arguments = {"model": chatter_folder(), "input": "greet", "max_output_tokens": 60}
    assert client.responses.create(**arguments, stream=False).output_text == ANSWERS["greet"]
    events = list(client.responses.create(**arguments, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWERS["greet"] and events[-1].type == "response.completed"


def test_two_at_once(client):
    """Four questions by two clients at the same time: each gets its answer, whole."""
    barrier = threading.Barrier(2)

    def talk(number: int) -> list[str]:
        barrier.wait(30)
        questions = list(ANSWERS)[:: 1 if number else -1]
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, questions[0], stream=True))
        return [questions[0], streamed, questions[1], ask(client, questions[1]).choices[0].message.content]

    with ThreadPoolExecutor(2) as pool:
        for first, streamed, second, whole in pool.map(talk, range(2)):
            assert (streamed, whole) == (ANSWERS[first], ANSWERS[second])


def test_lists_models(client):
    """What is in the Hub's cache; a model that was given as a folder is not, or is listed because it is loaded (5.24)."""
    assert {model.id for model in client.models.list()} <= {chatter_folder()}


def test_another_model_is_refused(client):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="nobody/nothing", messages=[{"role": "user", "content": "greet"}])


def test_transformers_chat(url, folder):
    """The terminal program, at a terminal: a question, a setting, another question, goodbye.

    `HF_HUB_OFFLINE` is not set for it: the Hub's client, which it uses, would refuse to speak to any server.
    """
    environment = {**client_environment(folder), "TERM": "dumb"}
    environment.pop("HF_HUB_OFFLINE")
    program = pexpect.spawn(
        str(Path(sys.executable).with_name("transformers")),
        ["chat", chatter_folder(), url, "do_sample=False", "max_new_tokens=60", "--user", "ada"],
        env=environment,
        cwd=folder,
        encoding="utf-8",
        timeout=150,
        dimensions=(50, 160),
    )
    try:
        program.expect_exact("<ada>:")
        program.sendline("greet")
        program.expect_exact(ANSWERS["greet"])
        program.expect_exact("<ada>:")
        program.sendline("!set max_new_tokens=7")
        program.expect_exact("<ada>:")
        program.sendline("count")
        program.expect_exact(ANSWERS["count"][:7])
        program.expect_exact("token limit")
        program.sendline("n")
        program.expect_exact("<ada>:")
        program.sendline("!exit")
        program.expect(pexpect.EOF)
    finally:
        program.close()
    assert program.exitstatus == 0
