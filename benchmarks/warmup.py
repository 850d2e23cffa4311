"""What the first compiled call of `generate` costs a process that finds nothing in torch's caches on disk.

python benchmarks/warmup.py                                       # this checkout
python benchmarks/warmup.py --source ../before/src                # another one, by the same script
python benchmarks/warmup.py --graphs-only                         # no code is generated: graphs and guards, in seconds

Counted are graphs, nodes, guards and kernels; timed are seconds of the clock, and of processors, of this process and of
the compilers that it starts. The first call writes 24 bytes, and so reads, predicts and closes patches.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="the `src` of another checkout; None: this one's")
    parser.add_argument("--shape", default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TF32, on GPUs that have it")
    parser.add_argument("--patch-bytes", type=float, default=4.5, help="mean bytes a patch")
    parser.add_argument("--new-bytes", type=int, default=24)
    parser.add_argument("--graphs-only", action="store_true", help="run graphs as they are, without generated code")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.source:
        sys.path.insert(0, str(Path(arguments.source).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        # Read by torch when it first compiles; a pool of compilers would hide their seconds of processors.
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from common import build_blt, random_ids, report, set_up
    from torch._dynamo.utils import counters, get_compilation_metrics
    from torch._inductor import metrics
    from transformers import CompileConfig

    import blt_hf

    set_up(arguments)
    model = build_blt(arguments.shape, arguments.patch_bytes, arguments.device, arguments.dtype)
    prompt = random_ids(1, 64, arguments.device)
    settings = {"max_new_tokens": arguments.new_bytes, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, **settings)
    config = CompileConfig(mode=None, **({"backend": "eager"} if arguments.graphs_only else {}))
    started, processor = time.perf_counter(), seconds_of_processors()
    compiled = model.generate(prompt, cache_implementation="static", compile_config=config, **settings)
    seconds, processor = time.perf_counter() - started, seconds_of_processors() - processor
    if not compiled.equal(plain):
        raise SystemExit("compiled steps write another text: no timing from a wrong result")
    graphs = [found for found in get_compilation_metrics() if found.graph_op_count]
    rows = [
        {
            "graph": found.co_name,
            "nodes": found.graph_node_count,
            "guards": found.guard_count,
            "s, graph": (found.entire_frame_compile_time_s or 0) - (found.backend_compile_time_s or 0),
            "s, code": found.backend_compile_time_s or 0,
        }
        for found in graphs
    ]
    totals = {
        "graphs": len(graphs),
        "nodes": sum(row["nodes"] for row in rows),
        "guards": sum(row["guards"] for row in rows),
        "kernels": metrics.generated_kernel_count,
        "external_calls": sum(
            counters["inductor"][name] for name in counters["inductor"] if name.startswith("extern")
        ),
        "s_of_the_first_call": seconds,
        "s_of_processors": processor,
        "blt_hf": commit_of(Path(blt_hf.__file__)),
    }
    report("warmup: the first compiled call", rows, arguments, **totals)


def seconds_of_processors() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def commit_of(file: Path) -> str:
    """The commit of the checkout that a file belongs to."""
    import subprocess

    command = ["git", "-C", str(file.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
