"""Folders that exist already load: what earlier versions saved, and the bundled model, with and without code."""

import json
import pathlib
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.blt.configuration_blt import BltConfig as InTreeConfig

import blt_hf
from blt_hf.model.names_blt import CACHE_NAME
from helpers.processes import run_elsewhere


pytestmark = pytest.mark.timeout(900)  # a new process that imports everything, for machines that are busy
FILES = pathlib.Path(__file__).with_name("files")
BUNDLED = pathlib.Path(__file__).parents[2] / "pretrained" / "blt-5m"
SAVED = ("8dad2dd", "659172c")
TEXT = "The import statement "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """What `save_pretrained` of these commits wrote, with a text, its ids and 8 logits of each byte.

    The later one also has a mask embedding, and says what it writes greedily after the text. Its code is of the time when
    block diffusion, continuous batching and patches as data travelled.
    """
    folder = tmp_path_factory.mktemp("folders")
    for name in SAVED:
        with zipfile.ZipFile(FILES / f"saved_by_{name}.zip") as archive:
            archive.extractall(folder / name)
    (folder / "bundled").symlink_to(BUNDLED, target_is_directory=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save({"source": TEXT, "ids": ids, "bundled": model(ids).logits}, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_an_earlier_version_saved_it(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert type(model) is blt_hf.BltForCausalLM and type(tokenizer) is blt_hf.BltTokenizer
    expected = json.loads((folder / name / "expected.json").read_text())
    assert tokenizer(expected["text"]).input_ids == expected["ids"]
    with torch.no_grad():
        logits = model(torch.tensor([expected["ids"]])).logits[0, :, :8]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)
    for settings in ({}, {"diffusion_block_size": 3, "verify": True}) if "written" in expected else ():
        out = model.generate(
            torch.tensor([expected["ids"]]), max_new_tokens=12, do_sample=False, eos_token_id=None, **settings
        )
        assert out[0, len(expected["ids"]) :].tolist() == expected["written"], settings


ELSEWHERE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers

seen = {}
# The code that was saved then does not know the name that transformers 5.24 gave to the cache.
has_new_name = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
cases = [("bundled", TEXT, ids.tolist()[0], expected["bundled"][0])]
written = {}
for name in ("659172c", "8dad2dd"):
    old = json.loads((folder / name / "expected.json").read_text())
    cases.append((name, old["text"], old["ids"], torch.tensor(old["logits"])))
    written[name] = old.get("written")
for trust in (False, True):  # plain transformers first: code of the earliest version changes it
    for name, text, text_ids, wanted in cases:
        if trust and name == "8dad2dd" and has_new_name:
            continue
        arguments = {"trust_remote_code": True} if trust else {}
        model = AutoModelForCausalLM.from_pretrained(folder / name, **arguments).eval()
        with torch.no_grad():
            logits = model(torch.tensor([text_ids]), use_cache=False).logits[0, :, : wanted.shape[-1]]
        seen[f"{name} {trust}"] = [type(model).__module__, float((logits - wanted).abs().max())]
        if trust or name == "bundled":
            tokenizer = AutoTokenizer.from_pretrained(folder / name, **arguments)
            assert tokenizer(text).input_ids == text_ids
        if trust and written.get(name):
            out = model.generate(torch.tensor([text_ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert out[0, len(text_ids) :].tolist() == written[name]
        if trust and name == "bundled":
            assert transformers.BltForCausalLM.__module__.startswith("transformers.models.blt")
            named = getattr(transformers, model.config.architectures[0]).from_pretrained(folder / name, **arguments)
            assert type(named) is type(model)
            out = model.generate(torch.tensor([text_ids]), max_new_tokens=30, do_sample=False)
            seen["text"] = tokenizer.decode(out[0], skip_special_tokens=True)
print(json.dumps(seen))
"""


def test_they_load_where_the_package_is_not(folder):
    seen = run_elsewhere(ELSEWHERE, folder)
    for name in ("bundled", *SAVED):
        if name != "8dad2dd" or CACHE_NAME != "cache":
            module, difference = seen[f"{name} True"]
            assert module.startswith("transformers_modules.") and module.endswith("modeling_blt")
            assert difference < 1e-4, (name, difference)
        module, difference = seen[f"{name} False"]
        assert module == "transformers.models.blt.modeling_blt"
        # The windows of the old ones are shorter than their texts, and the in-tree class of 5.17 knows no windows.
        if name == "bundled" or "local_attention_window_len" in InTreeConfig().to_dict():
            assert difference < 1e-4, (name, difference)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    out = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert seen["text"] == tokenizer.decode(out[0], skip_special_tokens=True)
