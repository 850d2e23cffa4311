"""`examples/patches_ray.py`: Ray Data finds the patches that a model finds.

`make test-vllm` installs Ray, which the other tests do without.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)


pytest.importorskip("ray.data", reason="Ray is not installed")
ROOT = Path(__file__).parents[1]
LINES = [f"The line of number {number} names {number * number}." for number in range(40)]


@torch.no_grad()
def test_patches_are_those_of_the_model(tmp_path):
    from pyarrow.parquet import read_table

    (tmp_path / "texts.txt").write_text("\n".join(LINES) + "\n")
    command = [sys.executable, str(ROOT / "examples" / "patches_ray.py"), "texts.txt"]
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
    rows = {bytes(i - 4 for i in row["input_ids"][1:]): row for row in read_table(tmp_path / "patches").to_pylist()}
    assert set(rows) == {line.encode() for line in LINES}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "pretrained" / "blt-5m").eval()
    for line in LINES[:5]:
        row = rows[line.encode()]
        found = model(torch.tensor([row["input_ids"]]), output_patches=True).patch_lengths[0].tolist()
        assert row["patch_lengths"] == [length for length in found if length]
