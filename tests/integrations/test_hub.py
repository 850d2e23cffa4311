"""What is saved works elsewhere: with remote code where `blt_hf` is not importable, and in a plain transformers."""

import ast
import json
import pathlib
import sys

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import blt_hf
from blt_hf import (
    BltConfig,
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
    BltPatcherConfig,
)
from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers.models import make_model, tiny_config
from helpers.processes import run_elsewhere


SOURCE = pathlib.Path(blt_hf.__file__).parent / "model"
TEXT = "Some text, with naïve words: 速い"


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(tiny_config(patching_mode="entropy"), seed=21)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> pathlib.Path:
    """A folder for each kind of model, as a person would push it, and what the models answer."""
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder / "lm")
    BltTokenizer().save_pretrained(folder / "lm")
    model.model.save_pretrained(folder / "base")
    config = tiny_config(num_labels=3, patching_mode="space")
    torch.manual_seed(0)
    classifier = BltForSequenceClassification(config).eval()
    classifier.save_pretrained(folder / "classifier")
    tagger = BltForTokenClassification(config).eval()
    tagger.save_pretrained(folder / "tagger")
    model.model.patcher.save_pretrained(folder / "patcher")
    for name in ("base", "classifier", "tagger", "patcher"):
        BltTokenizer().save_pretrained(folder / name)
    ids = BltTokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save(
            {
                "source": TEXT,
                "ids": ids,
                "lm": model(ids).logits,
                "base": model.model(ids).last_hidden_state,
                "classifier": classifier(ids).logits,
                "tagger": tagger(ids).logits,
                "patcher": model.model.patcher(ids).logits,
                "text": model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None),
            },
            folder / "expected.pt",
        )
    return folder


REMOTE_CODE = """
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

def load(auto_class, name):
    loaded = auto_class.from_pretrained(folder / name, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    return loaded

seen = {}
with torch.no_grad():
    for auto_class, name in (
        (AutoModelForCausalLM, "lm"),
        (AutoModel, "base"),
        (AutoModel, "lm"),
        (AutoModelForSequenceClassification, "classifier"),
        (AutoModelForTokenClassification, "tagger"),
        (AutoModelForCausalLM, "patcher"),
    ):
        model = load(auto_class, name).eval()
        wanted = "base" if auto_class is AutoModel else name
        same(model(ids)[0], wanted)
        seen[f"{auto_class.__name__} {name}"] = type(model).__name__
    model, tokenizer = load(AutoModelForCausalLM, "lm"), AutoTokenizer.from_pretrained(folder / "lm")
    assert type(model.config).__module__.startswith("transformers_modules.")
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer(TEXT, return_tensors="pt").input_ids.tolist() == ids.tolist()
    generated = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert generated.tolist() == expected["text"].tolist()
    writer = pipeline("text-generation", model=str(folder / "lm"), trust_remote_code=True)
    seen["pipeline"] = type(writer.model).__name__
    text = writer(TEXT, max_new_tokens=10, do_sample=False, eos_token_id=None, return_full_text=False)
    seen["text"] = text[0]["generated_text"]
    # Saving there ships the code again.
    model.save_pretrained(folder / "again")
    tokenizer.save_pretrained(folder / "again")
    model = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True).eval()
    same(model(ids).logits, "lm")
    seen["again"] = sorted(path.name for path in (folder / "again").glob("*.py"))
print(json.dumps(seen))
"""


@pytest.mark.timeout(900)  # a new process that imports everything, for machines that are busy
def test_remote_code_without_the_package(saved, model):
    seen = run_elsewhere(REMOTE_CODE, saved)
    assert seen["AutoModelForCausalLM lm"] == seen["pipeline"] == "BltForCausalLM"
    assert seen["AutoModel base"] == seen["AutoModel lm"] == "BltModel"
    assert seen["AutoModelForCausalLM patcher"] == "BltPatcher"
    expected = torch.load(saved / "expected.pt")
    new = expected["text"][0, expected["ids"].shape[1] :]
    assert seen["text"] == BltTokenizer().decode(new, skip_special_tokens=True)
    assert seen["again"] == sorted(path.name for path in (saved / "lm").glob("*.py"))


PLAIN = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder / "lm").eval()
assert type(model).__module__ == "transformers.models.blt.modeling_blt", type(model).__module__
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
chat = [{"role": "user", "content": TEXT}]
print(json.dumps({
    "difference": float((logits - expected["lm"]).abs().max()),
    "ids": tokenizer(TEXT).input_ids,
    "batch": {name: rows for name, rows in tokenizer([TEXT, "short"], padding=True).items()},
    "chat": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
    "text": tokenizer.decode(ids[0], skip_special_tokens=True),
    "tokenizer": type(tokenizer).__module__,
}))
"""


def test_plain_transformers_loads_it(saved):
    """Without our code and without asking for remote code: the in-tree class, equal logits, equal ids."""
    seen = run_elsewhere(PLAIN, saved)
    if "local_attention_window_len" in transformers.models.blt.configuration_blt.BltConfig().to_dict():
        assert seen["difference"] < 1e-4
    assert seen["ids"] == torch.load(saved / "expected.pt")["ids"][0].tolist()
    assert seen["text"] == TEXT
    assert seen["tokenizer"].startswith("transformers.")
    tokenizer = BltTokenizer()
    assert seen["batch"] == dict(tokenizer([TEXT, "short"], padding=True))
    chat = [{"role": "user", "content": TEXT}]
    assert seen["chat"] == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


# The files that travel.


def shipped(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.py"))


def siblings_of(path: pathlib.Path) -> set[str]:
    return {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1
    }


@pytest.mark.parametrize("name", ["lm", "base", "classifier", "tagger", "patcher"])
def test_every_file_that_is_needed_travels(saved, name):
    """All that is reached by `from .name import`, byte for byte, and nothing that stays home."""
    needed = set()
    queue = ["stacks_blt" if name == "patcher" else "modeling_blt", "configuration_blt"]
    while queue:
        module = queue.pop()
        if module not in needed:
            needed.add(module)
            queue.extend(siblings_of(SOURCE / f"{module}.py"))
    assert {path.stem for path in shipped(saved / name)} == needed
    for path in shipped(saved / name):
        assert path.read_text() == (SOURCE / path.name).read_text()


# Whoever passes `trust_remote_code=True` has to trust these files, so few and short ones. The goal is 15 and 6,300.
MAX_FILES, MAX_LINES = 15, 6300


def test_the_folder_is_what_travels(saved):
    """File for file; all of it with a language model, and no more than the budget allows."""
    files = shipped(saved / "lm")
    assert {path.name for path in files} == {path.name for path in SOURCE.iterdir() if path.suffix} - {"__init__.py"}
    assert len(files) <= MAX_FILES and sum(len(path.read_text().splitlines()) for path in files) <= MAX_LINES


NOT_IMPORTED = {
    "concurrent",
    "ctypes",
    "gc",
    "multiprocessing",
    "queue",
    "socket",
    "subprocess",
    "_thread",
    "threading",
}
NOT_NAMED = {"_getframe", "_current_frames", "currentframe", "Thread", "Timer", "meta_path"}


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*_blt.py")), ids=lambda path: path.name)
def test_code_that_travels_does_nothing_that_a_reader_would_not_expect(path):
    """No walk over frames or over the garbage collector's objects, no thread, no file of the system, no
    module of its own making."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {module.partition(".")[0] for module in modules} & NOT_IMPORTED, ast.unparse(node)
        if isinstance(node, ast.Attribute):
            assert node.attr not in NOT_NAMED, ast.unparse(node)
        if isinstance(node, ast.Name):
            assert node.id not in NOT_NAMED | {"open", "eval", "exec"}, node.id
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "/proc" not in node.value and "/sys/" not in node.value, node.value
        if isinstance(node, ast.Assign):
            assert not any(ast.unparse(target).startswith("sys.modules") for target in node.targets), ast.unparse(node)


ALLOWED = {"torch", "transformers", "numpy", "tokenizers", "huggingface_hub", *sys.stdlib_module_names}


def test_shipped_files_are_flat(saved):
    """Siblings only as `from .name import names`: transformers' textual scan finds no other form. Only what
    transformers itself depends on from outside (the configuration takes `strict` from huggingface_hub)."""
    assert len(shipped(saved / "lm")) >= 9
    for path in shipped(saved / "lm"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module.partition(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"
                assert (SOURCE / f"{node.module}.py").exists()
                continue
            else:
                continue
            assert set(imported) <= ALLOWED, f"{path.name}: {ast.unparse(node)}"
        assert "huggingface_hub" not in path.read_text() or path.name == "configuration_blt.py"


def test_auto_maps(saved):
    maps = {
        name: json.loads((saved / name / "config.json").read_text())["auto_map"]
        for name in ("lm", "base", "patcher", "tagger")
    }
    assert maps["lm"] == maps["base"] == maps["tagger"]
    assert maps["lm"] == {
        "AutoConfig": "configuration_blt.BltConfig",
        "AutoModel": "modeling_blt.BltModel",
        "AutoModelForCausalLM": "modeling_blt.BltForCausalLM",
        "AutoModelForSequenceClassification": "modeling_blt.BltForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_blt.BltForTokenClassification",
    }
    assert maps["patcher"] == {
        "AutoConfig": "configuration_blt.BltPatcherConfig",
        "AutoModelForCausalLM": "stacks_blt.BltPatcher",
    }


def test_a_tokenizer_needs_no_code(saved, tmp_path):
    """Its files name a class of transformers; here it is a `BltTokenizer` all the same."""
    for tokenizer in (BltTokenizer(), AutoTokenizer.from_pretrained(saved / "lm")):
        assert type(tokenizer) is BltTokenizer
        tokenizer.save_pretrained(tmp_path)
        saved_as = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert saved_as["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in saved_as
        assert not list(tmp_path.glob("*.py"))


def test_architectures_are_names_that_transformers_lacks(saved):
    """So that whoever looks one up in `transformers` finds our class or nothing."""
    in_tree = set(dir(transformers.models.blt.modeling_blt))
    for name in ("lm", "base", "classifier", "tagger", "patcher"):
        architectures = json.loads((saved / name / "config.json").read_text())["architectures"]
        assert len(architectures) == 1 and architectures[0].startswith("BltHf"), architectures
        assert architectures[0] not in in_tree
        assert getattr(blt_hf, architectures[0].replace("BltHf", "Blt")) is getattr(transformers, architectures[0])


def test_configs_keep_their_model_type(saved):
    for name, model_type in (("lm", "blt"), ("base", "blt"), ("patcher", "blt_patcher")):
        config = json.loads((saved / name / "config.json").read_text())
        assert config["model_type"] == model_type
        assert (
            not {"hidden_size", "num_hidden_layers", "num_attention_heads"} & set(config)
            or model_type == "blt_patcher"
        )


def test_push_to_hub_uploads_the_code(model, monkeypatch):
    """What `push_to_hub` hands to the Hub's client."""
    uploads = []

    class Url(str):
        repo_id = "someone/blt"

    def create_commit(self, repo_id, operations, **kwargs):
        uploads.extend(operation.path_in_repo for operation in operations)

    def no_card(*args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("no card yet")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: Url("https://hub/someone/blt"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    code = {path.name for path in SOURCE.glob("*_blt.py")}
    model.push_to_hub("someone/blt")
    assert {"config.json", "model.safetensors", "generation_config.json", "modeling_blt.py", "cache_blt.py"} <= set(
        uploads
    )
    assert {name for name in uploads if name.endswith(".py")} <= code
    uploads.clear()
    BltTokenizer().push_to_hub("someone/blt")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(uploads)
    assert not any(name.endswith(".py") for name in uploads)


# Here, where the package is imported.


def test_auto_classes_know_us(saved):
    loaded = {
        "lm": AutoModelForCausalLM.from_pretrained(saved / "lm"),
        "base": AutoModel.from_pretrained(saved / "base"),
        "classifier": AutoModelForSequenceClassification.from_pretrained(saved / "classifier"),
        "tagger": AutoModelForTokenClassification.from_pretrained(saved / "tagger"),
        "patcher": AutoModelForCausalLM.from_pretrained(saved / "patcher"),
    }
    classes = [BltForCausalLM, BltModel, BltForSequenceClassification, BltForTokenClassification, BltPatcher]
    assert [type(model) for model in loaded.values()] == classes
    expected = torch.load(saved / "expected.pt")
    for name, model in loaded.items():
        torch.testing.assert_close(model.eval()(expected["ids"])[0], expected[name], atol=1e-5, rtol=1e-5)
    assert type(AutoTokenizer.from_pretrained(saved / "lm")) is BltTokenizer
    assert type(AutoConfig.from_pretrained(saved / "lm")) is BltConfig
    assert type(AutoConfig.from_pretrained(saved / "patcher")) is BltPatcherConfig
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is BltForCausalLM


def test_pipelines(saved, model):
    expected = torch.load(saved / "expected.pt")
    tokenizer = BltTokenizer()
    writer = pipeline("text-generation", model=str(saved / "lm"))
    assert type(writer.model) is BltForCausalLM and type(writer.tokenizer) is BltTokenizer
    new = tokenizer.decode(expected["text"][0, expected["ids"].shape[1] :], skip_special_tokens=True)
    arguments = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    assert writer(TEXT, **arguments)[0]["generated_text"] == new
    several = writer([TEXT, "a", "longer than one byte"], batch_size=3, **arguments)
    assert several[0][0]["generated_text"] == new, "rows of a batch do not see one another"

    features = pipeline("feature-extraction", model=str(saved / "base"))
    torch.testing.assert_close(features(TEXT, return_tensors=True), expected["base"], atol=1e-5, rtol=1e-5)

    classify = pipeline("text-classification", model=str(saved / "classifier"), top_k=None)
    wanted = expected["classifier"][0].softmax(-1).tolist()
    for answers in classify([TEXT, "x"], batch_size=2)[:1], classify([TEXT]):
        scores = {answer["label"]: answer["score"] for answer in answers[0]}
        assert [scores[f"LABEL_{index}"] for index in range(3)] == pytest.approx(wanted, abs=1e-5)

    tags = pipeline("token-classification", model=str(saved / "tagger"))(TEXT)
    assert len(tags) == expected["ids"].shape[1] - 1  # BOS is special
