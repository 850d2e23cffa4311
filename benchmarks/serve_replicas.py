"""Replicas behind one address (examples/serve_ray.py): the same load on one, and on two of them.

    python benchmarks/serve_replicas.py --replicas 1 2 | tail -1 > benchmarks/results/serve_replicas.json

in the environment of `make test-vllm`, on a machine that does nothing else: each replica has a core, and the client and
Ray's own processes run beside them.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count


os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import openai
from common import report
from serve import ROOT, make_requests


sys.path.insert(0, str(ROOT / "examples"))
# What replicas import, in processes that know nothing of this one.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples")])

import ray
import serve_ray
from ray import serve


@dataclass
class Answer:
    """A text, when it was asked for and when it was there, and how many bytes it has."""

    text: str
    start: float
    end: float
    count: int

    def within(self, first: float, last: float) -> float:
        """Bytes of it in a time, as if they had come evenly."""
        return self.count * max(0.0, min(self.end, last) - max(self.start, first)) / (self.end - self.start)


def load(address: str, requests: list, clients: int, warm_up: float, seconds: float) -> tuple[float, dict[int, str]]:
    """Bytes a second under a load of `clients` that ask again and again, after a while to warm up, and the texts."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    model, numbers = client.models.list().data[0].id, count()
    first = time.perf_counter() + warm_up
    last, answers = first + seconds, {}

    def ask_again_and_again(_) -> None:
        while (start := time.perf_counter()) < last:
            number = next(numbers)
            prompt, length = requests[number % len(requests)]
            found = client.completions.create(model=model, prompt=prompt, max_tokens=length, temperature=0)
            answers[number] = Answer(found.choices[0].text, start, time.perf_counter(), found.usage.completion_tokens)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask_again_and_again, range(clients)))
    made = sum(answer.within(first, last) for answer in answers.values())
    return made / seconds, {number % len(requests): answer.text for number, answer in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "blt-5m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=32, help="that a replica runs at once")
    parser.add_argument("--clients", type=int, default=64, help="each asks again when it has its answer")
    parser.add_argument("--longest", type=int, default=400, help="bytes that a request gets at most")
    parser.add_argument("--warm-up", type=float, default=8, help="seconds of load before those that count")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="says in the result that other processes ran as well")
    arguments = parser.parse_args()
    requests = make_requests(64, 20, arguments.longest)
    rates, texts = {number: [] for number in arguments.replicas}, {}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        for _ in range(arguments.repeats):
            for number in arguments.replicas:
                options = {
                    "model": arguments.model,
                    "least": number,
                    "most": number,
                    "cpus": 1,
                    "max_rows": arguments.rows,
                }
                options["max_requests"] = arguments.clients
                address = serve_ray.start(options, serve_ray.free_port())
                rate, found = load(address, requests, arguments.clients, arguments.warm_up, arguments.seconds)
                serve.shutdown()
                if any(texts.setdefault(name, text) != text for name, text in found.items()):
                    raise SystemExit(f"{number} replicas write other texts: no timing from a wrong result")
                rates[number].append(rate)
                print(f"{number} replicas: {rates[number][-1]:.0f} bytes/s", file=sys.stderr, flush=True)
    finally:
        ray.shutdown()
    first = arguments.replicas[0]
    rows = [
        {
            "name": f"{number} replica" + "s" * (number > 1),
            "bytes/s": statistics.median(found),
            f"to {first}": statistics.median(own / peer for own, peer in zip(found, rates[first])),
            "least and most": f"{min(found):.0f} to {max(found):.0f}",
            "runs": len(found),
        }
        for number, found in rates.items()
    ]
    report("serve_replicas: the same load on several replicas", rows, arguments, ray=ray.__version__)


if __name__ == "__main__":
    main()
