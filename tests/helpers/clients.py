"""A tiny BLT that has learned a few answers by heart, so that what a client shows can be compared with what it must be."""

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from blt_hf import BltForCausalLM, BltTokenizer
from helpers.models import make_model, tiny_config
from helpers.processes import run


SRC = Path(__file__).parents[2] / "src"
ANSWERS = {"greet": "Grüße! 速い, naïve.", "count": "1 2 3 4 5 6 7 8 9"}
"""What the model says to each message of a user; two words are of several bytes a character."""


def conversation(question: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[question]}]


def learn_by_heart(model: BltForCausalLM, tokenizer: BltTokenizer, max_steps: int = 400) -> None:
    """Trains until every answer is given greedily, with a margin."""
    texts = [tokenizer.apply_chat_template(conversation(question), tokenize=False) for question in ANSWERS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(max_steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.03:
            break
    assert loss < 0.05, f"the answers were not learned: {loss}"
    model.eval()


@functools.cache
def chatter_folder() -> str:
    """Folder of a model that answers; what a person would get from `save_pretrained`, code and tokenizer included."""
    folder = tempfile.mkdtemp(prefix="chatter-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size, global_size = {"hidden_size": 32, "intermediate_size": 64}, {"hidden_size": 64, "intermediate_size": 96}
    parts = {
        "encoder_config": size,
        "decoder_config": {**size, "hidden_size_global": 64},
        "global_config": global_size,
    }
    model, tokenizer = make_model(tiny_config(patching_mode="entropy", **parts), seed=5), BltTokenizer()
    with torch.enable_grad():
        learn_by_heart(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def client_environment(folder: Path, has_package: bool = False) -> dict[str, str]:
    """Variables of a process that somebody starts elsewhere: no Hub, caches in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name != "PYTHONPATH"}
    return {
        **kept,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"PYTHONPATH": str(SRC)} if has_package else {}),
    }


def run_client(command: list, folder: Path, timeout: float = 280, **kwargs) -> subprocess.CompletedProcess:
    """A command of another package, as installed beside this interpreter; it must succeed."""
    command = [str(Path(sys.executable).with_name(command[0])), *map(str, command[1:])]
    result = run(
        command, env=client_environment(folder, **kwargs), cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


@contextmanager
def served(folder: Path, *options: str, has_package: bool = False, model: str | None = None) -> Iterator[str]:
    """`transformers serve` with a model preloaded; its output is in `folder/serve.log`. Gives its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (folder / "hf-home" / "hub").mkdir(parents=True)  # `/v1/models` lists this folder, and fails where there is none
    transformers = Path(sys.executable).with_name("transformers")
    command = [transformers, "serve", model or chatter_folder(), "--trust-remote-code", *options, "--port", str(port)]
    with open(folder / "serve.log", "w") as log:
        environment = client_environment(folder, has_package)
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for(f"http://localhost:{port}/health", process, folder / "serve.log")
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen, log: Path, timeout: float = 200) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise AssertionError(log.read_text()[-4000:])


def ask(client, question: str, model: str | None = None, **kwargs):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model or chatter_folder(), messages=messages, **{"max_tokens": 60, "temperature": 0, **kwargs}
    )
