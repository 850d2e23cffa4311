"""Replicas behind one address (examples/serve_ray.py): the same requests to one, and to two of them.

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


def answers_of(address: str, requests: list[tuple[list[int], int]]) -> tuple[list[tuple[str, int]], float]:
    """Texts and how many bytes each has, and the seconds until the last was there; all are asked for at once."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    model = client.models.list().data[0].id

    def ask(request: tuple[list[int], int]) -> tuple[str, int]:
        prompt, count = request
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=count, temperature=0)
        return answer.choices[0].text, answer.usage.completion_tokens

    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.perf_counter()
        return list(pool.map(ask, requests)), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "blt-5m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=32, help="that a replica runs at once")
    parser.add_argument("--requests", type=int, default=160, help="enough to keep all replicas busy")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="says in the result that other processes ran as well")
    arguments = parser.parse_args()
    requests = make_requests(arguments.requests, 20, 400)
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
                options["max_requests"] = arguments.requests
                address = serve_ray.start(options, serve_ray.free_port())
                answers_of(address, [(requests[0][0], 8)] * 16)  # the warm-up
                answers, seconds = answers_of(address, requests)
                serve.shutdown()
                if texts.setdefault("first", [text for text, _ in answers]) != [text for text, _ in answers]:
                    raise SystemExit(f"{number} replicas write other texts: no timing from a wrong result")
                rates[number].append(sum(count for _, count in answers) / seconds)
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
    report("serve_replicas: the same requests to several replicas", rows, arguments, ray=ray.__version__)


if __name__ == "__main__":
    main()
