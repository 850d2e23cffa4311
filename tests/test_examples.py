"""Every example runs, in a small setting."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import blt_hf  # noqa: F401
from helpers.hub_server import HubServer
from helpers.processes import run, run_example


ROOT = Path(__file__).parents[1]


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


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
LONGER = {"fast_blt.py", "quickstart.py", "spelling.py"}  # they have pages and tests of their own
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_every_example_is_in_the_gallery():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert not [name for name in EXAMPLES if f"(../examples/{name})" not in page]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in LONGER])
def test_gallery_is_short_and_says_how_long_it_takes(name):
    source = (ROOT / "examples" / name).read_text()
    header = source[:1500]
    assert len(source.splitlines()) < 120
    assert re.search(r"Takes (about )?(a|half a|\d+) (minute|hour)s? on two cores", header)


@pytest.mark.slow
def test_from_scratch_to_an_adapter(tmp_path):
    """A BLT is trained, then fine-tuned with LoRA."""
    options = ("--size", "tiny", "--steps", 2, "--context", 64, "--batch", 2, "--cpu")
    printed = run_example("train_blt.py", *options, "--output", tmp_path / "scratch")
    assert re.search(r"bits per byte on held-out text: \d+\.\d\d", printed)
    model = tmp_path / "scratch" / "model"
    printed = run_example("finetune_lora.py", "--model", model, "--output", tmp_path / "lora", "--steps", 2, "--cpu")
    assert "\nlemon -> " in printed
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_blt_learns_to_fill_in_blocks(tmp_path):
    text = " ".join(f"Word {i} and {j}." for i in range(20) for j in range(12))
    for part in ("train", "heldout"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"source": "Python code", "text": text}) + "\n")
    options = ("--steps", 2, "--context", 64, "--rows", 1, "--corpus", tmp_path, "--output", tmp_path / "fast")
    options += ("--blend", 0.5)
    facts = json.loads(run_example("fast_blt.py", *options).splitlines()[-1])
    assert set(facts["bits of a block's byte"]) == {"4", "8", "16"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    ids = AutoTokenizer.from_pretrained(tmp_path / "fast")("Word ", return_tensors="pt")
    plain, verified = (
        model.generate(**ids, max_new_tokens=12, do_sample=False, **more)
        for more in ({}, {"diffusion_block_size": 4, "verify": True})
    )
    assert verified.equal(plain)


@pytest.mark.slow
def test_published_folder_works_for_strangers(tmp_path):
    """And arrives on a Hub (a small one, on this machine), as one private commit."""
    with HubServer() as hub:
        printed = run_example(
            "publish.py", "--output-dir", tmp_path / "out", "--repo", "ada/my-blt",
            HF_ENDPOINT=hub.url, HF_TOKEN="hf_writer", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
            HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert hub.repos["ada/my-blt"].is_private
    assert "The same text with its own code." in printed and "The same text with plain transformers." in printed
    assert printed.splitlines()[-1] == "Uploaded to ada/my-blt."


@pytest.mark.slow
def test_server_answers(tmp_path):
    printed = run_example("serve.py", "--max-bytes", 16, HF_HOME=str(tmp_path))
    assert re.search(r"^completion: '.+'$", printed, re.M)
    assert re.search(r"^chat, in \d+ pieces: ", printed, re.M)


def test_notebooks_are_those_of_the_scripts():
    sys.path.insert(0, str(ROOT / "examples" / "notebooks"))
    try:
        import make
    finally:
        sys.path.pop(0)
    assert sorted(make.NAMES) == [path.stem for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        script = (ROOT / "examples" / f"{path.stem}.py").read_text()
        assert json.loads(path.read_text()) == make.make_notebook(script), f"run {make.__file__}"


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> Path:
    """Pages of two languages, in the shape of Debian's installation guide."""
    folder = tmp_path_factory.mktemp("guide")
    sentences = {
        "de": "Das Paket ist auf dem Rechner installiert. ",
        "en": "The package is installed on the machine. ",
    }
    for language, sentence in sentences.items():
        (folder / language).mkdir()
        for number in range(5):
            (folder / language / f"ch0{number}.html").write_text(f"<html><body><p>{sentence * 20}</p></body></html>")
    return folder


EXPECTED = {
    "chat_sft": r"letters: \d of 2 right",
    "classify_language": r"80 +\d+\.\d% +\d+\.\d%",
    "noise_robustness": r"CAPITALS +BLT \d+\.\d\d \([+-]\d+\.\d\d\), Llama with BPE \d+\.\d\d",
}


def in_jupyter(path: Path, folder: Path) -> str:
    """What a notebook prints, executed as Jupyter would."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def in_one_piece(path: Path, folder: Path) -> str:
    """The same without Jupyter: the cells one after the other in a new process."""
    code = [cell["source"] for cell in nbformat.read(path, as_version=4).cells if cell["cell_type"] == "code"]
    done = run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# A kernel of Jupyter's takes long to come to its work, so that the default run starts one only.
RUNS = [
    pytest.param(path, execute, id=f"{path.stem}-{execute.__name__}", marks=() if is_default else pytest.mark.slow)
    for path in NOTEBOOKS
    for execute in (in_jupyter, in_one_piece)
    for is_default in [(execute is in_jupyter) == (path.stem == "classify_language")]
]


@pytest.mark.parametrize(("path", "execute"), RUNS)
def test_notebooks_run(path, execute, guide, tmp_path, monkeypatch):
    """With a few steps of training."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.setenv("BLT_EXAMPLE_SMALL", "1")
    monkeypatch.setenv("BLT_EXAMPLE_TEXTS", str(guide))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = execute(path, tmp_path)
    assert re.search(EXPECTED[path.stem], printed), printed
