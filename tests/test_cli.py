"""The `blt-hf` command: what it prints is what the functions behind it give."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from blt_hf import BltConfig
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.evaluation.flops import flops_per_byte, preset_config
from blt_hf.training.calibration import calibrate_threshold
from blt_hf_cli import app
from helpers.cli import in_a_shell, run
from helpers.models import make_model, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BLT, an entropy model and a text."""
    path = tmp_path_factory.mktemp("cli")
    model = make_model(tiny_config(patcher_config={"sliding_window": 64}, local_attention_window_len=64))
    model.save_pretrained(path / "blt")
    model.model.patcher.save_pretrained(path / "entropy")
    (path / "text.txt").write_text(topics["for"][:1500])
    (path / "more.jsonl").write_text(json.dumps({"text": topics["try"][:700]}))
    return path


def texts(folder: Path) -> list[bytes]:
    return [(folder / "text.txt").read_bytes(), topics["try"][:700].encode()]


def test_calibrate_prints_and_writes(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "blt")
    model.save_pretrained(tmp_path / "blt")
    before = json.loads((tmp_path / "blt" / "config.json").read_text())
    inputs = (folder / "text.txt", folder / "more.jsonl")
    printed = run(
        "calibrate", tmp_path / "blt", *inputs, "--patch-size", 3.5, "--max-patch-length", 9, "--write", "--quiet"
    )
    found = calibrate_threshold(model, texts(folder), 3.5, max_patch_length=9)
    assert f"{found.threshold:.6f} nats" in printed
    assert f"{found.mean_patch_size:.3f} (wanted 3.5)" in printed
    assert f"2,202 bytes in {found.num_patches:,} patches" in printed
    assert "9 bytes" in printed and "█" in printed
    after = json.loads((tmp_path / "blt" / "config.json").read_text())
    assert {name for name in after if after[name] != before.get(name)} == {"patching_threshold", "max_patch_length"}
    assert [file.name for file in (tmp_path / "blt").glob(".*")] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "blt")
    assert again.config.patching_threshold == found.threshold and again.config.max_patch_length == 9


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (["--monotonic"], {"monotonicity": True}),
        (["--threshold-add", "0.01"], {"threshold_add": 0.01}),
        (["--newline-reset", "--batch-size", "2", "--max-length", "100"], {"newline_reset": True, "max_length": 100}),
    ],
    ids=str,
)
def test_calibrate_by_every_rule(folder, options, keywords):
    found = json.loads(
        run("calibrate", folder / "entropy", folder / "text.txt", "--json", "--patch-size", 3, *options)
    )
    patcher = AutoModelForCausalLM.from_pretrained(folder / "entropy")
    expected = calibrate_threshold(patcher, texts(folder)[:1], 3, **keywords)
    settings = found["settings"]
    assert settings.pop("patching_threshold") == pytest.approx(expected.threshold, rel=1e-4)
    assert settings == {name: value for name, value in expected.settings.items() if name != "patching_threshold"}
    assert found["mean_patch_size"] == pytest.approx(expected.mean_patch_size, rel=1e-3)


def test_a_config_stays_whole_when_writing_fails(folder, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(folder / "blt").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    result = CliRunner().invoke(
        app, ["calibrate", str(tmp_path), str(folder / "text.txt"), "--write", "--quiet", "--patch-size", "3"]
    )
    assert isinstance(result.exception, OSError)
    assert (tmp_path / "config.json").read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


def test_evaluate_prints_what_is_measured(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "blt")
    expected = measure_bits_per_byte(model, texts(folder), max_length=300, stride=100)
    arguments = (
        "evaluate",
        folder / "blt",
        folder / "text.txt",
        folder / "more.jsonl",
        "--max-length",
        300,
        "--stride",
        100,
    )
    printed = run(*arguments, "--quiet", "--batch-size", 2)
    assert f"bits per byte   {expected.bits_per_byte:.3f}" in printed
    assert f"bytes a patch   {expected.bytes_per_patch:.3f}" in printed
    assert "2,202 bytes in 2 texts" in printed and "bytes a second" in printed
    found = json.loads(run(*arguments, "--json"))
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-4)
    assert "bytes a patch" not in run("evaluate", folder / "entropy", folder / "text.txt", "--quiet")


def test_evaluate_token_models(folder, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).eval()
    model.save_pretrained(tmp_path)
    text = "def f(x):\n    return x + 1\n" * 3
    (tmp_path / "text.txt").write_text(text)
    assert "--tokenizer" in run("evaluate", folder / "blt", tmp_path / "text.txt", "--tokenizer", tmp_path, status=1)
    assert "cannot be loaded" in run(
        "evaluate", tmp_path, tmp_path / "text.txt", "--tokenizer", tmp_path / "no", status=1
    )
    tokenizer.save_pretrained(tmp_path)
    expected = measure_bits_per_byte(model, [text], tokenizer)
    printed = run("evaluate", tmp_path, tmp_path / "text.txt", "--quiet")
    assert f"bits per byte   {expected.bits_per_byte:.3f}" in printed and "bytes a token   1.000" in printed


def test_flops_of_presets():
    found = json.loads(
        run(
            "flops",
            "--preset",
            "blt-7b",
            "--patch-bytes",
            4.5,
            "--patch-bytes",
            8,
            "--against",
            "llama-3-8b",
            "--json",
        )
    )
    assert [line["patch_bytes"] for line in found] == [4.5, 8]
    expected = flops_per_byte(preset_config("blt-7b"), 8)
    assert found[1]["paper"] == expected.paper and found[1]["total"] == expected.total
    assert found[1]["against"] == flops_per_byte(preset_config("llama-3-8b")).total
    printed = run("flops", "--preset", "blt-7b", "--patch-bytes", 8, "--against", "llama-3-8b")
    assert "8 bytes a patch:" in printed and "57.2% of llama-3-8b" in printed
    assert "bytes a patch" not in run("flops", "--preset", "llama-3-8b")


def test_flops_of_folders(folder):
    config = BltConfig.from_pretrained(folder / "blt")
    found = json.loads(run("flops", folder / "blt", "--training", "--context-bytes", 1000, "--json"))
    assert found[0]["total"] == flops_per_byte(config, context_bytes=1000).training().total
    assert "decoder" in run("flops", folder / "entropy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "{}/entropy", "{}/text.txt", "--write"], "no place for a threshold"),
        (["calibrate", "some/name", "{}/text.txt", "--write"], "needs a local folder"),
        (["calibrate", "{}/blt", "{}/none.txt"], "neither a file nor a folder"),
        (["calibrate", "{}/blt", "{}/text.txt", "--patch-size", "5000"], "cannot be reached"),
        (["calibrate", "{}/none", "{}/text.txt"], "cannot be loaded"),
        (["evaluate", "{}/blt", "{}/text.txt", "--stride", "0"], "`stride` must be at least 1"),
        (["patches", "a", "--model", "{}/blt", "--width", "2"], "`width` must be at least 8"),
        (["flops"], "either CONFIG or --preset"),
        (["flops", "{}/blt", "--preset", "blt-1b"], "either CONFIG or --preset"),
        (["flops", "--preset", "blt-9b"], "no preset 'blt-9b'"),
        (["flops", "--preset", "llama-3-8b", "--patch-bytes", "4"], "--patch-bytes is for a BLT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line(folder, arguments, message):
    quiet = {"flops": ["--json"], "patches": []}.get(arguments[0], ["--quiet"])
    told = run(*(argument.format(folder) for argument in arguments), *quiet, status=1)
    assert message in told and "Traceback" not in told


def test_help_and_completion_do_not_wait_for_torch():
    program = (
        "import sys; import blt_hf_cli; print([n for n in ('torch', 'transformers', 'blt_hf') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    completing = {"_BLT_HF_COMPLETE": "complete_bash", "COMP_WORDS": "blt-hf ", "COMP_CWORD": "1"}
    words = in_a_shell(timeout=60, **completing).stdout.decode().split()
    assert {*COMMANDS, "train"} <= set(words)


COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", [*COMMANDS, "train", "train entropy", "train blt", "train lora"])
def test_help_has_examples(command):
    told = run(*command.split(), "--help")
    assert "Examples" in told and f"blt-hf {command}" in told


def test_imports_bring_no_optional_package():
    """`evaluate`, `datasets` and `matplotlib` belong to extras; the package and its command work without them."""
    program = (
        "import sys; import blt_hf.cli; names = ('evaluate', 'datasets', 'matplotlib', 'blt_hf.evaluation');"
        "before = [n for n in names if n in sys.modules]; blt_hf.plot_patches; print(before, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


def test_patches_are_those_of_the_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "blt")
    texts = ["to be\x1b[31m or", "naïve"]
    expected = model.get_patches(texts)
    printed = run("patches", *texts, "--model", folder / "blt", "--entropies")
    assert all(row.summary in printed for row in expected)
    assert "\x1b" not in printed and "␛" in printed and "█" in printed
    assert "<s>|" in printed  # no colours in a pipe, so patches are kept apart by signs
    found = json.loads(run("patches", *texts, "-m", folder / "blt", "--json"))
    assert found == [{**row.to_dict(), "model": str(folder / "blt")} for row in expected]
    threshold = model.config.patching_threshold - 0.3
    (found,) = json.loads(run("patches", "-m", folder / "blt", "--json", "--threshold", threshold, stdin=b"a\xff\n"))
    assert found["boundaries"] == model.get_patches(b"a\xff\n").recut(threshold=threshold).boundaries


def test_patches_writes_pictures(folder, tmp_path):
    run("patches", "naïve 速い", "-m", folder / "entropy", "--svg", tmp_path / "p.svg", "--png", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "p.svg").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"p.svg", "p.png"}
    assert "no folder" in run("patches", "a", "-m", folder / "blt", "--svg", tmp_path / "no" / "p.svg", status=1)
    assert "nothing to draw" in run("patches", "", "-m", folder / "blt", "--svg", tmp_path / "q.svg", status=1)


def test_patches_without_a_name_takes_the_bundled_model(tmp_path, monkeypatch, folder):
    from blt_hf_cli import common

    root = Path(__file__).parents[1]
    assert common.model_or_default(None) == str(Path(common.__file__).parents[2] / "pretrained" / "blt-5m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert "no model was named" in run("patches", "a", status=1)
    monkeypatch.setenv("BLT_HF_MODEL", str(folder / "blt"))
    assert "1 byte in 1 patch" in run("patches", "a")
    monkeypatch.delenv("BLT_HF_MODEL")
    monkeypatch.chdir(root)
    assert common.model_or_default(None) == str(root / "pretrained" / "blt-5m")


def test_colours_in_a_terminal(folder):
    """On a pseudo-terminal, from another process, as a user sees it."""
    import pty

    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "blt_hf_cli", "patches", "to be", "-m", str(folder / "blt")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=secondary, stdin=subprocess.DEVNULL, env=environment)
    os.close(secondary)
    shown = b""
    try:
        while True:
            try:
                piece = os.read(primary, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
        os.close(primary)
    assert b"\x1b[38;2;28;36;48;48;2;207;227;247m" in shown.replace(b"\x1b[3;38", b"\x1b[38") and b"|" not in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/blt/none", "no such folder"),
        ("{}", "no config.json. Folders below it that have one: blt, entropy"),
        ("{}/bltt", "there are: blt, entropy"),
        ("someone/some-blt", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_wrong_model_is_told_what_to_do(folder, name, message):
    told = run("patches", "a", "--model", name.format(folder), status=1)
    assert message in told and told.count("\n") == 1


def test_a_missing_extra_is_named(folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = run("patches", "a", "-m", folder / "blt", "--svg", "x.svg", status=1)
    assert 'pip install "blt-hf[plot]"' in told
