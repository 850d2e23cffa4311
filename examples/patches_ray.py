"""Patches of a corpus with Ray Data: workers that each hold a model, fed from files that may lie in an object store.

For machines with GPUs that other machines feed. With processors alone, `blt-hf patches --corpus ... --shard i/n` needs no
Ray and is as fast. Needs `pip install "ray[data]"` and the extra `train`. Takes a minute on two cores.

    python examples/patches_ray.py PATH [--output FOLDER] [--model FOLDER_OR_HUB_ID] [--workers N] [--gpus N]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import ray


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"


class Worker:
    """Made once in each process, then called with batches of lines."""

    def __init__(self, model: str, context: int):
        import torch
        from transformers import AutoModelForCausalLM

        import blt_hf  # noqa: F401 (makes the Auto classes know BLT)
        from blt_hf.training.data import PrecomputePatches, byte_ids

        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.find = PrecomputePatches(AutoModelForCausalLM.from_pretrained(model), device=device)
        self.byte_ids, self.context = byte_ids, context

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        rows = [[1, *self.byte_ids(text)][: self.context] for text in batch["text"]]
        return {"input_ids": rows, **self.find({"input_ids": rows})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="Text files, a text in each line; also s3://... and gs://...")
    parser.add_argument("--output", default="patches", help="folder of Parquet files")
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--context", type=int, default=1024, help="ids of a row; longer lines are cut")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    arguments = parser.parse_args()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    start = time.perf_counter()
    rows = ray.data.read_text(arguments.path).map_batches(
        Worker,
        fn_constructor_args=(arguments.model, arguments.context),
        batch_size=16,
        concurrency=arguments.workers,
        num_gpus=arguments.gpus or None,
    )
    rows.write_parquet(str(Path(arguments.output).resolve()))
    found = ray.data.read_parquet(str(Path(arguments.output).resolve()))
    print(f"{found.count()} rows in {arguments.output}, {time.perf_counter() - start:.0f} seconds")
    ray.shutdown()


if __name__ == "__main__":
    main()
