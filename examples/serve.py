"""Serve a BLT to every program that speaks OpenAI's protocol: starts `transformers serve`, asks it, and stops it.

Shows the server's command, a plain completion, and a chat that streams. Takes half a minute on two cores.

    python examples/serve.py [--model FOLDER_OR_HUB_ID] [--port PORT]
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, address: str, seconds: float = 240) -> None:
    for _ in range(int(2 * seconds)):
        if server.poll() is not None:
            raise SystemExit(f"The server stopped with code {server.returncode}.")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"The server was not ready after {seconds:.0f} seconds.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--max-bytes", type=int, default=80, help="of each answer")
    arguments = parser.parse_args()
    port = arguments.port or free_port()
    address = f"http://127.0.0.1:{port}"

    # `save_pretrained` puts the code beside the weights, so that a server without this package can load them.
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_pretrained(arguments.model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
    command = ["serve", folder, "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    print("$ transformers", *command)
    server = subprocess.Popen([Path(sys.executable).with_name("transformers"), *command])
    try:
        wait_until_ready(server, address)
        client = OpenAI(base_url=f"{address}/v1", api_key="none")

        answer = client.completions.create(
            model=folder, prompt="The import statement ", max_tokens=arguments.max_bytes, temperature=0
        )
        print("completion:", repr(answer.choices[0].text))

        # The bundled model was not trained on chats; this shows how the bytes arrive.
        stream = client.chat.completions.create(
            model=folder,
            messages=[{"role": "user", "content": "What is a byte?"}],
            max_tokens=arguments.max_bytes,
            temperature=0,
            stream=True,
        )
        pieces = [part.choices[0].delta.content for part in stream if part.choices and part.choices[0].delta.content]
        print(f"chat, in {len(pieces)} pieces:", repr("".join(pieces)))
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
