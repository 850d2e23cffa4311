"""Continuous batching against padded batches and one request after another: the same requests, the same texts.

python benchmarks/serve.py                      # 64 requests of 20 to 400 bytes on the model of this repository
python benchmarks/serve.py --shape mid          # the same on a random model
"""

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import Contestant, add_arguments, build_blt, interleave, report, set_up
from transformers import ContinuousBatchingConfig, GenerationConfig

from blt_hf import BltForCausalLM, BltTokenizer


ROOT = Path(__file__).parent.parent


def make_requests(count: int, shortest: int, longest: int) -> list[tuple[list[int], int]]:
    """Prompts of English prose, and how many bytes each is to get."""
    rng, names = random.Random(0), sorted(topics)
    tokenizer = BltTokenizer()
    return [
        (tokenizer(topics[names[i % len(names)]][: rng.randint(20, 200)]).input_ids, rng.randint(shortest, longest))
        for i in range(count)
    ]


def one_by_one(model, requests, settings) -> list[list[int]]:
    return [_continuations(model, [request], settings)[0] for request in requests]


def padded(model, requests, settings, rows: int) -> list[list[int]]:
    """Batches in the order of arrival, padded on the left; a batch runs until its longest row is done."""
    batches = [requests[start : start + rows] for start in range(0, len(requests), rows)]
    return [ids for batch in batches for ids in _continuations(model, batch, settings)]


def _continuations(model, batch, settings) -> list[list[int]]:
    width, new_bytes = max(len(ids) for ids, _ in batch), max(count for _, count in batch)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=model.device)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new_bytes, eos_token_id=[], **settings)
    return [row[width : width + count].tolist() for row, (_, count) in zip(output, batch)]


def continuous(model, requests, config: GenerationConfig, rows: int) -> list[list[int]]:
    manager = model.init_continuous_batching(config, ContinuousBatchingConfig(max_requests_per_batch=rows))
    manager.start()
    for index, (ids, count) in enumerate(requests):
        manager.add_request(ids, request_id=str(index), max_new_tokens=count, eos_token_id=-1)
    texts = {}
    for output in manager:
        if output.error:
            raise SystemExit(output.error)
        texts[int(output.request_id)] = output.generated_tokens
        if len(texts) == len(requests):
            break
    manager.stop()
    return [texts[index] for index in range(len(requests))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(shape=None)
    parser.add_argument("--model", default="pretrained/blt-5m", help="used where no --shape is given")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=20)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    set_up(arguments)
    if arguments.shape is None:
        local = ROOT / arguments.model
        model = BltForCausalLM.from_pretrained(local if local.is_dir() else arguments.model)
        model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    else:
        model = build_blt(arguments.shape, arguments.patch_bytes, arguments.device, arguments.dtype)
    requests = make_requests(arguments.requests, arguments.shortest, arguments.longest)
    settings = {"do_sample": False}
    config = GenerationConfig(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ways = {"one after another": lambda: one_by_one(model, requests, settings)}
    ways["padded batches of 8"] = lambda: padded(model, requests, settings, 8)
    for rows in arguments.rows:
        ways[f"continuous, {rows} rows"] = lambda rows=rows: continuous(model, requests, config, rows)
    texts = {}

    def timed_way(name: str, way):
        def run() -> None:
            texts[name] = way()

        return run

    one_by_one(model, [(ids, 8) for ids, _ in requests[:2]], settings)  # the warm-up
    count = sum(count for _, count in requests)
    contestants = [Contestant(name, timed_way(name, way), count, arguments.repeats) for name, way in ways.items()]
    rows = interleave(contestants, arguments.device, warm_up=False)
    for name, given in texts.items():
        if given != texts["one after another"]:
            different = sum(a != b for a, b in zip(given, texts["one after another"]))
            raise SystemExit(f"{name}: {different} texts differ: no timing from a wrong result")
    seconds = {row["name"]: count / row["units_per_s"] for row in rows}
    for row in rows:
        row["seconds"] = seconds[row["name"]]
        for peer in ("one after another", "padded batches of 8"):
            row[f"sooner than {peer}"] = seconds[peer] / seconds[row["name"]]
    report("serve: the same requests in three ways", rows, arguments, bytes_made=count)


if __name__ == "__main__":
    main()
