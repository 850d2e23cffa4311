"""A few rows times a weight matrix on a CPU: `nn.Linear`, and `BltLinear` with the weights on the left.

python benchmarks/few_rows.py
"""

import argparse

import torch
from common import Contestant, add_arguments, interleave, report

from blt_hf import layers_blt


SHAPES = [(512, 512), (1408, 512), (512, 1408), (256, 256), (704, 256), (256, 704)]  # outputs, inputs
COLD_BYTES = 100e6  # of weights for each shape, more than a cache holds


def make(kind: type, outputs: int, inputs: int) -> list:
    torch.manual_seed(0)
    return [kind(inputs, outputs, bias=False) for _ in range(round(COLD_BYTES / 4 / outputs / inputs))]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    layers_blt._TURNS_FEW_ROWS, layers_blt._LARGE = True, 0  # also where nobody has measured it yet
    results = []
    for outputs, inputs in SHAPES:
        plain, ours = make(torch.nn.Linear, outputs, inputs), make(layers_blt.BltLinear, outputs, inputs)
        for rows in arguments.rows:
            x = torch.randn(1, rows, inputs)
            torch.testing.assert_close(ours[0](x), plain[0](x))
            contestants = [
                Contestant(
                    name, lambda layers=layers, x=x: [layer(x) for layer in layers], len(layers), arguments.repeats
                )
                for name, layers in (("nn.Linear", plain), ("BltLinear", ours))
            ]
            linear, turned = interleave(contestants, "cpu")
            results.append(
                {
                    "outputs x inputs": f"{outputs} x {inputs}",
                    "rows": rows,
                    "nn.Linear, us": 1000 * linear["ms_per_unit"],
                    "BltLinear, us": 1000 * turned["ms_per_unit"],
                    "faster by": linear["ms_per_unit"] / turned["ms_per_unit"],
                    "GB/s": 4 * outputs * inputs / turned["ms_per_unit"] / 1e6,
                }
            )
    report("few_rows", results, arguments)


if __name__ == "__main__":
    main()
