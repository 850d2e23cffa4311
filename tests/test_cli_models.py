"""`blt-hf generate`, `info`, `train` and `card`: what they make is what the functions behind them make."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import blt_hf_cli.train
from blt_hf import BltForCausalLM, BltPatcher, BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf_cli import app
from blt_hf_cli.generate import ByteStreamer
from helpers import processes
from helpers.cli import in_a_shell, run
from helpers.models import make_model, tiny_config
from helpers.texts import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BLT with its tokenizer, an entropy model, and texts."""
    path = tmp_path_factory.mktemp("cli-models")
    model = make_model(tiny_config(patcher_config={"sliding_window": 64}, local_attention_window_len=64))
    model.save_pretrained(path / "blt")
    model.model.patcher.save_pretrained(path / "entropy")
    for name in ("blt", "entropy"):
        BltTokenizer().save_pretrained(path / name)
    (path / "texts").mkdir()
    for name in ("for", "try", "with", "if", "while"):
        (path / "texts" / f"{name}.txt").write_text(topics[name][:600])
    return path


def written_by(folder: Path, prompt: str | bytes, **options) -> bytes:
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    ids = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :].tolist()
    return bytes(i - 4 for i in ids if 4 <= i < 260)


def raw(*arguments, stdin: bytes = b"") -> bytes:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes


def test_generate_writes_the_bytes_of_the_model(folder):
    expected = written_by(folder / "blt", "for x", max_new_tokens=12, do_sample=False)
    assert raw("generate", "for x", "-m", folder / "blt", "-n", 12) == expected
    assert raw("generate", "-m", folder / "blt", "-n", 12, stdin=b"for x") == expected
    assert raw("generate", "-", "-m", folder / "blt", "-n", 12, "--speculate", 3, stdin=b"for x") == expected
    told = json.loads(run("generate", "for x", "-m", folder / "blt", "-n", 12, "--json"))
    assert bytes.fromhex(told["bytes_hex"]) == expected and told["num_bytes"] == len(expected)
    assert told["prompt"] == "for x" and told["seconds"] > 0
    not_utf8 = written_by(folder / "entropy", b"\xff\xfe", max_new_tokens=5, do_sample=False)
    assert raw("generate", "-m", folder / "entropy", "-n", 5, stdin=b"\xff\xfe") == not_utf8


def test_generate_samples_with_a_seed_and_stops(folder):
    arguments = ("generate", "for x", "-m", folder / "blt", "-n", 40, "--temperature", 1.5)
    first = raw(*arguments, "--seed", 1)
    assert first == raw(*arguments, "--seed", 1) != raw(*arguments, "--seed", 2)
    stop = next(chr(byte) for byte in first[5:] if 32 < byte < 127)
    cut = raw(*arguments, "--seed", 1, f"--stop={stop}")
    assert cut == first[: len(cut)] and stop.encode() not in cut[:-1] and len(cut) <= len(first)


def test_chat_remembers_and_resets(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "blt")
    model = AutoModelForCausalLM.from_pretrained(folder / "blt")

    def answer(messages) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        return bytes(i - 4 for i in ids if 4 <= i < 260).decode("utf-8", "replace")

    start = [{"role": "system", "content": "Be brief."}]
    talk = [*start, {"role": "user", "content": "hello"}]
    first = answer(talk)
    second = answer([*talk, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}])
    again = answer([*start, {"role": "user", "content": "and?"}])
    arguments = ("generate", "--chat", "--system", "Be brief.", "-m", folder / "blt", "-n", 6)
    shown = raw(*arguments, stdin=b"hello\nand?\n\n/reset\nand?\n/quit\nnever read\n").decode("utf-8", "replace")
    assert shown == f"{first}\n{second}\n{again}\n"


def test_streamer_shows_whole_characters_and_no_control_codes(monkeypatch, capsys):
    streamer = ByteStreamer()
    streamer.is_terminal = True
    streamer.put(torch.tensor([[1, 70]]))  # the prompt
    shown = []
    for byte in "é\x1b[0m\u202e\t速".encode() + b"\xff\xe2":
        streamer.put(torch.tensor([byte + 4]))
        shown.append(capsys.readouterr().out)
    streamer.end()
    assert shown[:3] == ["", "é", "␛"]  # nothing of a character before all of it is there
    assert "".join(shown) + capsys.readouterr().out == "é␛[0mU+202E\t速\ufffd\ufffd"


def test_info_says_what_the_model_has_and_costs(folder):
    """Against the model itself, which reads a text as long, in patches as large, as the command is asked about."""
    model = BltForCausalLM.from_pretrained(folder / "blt").eval()
    ids = torch.tensor([encode((folder / "texts" / "for.txt").read_bytes())])
    num_bytes = ids.shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(ids, use_cache=True, output_patches=True)
    num_patches = int((output.patch_lengths > 0).sum()) - 1  # the last one is open
    size = ("--context-bytes", num_bytes, "--patch-bytes", num_bytes / num_patches)
    told = json.loads(run("info", folder / "blt", *size, "--json"))
    assert told["parameters"]["total"] == sum(weight.numel() for weight in model.parameters())
    assert told["parameters"]["patcher"] == sum(weight.numel() for weight in model.model.patcher.parameters())
    # torch counts attention on a CPU from 2.15 on, and all pairs of positions, whatever the window.
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(count for operation, count in counts if "attention" not in str(operation)) / num_bytes
    assert counted < told["flops_per_byte"] < 1.5 * counted
    assert told["memory_bytes"]["weights"] == 4 * told["parameters"]["total"]
    kept = sum(tensor.values.nbytes for slots in output.past_key_values.kinds for tensor in slots.tensors)
    # The command counts on patches of at most 64 bytes. Weights, which torch draws, and Python's text decide which come.
    assert told["memory_bytes"]["cache"] == pytest.approx(kept, rel=0.01 if output.patch_lengths.max() <= 64 else 0.03)
    assert told["shape"]["decoder"]["layers"] == len(model.model.local_decoder.layers)
    half = json.loads(run("info", folder / "blt", "--dtype", "bfloat16", "--json"))["memory_bytes"]["weights"]
    patcher = told["parameters"]["patcher"]
    assert half == 2 * (told["parameters"]["total"] - patcher) + 4 * patcher
    printed = run("info", folder / "blt", folder / "texts" / "for.txt")
    found = model.get_patches((folder / "texts" / "for.txt").read_bytes())
    assert f"600 bytes in {found.num_patches} patches, {found.bytes_per_patch:.2f} bytes a patch" in printed
    assert "█" in printed and "window 64 bytes" in printed and "threshold" in printed
    released = json.loads(run("info", "blt-1b", "--json"))
    assert 4.4e9 < released["parameters"]["total"] < 4.7e9 and released["shape"]["hash_tables"]["tables"] == 6
    assert "a BLT is needed" in run("info", folder / "entropy", status=1)


def train(kind: str, folder: Path, *arguments) -> dict:
    common = ("--cpu", "--steps", 3, "--batch-size", 2, "--context", 128, "--json")
    done = run("train", kind, folder / "texts", *common, *arguments)
    return json.loads(done.splitlines()[-1])


def test_train_an_entropy_model_and_a_blt_on_it(folder, tmp_path):
    told = train("entropy", folder, "--size", "tiny", "-o", tmp_path / "entropy", "--patch-size", 3)
    patcher = AutoModelForCausalLM.from_pretrained(tmp_path / "entropy")
    assert isinstance(patcher, BltPatcher) and patcher.config.hidden_size == 32
    calibration = json.loads((tmp_path / "entropy" / "calibration.json").read_text())
    assert calibration["patching_threshold"] == told["threshold"]
    assert told["bytes_per_patch"] == pytest.approx(3, abs=0.5)

    held_out = folder / "texts" / "if.txt"
    arguments = ("--size", "tiny", "-p", tmp_path / "entropy", "--held-out", held_out)
    told = train("blt", folder, *arguments, "-o", tmp_path / "blt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "blt")
    assert model.config.patching_threshold == calibration["patching_threshold"]
    for name, weight in patcher.named_parameters():
        assert torch.equal(weight, model.model.patcher.get_parameter(name))
    measured = measure_bits_per_byte(model, [held_out.read_bytes()], max_length=128)
    assert told["bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "blt")("a").input_ids == [1, 101]

    again = train("blt", folder, "-m", tmp_path / "blt", "-o", tmp_path / "blt", "--learning-rate", 1e-5)
    assert again["bits_per_byte"] < 8.5
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "blt")
    assert not torch.equal(moved.lm_head.weight, model.lm_head.weight)


def test_train_lora_saves_an_adapter_or_the_whole(folder, tmp_path):
    from peft import AutoPeftModelForCausalLM

    told = train("lora", folder, "-m", folder / "blt", "-o", tmp_path / "adapter", "--rank", 4)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    merged = train("lora", folder, "-m", folder / "blt", "-o", tmp_path / "whole", "--rank", 4, "--merge")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(whole.lm_head.weight, adapted.lm_head.weight)
    assert merged["bits_per_byte"] == pytest.approx(told["bits_per_byte"], rel=1e-4)


def test_train_reads_yaml_and_flags_win(folder, tmp_path, monkeypatch):
    seen = {}

    def fit(self, model, rows):
        seen.update(run=self, arguments=self.arguments(), rows=rows)

    monkeypatch.setattr(blt_hf_cli.train._Run, "fit", fit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"texts: {folder / 'texts'}\noutput: {tmp_path / 'out'}\nsize: tiny\nsteps: 40\nbatch-size: 3\ncontext: 64\n"
        "learning_rate: 1.0e-3\ncpu: true\nset: {weight_decay: 0.2, gradient_accumulation_steps: 2}\n"
    )
    run("train", "blt", "--config", recipe, "--steps", 7, "--set", "label_smoothing_factor=0.1", "--json")
    arguments = seen["arguments"]
    assert (arguments.max_steps, arguments.per_device_train_batch_size, arguments.learning_rate) == (7, 3, 1e-3)
    assert arguments.label_smoothing_factor == 0.1 and arguments.weight_decay == 0.1  # --set replaced that of the file
    sizes = [(len(row["input_ids"]), sum(row["patch_lengths"])) for row in seen["rows"]]
    assert all(size <= 64 and covered == size + 1 for size, covered in sizes)
    run("train", "blt", "--config", recipe, "--json")
    assert seen["arguments"].weight_decay == 0.2 and seen["arguments"].gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("stepz: 3", [], "sets stepz; there are batch_size, context, cpu, held_out, json"),
        ("[1, 2]", [], "holds a list"),
        ("a: [", [], "is no YAML"),
        (None, ["--set", "nothing=1"], "no field 'nothing'"),
        (None, ["--set", "weight_decay"], "NAME=VALUE"),
        (None, ["--set", "lr_scheduler_type=zigzag"], "TrainingArguments does not accept"),
        (None, ["--size", "huge"], "--size must be one of tiny"),
        (None, ["--patcher", "{}/blt"], "an entropy model is needed"),
        (None, ["--patcher", "{}/entropy", "--model", "{}/blt"], "leave out --patcher"),
    ],
)
def test_train_tells_what_is_wrong(folder, tmp_path, content, arguments, message):
    arguments = [argument.format(folder) for argument in arguments]
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
        arguments += ["--config", tmp_path / "recipe.yaml"]
    told = run("train", "blt", folder / "texts", "-o", tmp_path / "out", *arguments, status=1)
    assert message in told and told.count("\n") == 1 and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--top-p", "0.5"], "give --temperature"),
        (["generate", "a", "--system", "x"], "--system is for --chat"),
        (["generate", "a", "--chat"], "no PROMPT"),
        (["generate", "a", "--speculate", "0"], "`self_speculation_window`"),
        (["info", "{}/none"], "cannot be loaded"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    arguments = [argument.format(folder) for argument in arguments]
    if arguments[0] == "generate":
        arguments += ["-m", str(folder / "blt")]
    told = run(*arguments, status=1)
    assert message in told and "Traceback" not in told


def test_card_is_written_with_what_was_measured(folder, tmp_path):
    from huggingface_hub import ModelCard

    text = folder / "texts" / "if.txt"
    arguments = ("--license", "apache-2.0", "--language", "en", "--repo-id", "me/my-blt", "--evaluate", text)
    told = json.loads(run("card", folder / "blt", "-o", tmp_path, *arguments, "--json"))
    assert told["file"] == str(tmp_path / "README.md")
    model = AutoModelForCausalLM.from_pretrained(folder / "blt")
    expected = measure_bits_per_byte(model, [text.read_bytes()]).bits_per_byte
    assert told["bits_per_byte"][str(text)] == pytest.approx(expected, rel=1e-4)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    (result,) = [result for result in card.data.eval_results if result.metric_type == "bits_per_byte"]
    assert result.metric_value == pytest.approx(expected, abs=1e-3)
    assert "Wrote" in run("card", folder / "blt", "-o", tmp_path, "--language", "de")
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"  # what was there is kept
    assert "`license`" in run("card", folder / "blt", "-o", tmp_path, "--license", "my own", status=1)


def test_held_out_text_is_not_learned(tmp_path):
    from blt_hf.training.corpus import pack_rows
    from blt_hf_cli.train import _read

    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_bytes(b"%02d" % number * 50)
    learned, kept = _read([str(tmp_path)], None, "text")
    assert len(learned) == 23 and len(kept) == 2 and not set(learned) & set(kept)
    (one,), (end,) = _read([str(tmp_path / "00.txt")], None, "text")
    assert one + end == b"00" * 50 and len(end) == 5
    assert _read([str(tmp_path / "00.txt")], [str(tmp_path / "01.txt")], "text")[1] == [b"01" * 50]
    assert list(pack_rows([b"ab", b"c"], 4)) == [[1, 101, 102, 2], [1, 103, 2]]


def test_generate_from_a_shell(folder):
    """Once as users start it: a pipe in, bytes out, nothing else."""
    command = [sys.executable, "-m", "blt_hf_cli", "generate", "-m", str(folder / "blt"), "-n", "12"]
    done = processes.run(command, input=b"for x", capture_output=True, check=True)
    assert done.stdout == written_by(folder / "blt", "for x", max_new_tokens=12, do_sample=False)
    assert in_a_shell("generate", "--nothing", timeout=60).returncode == 2
