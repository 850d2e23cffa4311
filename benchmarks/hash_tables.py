"""A training step of a model that is mostly hash tables: dense gradients and AdamW against rows and `BltAdamW`.

python benchmarks/hash_tables.py --rows 50000       # 300,000 rows of 256 numbers, 77 million weights
python benchmarks/hash_tables.py --only rows        # peak memory of one contestant alone
"""

import argparse

from common import (
    SHAPES,
    Contestant,
    adamw,
    add_arguments,
    build_blt,
    interleave,
    make_step,
    peak_memory_mb,
    random_ids,
    report,
    set_up,
)

from blt_hf.training.optimization import BltAdamW, split_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the 6 tables")
    parser.add_argument("--bytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["dense", "rows"])
    arguments = parser.parse_args()
    set_up(arguments)
    SHAPES["tables"] = (*SHAPES[arguments.shape][:5], arguments.rows)
    ids = random_ids(1, arguments.bytes, arguments.device, seed=4)
    contestants, facts = [], []
    for name in ("dense", "rows"):
        if arguments.only not in (None, name):
            continue
        model = build_blt("tables", arguments.patch_bytes, arguments.device, arguments.dtype).train()
        table = model.model.encoder_hash_tok_embedding.weight
        optimizer = BltAdamW(split_parameters(model), lr=1e-4) if name == "rows" else adamw(model, 1e-4)
        step = make_step(model, ids, optimizer)
        step()
        state = sum(value.nbytes for value in optimizer.state[table].values())
        facts.append({"weights of tables, MB": table.nbytes / 1e6, "optimizer state of tables, MB": state / 1e6})
        contestants.append(Contestant(name, step, 1, arguments.repeats))
    rows = [
        {"name": r["name"], "s_per_step": r["ms_per_unit"] / 1000, "spread": r["spread"], **fact}
        for r, fact in zip(interleave(contestants, arguments.device), facts)
    ]
    report("hash_tables: a training step", rows, arguments, peak_mb=peak_memory_mb(arguments.device))


if __name__ == "__main__":
    main()
