"""`benchmarks/serve_replicas.py` runs to its end at small settings: the texts of all replicas are the same, or it stops.

`make test-vllm` installs Ray, which the other tests do without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("ray", reason="Ray is not installed")
ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_the_script_runs():
    few = [
        "--replicas",
        "1",
        "2",
        "--clients",
        "3",
        "--longest",
        "24",
        "--warm-up",
        "1",
        "--seconds",
        "2",
        "--repeats",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serve_replicas.py"), *few],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["1 replica", "2 replicas"]
    assert all(row["bytes/s"] > 0 for row in result["rows"]) and "commit" in result["environment"]
