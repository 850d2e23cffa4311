"""Rounds a learned file of a stage to bf16 for the repository, and refuses one that is too large.

python examples/smollm2/keep.py work/1-joint/learned.safetensors examples/smollm2/learned.safetensors
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


LARGEST = 24_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learned", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--note", action="append", default=[], metavar="NAME=VALUE", help="goes into the metadata")
    arguments = parser.parse_args()
    with safe_open(arguments.learned, "pt") as file:
        tensors = {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = {**file.metadata(), **dict(note.split("=", 1) for note in arguments.note)}
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    if size > LARGEST:
        raise SystemExit(f"{arguments.learned} holds {size:,} bytes in bf16; at most {LARGEST:,} are kept.")
    save_file(tensors, arguments.output, metadata)
    print(f"{size // 2:,} numbers, {size:,} bytes, {metadata}")


if __name__ == "__main__":
    main()
