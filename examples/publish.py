"""Publish a BLT: a folder that loads with this package, with its own code, and in a plain transformers; then the Hub.

Shows what is in a saved folder and that each of the three ways gives the same text. Takes a minute on two cores.

    python examples/publish.py                                          # writes `published/`, uploads nothing
    python examples/publish.py --model my-blt --repo my-name/my-blt     # also uploads; log in before with `hf auth login`
"""

import argparse
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)
from blt_hf.evaluation import measure_bits_per_byte, write_model_card


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"
PROMPT = "The import statement "
TEXT = "The function returns a list of the names that were found in the given module, or None if there are none."

# What strangers run. `None` in `sys.modules` makes a module look as if it were not installed.
LOAD = """
import sys
sys.modules["blt_hf"] = None
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, options = sys.argv[1], {options}
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
inputs = tokenizer({prompt!r}, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, use_cache=bool(options))
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


def write_as_stranger(folder: Path, options: dict) -> str:
    """What a process without this package writes after the prompt."""
    program = LOAD.format(options=options, prompt=PROMPT)
    done = subprocess.run(
        [sys.executable, "-c", program, folder.absolute()], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED), help="folder or Hub id")
    parser.add_argument("--repo", help="Hub id to upload to; none: nothing is uploaded")
    parser.add_argument("--public", action="store_true", help="the repository is private otherwise")
    parser.add_argument("--license", default="apache-2.0", help="Hub id of the licence of the weights")
    parser.add_argument("--output-dir", type=Path, default=Path("published"))
    arguments = parser.parse_args()
    folder = arguments.output_dir

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)

    # Weights, configuration, code and tokenizer; then the card, with a number that others can compare.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = measure_bits_per_byte(model, [TEXT])
    write_model_card(
        folder,
        repo_id=arguments.repo,
        license=arguments.license,
        bits_per_byte={"one sentence": measured},
        overwrite=True,
    )
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:12,} {file.name}")

    for name, options in (("its own code", {"trust_remote_code": True}), ("plain transformers", {})):
        if write_as_stranger(folder, options) != text:
            raise SystemExit(f"With {name} the folder writes something else.")
        print(f"The same text with {name}.")

    if arguments.repo:
        HfApi().create_repo(arguments.repo, private=not arguments.public, exist_ok=True)
        HfApi().upload_folder(repo_id=arguments.repo, folder_path=folder)  # one commit: all of it or nothing
        print(f"Uploaded to {arguments.repo}.")


if __name__ == "__main__":
    main()
