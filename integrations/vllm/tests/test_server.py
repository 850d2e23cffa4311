"""vLLM's own server, as its users start it, and OpenAI's client."""

import os
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from conftest import encode, expected


@pytest.mark.server
def test_server(saved, tmp_path):
    model, folder = saved("entropy", patching_threshold=100.0)  # long patches, which are split and counted
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "metrics").mkdir()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "tiny", "--host", "127.0.0.1"]
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        options = {"model": "tiny", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        answer = client.completions.create(prompt=encode("to be"), temperature=0, logprobs=0, **options)
        model.config.max_patch_length = 24
        ids, logprobs = expected(model, encode("to be"), 40)
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        stream = client.completions.create(prompt=encode("to be"), temperature=0, stream=True, **options)
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
        sampled = [client.completions.create(prompt="x", temperature=1, seed=3, **options) for _ in range(2)]
        assert sampled[0].choices[0].text == sampled[1].choices[0].text
        metrics = httpx.get(f"{url}/metrics").text
        line = next(line for line in metrics.splitlines() if line.startswith("blt_hf_split_patches_total"))
        assert float(line.split()[-1]) > 0
        assert "A patch reached `max_patch` bytes" in (tmp_path / "log").read_text()
    finally:
        server.terminate()
        server.wait(timeout=60)
