"""The annotations of the public names are those that a program meets: mypy reads one that uses them."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typing" / "uses_blt_hf.py"

# Only what this package says is checked: reading torch and transformers would take minutes.
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,transformers.*,datasets.*,accelerate.*,evaluate.*,peft.*,trl.*,huggingface_hub.*,numpy.*,safetensors.*,rich.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-tokenizers.*,typer.*]
follow_imports = skip
ignore_missing_imports = True
"""

MISTAKES = """
length: str = cache.get_seq_length()
config.patching_mode.no_such_method()
tokenizer.decode_bytes([1], skip=True)
convert_meta_checkpoint("from")
"""


def check(program: Path, folder: Path) -> list[str]:
    """The errors that mypy has about a program."""
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder)]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, cwd=ROOT / "src", timeout=250)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def test_a_program_that_uses_the_public_names(tmp_path):
    assert check(PROGRAM, tmp_path) == []
    mistaken = tmp_path / "mistaken.py"
    mistaken.write_text(PROGRAM.read_text() + MISTAKES)
    errors = check(mistaken, tmp_path)
    first = PROGRAM.read_text().count("\n") + 2
    assert {int(line.split(":")[1]) for line in errors} == set(range(first, first + MISTAKES.count("\n") - 1)), errors
