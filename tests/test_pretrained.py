"""The small BLT that comes with the project."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import blt_hf
from blt_hf.evaluation import measure_bits_per_byte


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "pretrained" / "blt-5m"
# Written for this test, so no corpus holds them.
TEXTS = [
    "The function returns a list of the names that were found in the given module, or None if there are none.",
    "Install the package on the server, then restart the service and check that the new configuration was read.",
]


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_example(name: str):
    return load_script(ROOT / "examples" / "pretrain_small" / f"{name}.py")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12e6


def test_its_code_is_that_of_src():
    """After a module of the model was added, renamed or removed: `python scripts/link_code.py`."""
    link_code = load_script(ROOT / "scripts" / "link_code.py")
    files = {file.name: file for file in FOLDER.glob("*.py")}
    assert sorted(files) == link_code.needed_files()
    for name, file in files.items():
        assert file.read_text() == (link_code.SOURCE / name).read_text()


def test_its_code_survives_an_archive(tmp_path):
    """Links that were unpacked as files of one line become links again, or copies where links cannot be."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src" / "blt_hf" / "model", tree / "src" / "blt_hf" / "model")
    (tree / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "link_code.py", tree / "scripts")
    folder = tree / "pretrained" / "blt-5m"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "config.json", folder)
    for file in FOLDER.glob("*.py"):
        (folder / file.name).write_text(f"../../src/blt_hf/model/{file.name}")
    for option, is_link in (("--copy", False), (None, True)):
        subprocess.run([sys.executable, tree / "scripts" / "link_code.py", *filter(None, [option])], check=True)
        files = list(folder.glob("*.py"))
        assert len(files) == len(list(FOLDER.glob("*.py")))
        for file in files:
            assert file.is_symlink() == is_link and file.read_text() == (FOLDER / file.name).read_text()
            assert not is_link or not os.path.isabs(os.readlink(file))


def test_its_configuration_is_what_would_be_saved(model, tmp_path):
    """So it names the code, and an architecture that only this code has."""
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in FOLDER.glob("*.py")}
    for name in ("config.json", "tokenizer_config.json"):
        saved, bundled = (json.loads((folder / name).read_text()) for folder in (tmp_path, FOLDER))
        for entry in ("auto_map", "architectures", "model_type", "tokenizer_class"):
            assert saved.get(entry) == bundled.get(entry), entry


def test_it_loads_in_fp32_with_a_frozen_patcher(model):
    assert isinstance(model, blt_hf.BltForCausalLM)
    assert model.dtype == torch.float32 and model.config.use_cache
    assert not any(p.requires_grad for p in model.model.patcher.parameters())
    assert isinstance(AutoTokenizer.from_pretrained(FOLDER), blt_hf.BltTokenizer)


def test_it_has_learned(model):
    found = measure_bits_per_byte(model, TEXTS)
    assert found.bits_per_byte < 2.6  # a uniform guess needs 8; the entropy model alone, about 3
    assert 3 < found.bytes_per_patch < 7


def test_it_generates(model):
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(FOLDER))
    text = generator("The import statement ", max_new_tokens=60, do_sample=False)[0]["generated_text"]
    words = text.removeprefix("The import statement ").split()
    assert len(words) > 5 and sum(word.strip(".,()`'\":").isalpha() for word in words) > len(words) / 2


def test_the_card_says_where_it_comes_from():
    card = (FOLDER / "README.md").read_text()
    assert "{" not in card.split("## Samples")[0] and "learning_curves.png" in card
    for package in load_example("corpus").PACKAGES:
        assert f"`{package}`" in card


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_its_training_script_runs(tmp_path, monkeypatch):
    """Two steps of each stage, on a corpus of a few lines."""
    corpus, train = load_example("corpus"), load_example("train")
    texts = [" ".join(f"Word {i} and {j}." for j in range(120)) for i in range(60)]
    sources = ["handbook, en", "Python code", "WordNet"]
    for part in ("train", "heldout"):
        documents = [{"source": sources[i % 3], "text": text} for i, text in enumerate(texts)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    assert corpus.is_held_out("x") in (True, False)
    for stage in train.STAGES:
        arguments = [
            "train.py",
            stage,
            "--corpus",
            tmp_path,
            "--output",
            tmp_path / "runs",
            "--steps",
            "2",
            "--no-bf16",
        ]
        monkeypatch.setattr("sys.argv", list(map(str, arguments)))
        train.main()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "blt")
    log = json.loads((tmp_path / "runs" / "blt" / "log.json").read_text())
    assert loaded.config.patching_threshold > 0 and log["steps"] == 2 and log["curve"][-1]["bits_per_byte"] > 1


def test_the_corpus_reads_pages():
    """Paragraphs, titles once, no navigation; listings keep their lines."""
    parser = load_example("corpus").Paragraphs()
    parser.feed(
        "<html><head><title>no</title></head><body><ul class='docnav'><li>no<br>no</li></ul><h1>Title</h1>"
        "<h2>Title</h2><p>Some  text &amp;\n more</p><pre>a\n  b</pre></body></html>"
    )
    assert parser.found == ["Title", "Some text & more", "a\n  b"]
