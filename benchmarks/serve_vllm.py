"""vLLM with the plugin against this package's continuous batching and one request after another: the same texts.

    OMP_NUM_THREADS=1 .venv-vllm-0.32.0/bin/python benchmarks/serve_vllm.py

in the environment of `make test-vllm`. Everything runs in this process on one thread, so on a machine that is busy with
something else the seconds of the processor still compare.
"""

import argparse
import json
import os
import time


os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from serve import ROOT, continuous, make_requests, one_by_one
from transformers import GenerationConfig

from blt_hf import BltForCausalLM


def vllm_texts(llm, requests) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "blt-5m"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one-by-one", type=int, default=64, help="so many of them one after another; 0: none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import vllm
    from vllm import LLM

    model = BltForCausalLM.from_pretrained(arguments.model).eval()
    requests = make_requests(arguments.requests, 20, 400)
    config = GenerationConfig(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    llm = LLM(
        arguments.model,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=arguments.rows,
    )
    ways = {
        f"vLLM, {arguments.rows} rows": (lambda: vllm_texts(llm, requests), requests),
        f"continuous batching, {arguments.rows} rows": (
            lambda: continuous(model, requests, config, arguments.rows),
            requests,
        ),
    }
    if arguments.one_by_one:
        few = requests[: arguments.one_by_one]
        ways["one after another"] = (lambda: one_by_one(model, few, {"do_sample": False}), few)
    vllm_texts(llm, requests[:2])  # the warm-up
    texts, best = {}, {}
    for _ in range(arguments.repeats):
        for name, (way, asked) in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            texts[name] = way()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            count = sum(n for _, n in asked)
            best[name] = max(best.get(name, (0, 0)), (count / processor, count / wall))
    first = next(iter(texts.values()))
    for name, found in texts.items():
        if found != first[: len(found)]:
            different = [i for i, (a, b) in enumerate(zip(found, first)) if a != b]
            raise SystemExit(f"{name}: texts {different} differ: no timing from a wrong result")
    for name, (processor, wall) in best.items():
        print(f"{name:32} {processor:8.0f} bytes a second of the processor {wall:8.0f} bytes/s")
    facts = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**facts, "bytes per processor second": {name: rate for name, (rate, _) in best.items()}}))


if __name__ == "__main__":
    main()
