"""Rounds the learned file of a stage, or the mean of those of several, to bf16 for the repository.

    python examples/smollm2/keep.py work/6-joint/learned.safetensors work/6-own/learned.safetensors -o learned.safetensors

A stage that goes on from another has learned something else; their mean keeps most of both. A file that is too large is
refused.
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


LARGEST = 24_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learned", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--note", action="append", default=[], metavar="NAME=VALUE", help="goes into the metadata")
    arguments = parser.parse_args()
    files = [load_file(path) for path in arguments.learned]
    if any(file.keys() != files[0].keys() for file in files):
        raise SystemExit(f"{', '.join(map(str, arguments.learned))} do not hold the same tensors.")
    tensors = {name: sum(file[name].float() for file in files) / len(files) for name in files[0]}
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    with safe_open(arguments.learned[-1], "pt") as file:
        metadata = {**file.metadata(), **dict(note.split("=", 1) for note in arguments.note)}
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    if size > LARGEST:
        raise SystemExit(f"{arguments.learned[0]} holds {size:,} bytes in bf16; at most {LARGEST:,} are kept.")
    save_file(tensors, arguments.output, metadata)
    print(f"{size // 2:,} numbers, {size:,} bytes, {metadata}")


if __name__ == "__main__":
    main()
