"""`blt_hf.__all__` is the promise: exactly these names, each of them in the docs."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import blt_hf


ROOT = Path(__file__).parents[1]
PROMISED = [
    "BltCache",
    "BltConfig",
    "BltForCausalLM",
    "BltForSequenceClassification",
    "BltForTokenClassification",
    "BltGlobalTransformerConfig",
    "BltLocalDecoderConfig",
    "BltLocalEncoderConfig",
    "BltModel",
    "BltPatcher",
    "BltPatcherConfig",
    "BltPatches",
    "BltTokenizer",
    "plot_patches",
    "register_patching_rule",
]
NOT_LOADED = ("BltCache", "BltPatches", "plot_patches", "register_patching_rule")


def test_promised_names():
    assert sorted(blt_hf.__all__) == PROMISED
    namespace = {}
    exec("from blt_hf import *", namespace)
    assert set(PROMISED) <= set(namespace)


@pytest.mark.parametrize("name", PROMISED)
def test_is_documented(name):
    assert getattr(blt_hf, name).__doc__
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert re.search(rf"\b{name}\b", pages)


@pytest.mark.parametrize("name", [name for name in PROMISED if not name.endswith("Config") and name not in NOT_LOADED])
def test_auto_classes_know_it(name, tmp_path):
    """What the Auto classes make of a config, or of a folder that holds a tokenizer, is ours."""
    if name == "BltTokenizer":
        blt_hf.BltTokenizer().save_pretrained(tmp_path)
        blt_hf.BltConfig().save_pretrained(tmp_path)
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is blt_hf.BltTokenizer
        return
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "BltPatcher":
        assert type(AutoModelForCausalLM.from_config(blt_hf.BltPatcherConfig(**small))) is blt_hf.BltPatcher
        return
    config = blt_hf.BltConfig(
        patcher_config=small,
        encoder_config=small,
        decoder_config={**small, "hidden_size_global": 32},
        global_config={**small, "hidden_size": 32},
        encoder_hash_byte_group_vocab=7,
    )
    auto_class = getattr(transformers, name.replace("Blt", "Auto", 1).replace("AutoFor", "AutoModelFor"))
    assert type(auto_class.from_config(config)) is getattr(blt_hf, name)


def test_saved_configurations_come_back(tmp_path):
    for name in (name for name in PROMISED if name.endswith("Config")):
        config = getattr(blt_hf, name)()
        config.save_pretrained(tmp_path / name)
        assert type(AutoConfig.from_pretrained(tmp_path / name)) is type(config)
