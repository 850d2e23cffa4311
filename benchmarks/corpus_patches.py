"""How fast a core finds the patches of a corpus, as `blt-hf patches --shard` does: bytes a second, and of the processor.

    python benchmarks/corpus_patches.py --threads 1 | tail -1 > benchmarks/results/corpus_patches.json

The corpus is the help of Python's own topics, repeated; shards are computed one after another.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from common import report, set_up

from blt_hf import BltForCausalLM
from blt_hf.training.corpus import write_patches


ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "blt-5m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--megabytes", type=float, default=0.4)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TF32, on GPUs that have it")
    parser.add_argument("--busy", action="store_true", help="says in the result that other processes ran as well")
    arguments = parser.parse_args()
    set_up(arguments)
    model = BltForCausalLM.from_pretrained(arguments.model).to(arguments.device).eval()
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        corpus, size = Path(folder, "corpus"), 0
        corpus.mkdir()
        for number, text in enumerate(list(topics.values()) * 100):
            if size > arguments.megabytes * 1e6:
                break
            (corpus / f"{number:05}.txt").write_text(text)
            size += len(text.encode())
        for shard in range(arguments.shards):
            processor = time.process_time()
            done = write_patches(
                model, [corpus], Path(folder, "patches"), (shard, arguments.shards), context=arguments.context
            )
            processor = time.process_time() - processor
            rates.append((done.bytes_per_second, done.num_new_bytes / processor))
            print(f"shard {shard}: {rates[-1][1]:.0f} bytes per processor second", file=sys.stderr, flush=True)
    wall, processor = (statistics.median(rate) for rate in zip(*rates[1:]))  # the first warms up
    row = {"name": "entropy model of the bundled model", "bytes/s": wall, "bytes per processor second": processor}
    report("corpus_patches: patches of a corpus", [{**row, "shards": len(rates) - 1}], arguments, corpus_bytes=size)


if __name__ == "__main__":
    main()
