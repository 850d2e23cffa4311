"""`benchmarks/serve.py` runs to its end at its smallest settings, and times no wrong result."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--shape", "tiny", "--device", "cpu", "--requests", "3", "--shortest", "2", "--longest", "6", "--rows", "2"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])  # last: the `tokenize.py` there is not Python's own
    monkeypatch.setattr(sys, "argv", ["serve.py", *TINY, "--repeats", "1"])
    spec = importlib.util.spec_from_file_location("benchmark_serve", FOLDER / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_runs(script, capsys):
    script.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [row["name"] for row in result["rows"]]
    assert names == ["one after another", "padded batches of 8", "continuous, 2 rows"]
    assert all(row["units_per_s"] > 0 for row in result["rows"])
    assert "commit" in result["environment"] and result["environment"]["command"].endswith("--repeats 1")


def test_a_wrong_text_stops_it(script, monkeypatch):
    monkeypatch.setattr(script, "continuous", lambda model, requests, *options: [[0] * n for _, n in requests])
    with pytest.raises(SystemExit, match="continuous, 2 rows: 3 texts differ"):
        script.main()
