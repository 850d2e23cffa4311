"""`benchmarks/serve_vllm.py` runs to its end at small settings: the texts of all ways are the same, or it stops."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_script_runs():
    script = Path(__file__).parents[3] / "benchmarks" / "serve_vllm.py"
    few = ["--requests", "4", "--longest", "24", "--rows", "2", "--one-by-one", "3", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *few], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    names = [row["name"] for row in result["rows"]]
    assert names == ["one after another", "continuous batching, 2 rows", "vLLM, 2 rows"]
    assert all(row["bytes/s"] > 0 and row["to one after another"] > 0 for row in result["rows"])
    assert set(result["shares"]) == {"products", "attention", "rest of the forward", "vLLM itself"}
    assert "commit" in result["environment"]
