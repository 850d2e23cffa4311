"""Every example runs, in a small setting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import blt_hf  # noqa: F401


ROOT = Path(__file__).parents[1]


def run_example(name: str, *arguments, timeout: float = 280, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("quickstart")
    return run_example("quickstart.py", "--small", "--output-dir", folder, COLUMNS="100"), folder


def test_quickstart_goes_through_all_steps(quickstart):
    printed, folder = quickstart
    headings = [line for line in printed.splitlines() if line.startswith("─")]
    assert len(headings) == 5
    assert "The import statement" in printed
    assert f"{folder / 'blt'} writes the same text." in " ".join(printed.split())


def test_quickstart_leaves_two_models_that_load(quickstart):
    _, folder = quickstart
    tokenizer = AutoTokenizer.from_pretrained(folder / "blt")
    for name in ("blt", "entropy-model"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        ids = tokenizer("To be", return_tensors="pt")
        assert model.generate(**ids, max_new_tokens=3, eos_token_id=None).shape == (1, 9)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_learns(tmp_path):
    printed = run_example("quickstart.py", "--output-dir", tmp_path, timeout=1750)
    found = re.search(r"([\d.]+) bits per byte before, ([\d.]+) after", " ".join(printed.split()))
    before, after = map(float, found.groups())
    assert after < before - 0.3 and after < 2.2
