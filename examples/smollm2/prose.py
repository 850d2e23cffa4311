"""Bits per byte of held-out English prose: the byteified model, its token model, and blt-5m, which has no teacher.

python examples/smollm2/prose.py blt-smollm2-135m SmolLM2-135M-Instruct.Q4_1.gguf corpus/heldout.jsonl
"""

import argparse
import json
from pathlib import Path

from measure import read_held_out
from scoring import text_bits_per_byte
from transformers import AutoModelForCausalLM, AutoTokenizer

from blt_hf.training.token_models import load_token_model


SMALL = Path(__file__).parents[2] / "pretrained" / "blt-5m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blt", help="folder that `blt-hf get smollm2` made")
    parser.add_argument("teacher", type=Path, help="the file in GGUF")
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--bytes", type=int, default=16_000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "prose.json")
    arguments = parser.parse_args()
    texts = read_held_out(arguments.held_out, "prose", arguments.bytes)
    figures = {"bytes": sum(len(text.encode()) for text in texts), "documents": len(texts)}
    for name, (model, tokenizer) in {
        "blt": _load(arguments.blt),
        "teacher": load_token_model(arguments.teacher.parent, arguments.teacher.name),
        "blt-5m": _load(SMALL),
    }.items():
        figures[name] = round(text_bits_per_byte(model.eval(), tokenizer, texts), 4)
    print(json.dumps(figures, indent=1))
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
