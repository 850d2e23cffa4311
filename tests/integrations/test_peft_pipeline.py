"""`pipeline("text-generation")` on adapters: as a model, and as a folder that holds nothing but an adapter."""

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, pipeline

from blt_hf import BltTokenizer
from helpers.adapters import CAUSAL, adapt, check_patcher_untouched
from helpers.models import make_model
from helpers.processes import run


PROMPTS = ["The import", "Small layers, next to large ones"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model saved with its tokenizer, and an adapter of it, in a folder of its own."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    make_model().save_pretrained(base)
    BltTokenizer().save_pretrained(base)
    model = adapt(LoraConfig(**CAUSAL, target_modules="all-linear"), AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(adapter)
    return base, adapter


@pytest.fixture(scope="module")
def adapted(folders) -> PeftModel:
    base, adapter = folders
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@pytest.fixture(scope="module")
def expected(folders, adapted) -> list[str]:
    """What `generate` writes with the adapter, which is something else than what it writes without."""
    texts = [write(adapted, prompt) for prompt in PROMPTS]
    with adapted.disable_adapter():
        assert all(write(adapted, prompt) != text for prompt, text in zip(PROMPTS, texts))
    return texts


def write(model, prompt: str) -> str:
    tokenizer = BltTokenizer()
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), **GREEDY)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def written(results) -> list[str]:
    return [result[0]["generated_text"] for result in results]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_adapted_model(adapted, expected, batch_size):
    """In batches too, where the shorter prompt is padded."""
    writer = pipeline("text-generation", model=adapted, tokenizer=BltTokenizer())
    assert written(writer(PROMPTS, batch_size=batch_size, **GREEDY)) == expected


@pytest.mark.parametrize("tokenizer", [BltTokenizer(), None], ids=["given", "of_the_base"])
def test_folder_of_an_adapter(folders, expected, tokenizer):
    _, adapter = folders
    assert not (adapter / "config.json").exists()
    writer = pipeline("text-generation", model=str(adapter), tokenizer=tokenizer)
    assert written(writer(PROMPTS, **GREEDY)) == expected
    check_patcher_untouched(writer.model)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_auto_classes_on_the_folder(folders, adapted, auto_class):
    _, adapter = folders
    model = auto_class.from_pretrained(adapter).eval()
    check_patcher_untouched(model)
    ids = BltTokenizer()(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_folder_of_an_adapter_without_this_package(folders, expected, tmp_path):
    """`trust_remote_code=True` finds the code beside the weights of the base."""
    _, adapter = folders
    code = f"""
import sys
from transformers import pipeline
writer = pipeline("text-generation", model={str(adapter)!r}, trust_remote_code=True)
assert "blt_hf" not in sys.modules
results = writer({PROMPTS!r}, **{GREEDY!r})
assert [result[0]["generated_text"] for result in results] == {expected!r}, results
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
