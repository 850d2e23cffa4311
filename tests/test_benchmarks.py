"""Each script in `benchmarks/` runs to its end at its smallest settings, in this process; servers have their own tests."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from blt_hf.fast_blt import blocks
from blt_hf.model import step_blt


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # last: the `tokenize.py` there is not Python's own
import common


FOLDER = Path(common.__file__).parent
TINY = ["--shape", "tiny", "--device", "cpu"]
COMMANDS = {
    "corpus_patches": ["--megabytes", "0.002", "--shards", "2", "--context", "64"],
    "decode": [*TINY, "--contexts", "40", "--new-bytes", "8", "--repeats", "2", "--batch-sizes", "2", "--compile"],
    "fast_blt": [
        "--device", "cpu", "--model", "pretrained/blt-5m", "--new-bytes", "13", "--repeats", "1", "--block-sizes", "4",
        "--eager",
    ],
    "hash_tables": [*TINY, "--rows", "50", "--bytes", "32", "--repeats", "1"],
    "import_time": ["--rounds", "1"],
    "operations": ["--shape", "tiny"],
    "prefill": [*TINY, "--lengths", "64", "--repeats", "1"],
    "profile_ops": [*TINY, "--length", "32", "--context", "16", "--new-bytes", "2"],
    "recorded": [
        *TINY, "--tape", "--contexts", "24", "--new-bytes", "17", "--prompts", "24", "--rows", "2", "--repeats", "1",
    ],
    "speculation": [
        "--device", "cpu", "--no-compile", "--windows", "4", "8", "--new-bytes", "12", "--prompts", "1", "--repeats", "1",
    ],
    "train_step": [*TINY, "--lengths", "24", "--repeats", "1"],
}  # fmt: skip
ELSEWHERE = {"common", "convert_memory", "plot", "quantization", "tables", "tokenize", "warmup"}


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, module: types.ModuleType, *arguments: str) -> dict:
    """Runs a script; returns its last line, which is JSON."""
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *arguments])
    with redirect_stdout(io.StringIO()) as printed:
        module.main()
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture
def small(monkeypatch):
    """Makes small what arguments do not: large shapes, measurements of the machine, code from a compiler."""
    monkeypatch.setitem(common.SHAPES, "1b-proportions", common.SHAPES["tiny"])
    # What scripts set for a process of their own, put back behind the test.
    monkeypatch.setattr(step_blt, "CAPTURES_BY_DEFAULT", step_blt.CAPTURES_BY_DEFAULT)
    monkeypatch.setattr(blocks, "fill_block", blocks.fill_block)
    monkeypatch.setattr(common, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(common, "matmul_peak", lambda device, dtype: 1e9)

    def load_small(name: str) -> types.ModuleType:
        module = load(name)
        monkeypatch.setitem(common.SHAPES, "1b-proportions", common.SHAPES["tiny"])  # a script sets its own
        return module

    with torch.compiler.set_stance("force_eager"):
        yield load_small


def test_every_script_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts - ELSEWHERE - set(COMMANDS) == {name for name in scripts if name.startswith("serve")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_runs(name, small, monkeypatch):
    module = small(name)
    if name == "fast_blt":
        monkeypatch.setattr(module, "PROMPTS", {kind: texts[:1] for kind, texts in module.PROMPTS.items()})
    if name == "operations":
        count = module.count_per_byte
        monkeypatch.setattr(module, "count_per_byte", lambda model, prompt, **settings: count(model, prompt, 2, 2))
    if name == "recorded":  # the other parts write a thousand bytes, slowly without a GPU
        monkeypatch.setattr(module, "PARTS", (module.decode, module.prompts, module.llama))
        monkeypatch.setattr(module, "WAYS", dict(list(module.WAYS.items())[:2]))
    if name == "import_time":  # new interpreters, which import next to nothing here
        monkeypatch.setattr(module, "SIDES", dict.fromkeys(module.SIDES, "import json"))
    result = run(monkeypatch, module, *COMMANDS[name])
    assert result["benchmark"]
    rows = result.get("rows") or result.get("results") or result["median_seconds"]
    assert rows and "failed" not in json.dumps(result)


def test_parts_of_speculation(small, monkeypatch):
    module = small("speculation")
    monkeypatch.setattr(module.measure_parts, "__defaults__", (1,))
    (row,) = run(monkeypatch, module, "--device", "cpu", "--only", "parts")["rows"]
    assert row["ms a draft"] > 0


def test_warmup(small, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # and so put back behind the test
    result = run(monkeypatch, small("warmup"), "--shape", "tiny", "--graphs-only", "--new-bytes", "9")
    assert result["s_of_the_first_call"] > 0


def test_the_page_holds_the_figures_of_the_results():
    module = load("tables")
    text = module.PAGE.read_text()
    assert all(f"<!-- {name} -->" in text for name in module.TABLES)
    assert module.fill(text) == text, "run python benchmarks/tables.py"


def test_cost_is_drawn_from_results(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("matplotlib")
    module = load("plot")
    shutil.copytree(FOLDER / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    module.main()
    assert (tmp_path / "docs" / "images" / "cost.png").stat().st_size > 10_000


def test_quantization(monkeypatch):
    pytest.importorskip("torchao")
    module = load("quantization")
    result = run(monkeypatch, module, "--steps", "1", "--bytes", "300", "--kinds", "none", "--device", "cpu")
    assert result["rows"][0]["weights"] == "none"


def test_memory_of_conversion(monkeypatch):
    """A small checkpoint, converted by the script that child processes run; here it runs in this process."""
    module = load("convert_memory")
    model_args = module.model_args

    def small_args(gigabytes):
        sizes = {"dim_global": 64, "dim_local_encoder": 32, "dim_local_decoder": 32}
        heads = {f"n_heads_{part}": 2 for part in ("global", "local_encoder", "local_decoder")}
        return {**model_args(gigabytes), **sizes, **heads, "cross_attn_nheads": 2, "encoder_hash_byte_group_vocab": 20}

    def run_here(command, **settings):
        if command[0] != sys.executable:
            return types.SimpleNamespace(stdout="")  # git
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        with redirect_stdout(io.StringIO()) as printed:
            exec(command[2], {})
        return types.SimpleNamespace(returncode=0, stdout=printed.getvalue())

    monkeypatch.setattr(module, "model_args", small_args)
    monkeypatch.setattr(module, "ENTROPY_ARGS", {**module.ENTROPY_ARGS, "dim": 32, "n_layers": 1, "n_heads": 2})
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=run_here))
    assert module.subprocess is not subprocess
    runs = run(monkeypatch, module, "--gigabytes", "0.001")["runs"]
    assert [row["direction"] for row in runs] == ["to transformers", "to meta", "to transformers", "plain"]
