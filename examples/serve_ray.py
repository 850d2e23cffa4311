"""Serve a BLT from several processes or machines: replicas behind one address, on Ray Serve.

Each replica is a model with continuous batching. Ray sends requests to replicas that have few, starts more of them when
all are busy, replaces those that die, and speaks OpenAI's protocol to clients. Needs `pip install "ray[serve]"` and the
extra `serve`. Without `--serve` it starts, asks, streams and stops. Takes a minute on two cores.

    python examples/serve_ray.py [--model FOLDER_OR_HUB_ID] [--replicas LEAST MOST] [--port PORT] [--serve]

On a cluster, `serve run serve_ray:app model=... most=8` in this folder.
"""

import argparse
import os
import socket
import time
from pathlib import Path

import ray
from openai import OpenAI
from ray import serve

from blt_hf.serving.server import make_app, serve_folder


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"
web = make_app()


@serve.deployment(health_check_period_s=5)
@serve.ingress(web)
class Replica:
    """One process with one model."""

    def __init__(self, model: str, threads: int, max_rows: int, max_requests: int):
        import torch

        torch.set_num_threads(threads)
        self.server = web.state.server = serve_folder(
            model, name=Path(model).name, max_rows=max_rows, max_requests=max_requests
        )

    def check_health(self) -> None:
        """Ray asks; a replica whose generation thread has died is replaced."""
        self.server.check_health()

    @web.get("/replica")
    async def replica(self) -> dict:
        """Which process this is, and how busy."""
        return {"pid": os.getpid(), "requests": self.server.num_requests}


def app(options: dict):
    """The application with options: `model`, `least` and `most` replicas, `threads`, `max_rows` and `gpus` of each."""
    # Options of `serve run` are texts.
    options = {name: value if name == "model" else float(value) for name, value in options.items()}
    most_requests = int(options.get("max_requests", 64))
    return Replica.options(
        # Above this, Ray keeps requests waiting for a replica; those that find a replica full get the status 429.
        max_ongoing_requests=2 * most_requests,
        ray_actor_options={"num_cpus": options.get("cpus", 1), "num_gpus": options.get("gpus", 0)},
        autoscaling_config={
            "min_replicas": int(options.get("least", 1)),
            "max_replicas": int(options.get("most", 2)),
            "target_ongoing_requests": options.get("target", 16),
            "upscale_delay_s": options.get("delay", 5),
        },
    ).bind(
        options.get("model", str(PRETRAINED)), options.get("threads", 1), options.get("max_rows", 32), most_requests
    )


def start(options: dict, port: int) -> str:
    """Starts the application on this machine; its address."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(options))
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 2), metavar=("LEAST", "MOST"))
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--serve", action="store_true", help="go on until Ctrl-C")
    arguments = parser.parse_args()
    least, most = arguments.replicas
    address = start({"model": arguments.model, "least": least, "most": most}, arguments.port or free_port())
    try:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        name = client.models.list().data[0].id
        print(f"{name} is served at {address}/v1")
        while arguments.serve:
            time.sleep(3600)
        options = {"model": name, "max_tokens": 60, "temperature": 0}
        answer = client.completions.create(prompt="The import statement ", **options)
        print("completion:", repr(answer.choices[0].text))
        stream = client.completions.create(prompt="Das Paket ", stream=True, **options)
        pieces = [part.choices[0].text for part in stream]
        print(f"in {len(pieces)} pieces:", repr("".join(pieces)))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
