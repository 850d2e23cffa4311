"""Model cards: metadata that the Hub understands, figures of the model itself, and what was written before is kept."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from blt_hf import BltForSequenceClassification, BltForTokenClassification, BltModel
from blt_hf.evaluation import Measurement, make_model_card, measure_bits_per_byte, write_model_card
from helpers.models import make_model, tiny_config


GOOD = {
    "repo_id": "ada/my-blt",
    "license": "apache-2.0",
    "language": ["en", "de"],
    "datasets": "ada/texts",
    "base_model": ["ada/base"],
    "tags": "test",
}


def test_metadata_comes_back(tiny_model, tmp_path):
    """What the Hub's client reads from the file is what was given, results included."""
    measured = measure_bits_per_byte(tiny_model, ["Some text to measure."])
    file = write_model_card(tiny_model, tmp_path, bits_per_byte={"Some text": measured, "ada/texts": 2.5}, **GOOD)
    data = ModelCard.load(file).data
    assert file == tmp_path / "README.md"
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.language, data.datasets, data.base_model) == (["en", "de"], ["ada/texts"], ["ada/base"])
    assert data.tags == ["blt", "byte-level", "tokenizer-free", "test"]
    assert data.model_name == "my-blt"
    results = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert results["Some text", "bits_per_byte"].metric_value == pytest.approx(measured.bits_per_byte, abs=1e-4)
    assert results["Some text", "bytes_per_patch"].metric_value == pytest.approx(measured.bytes_per_patch, abs=1e-3)
    assert results["Some text", "bits_per_byte"].dataset_type == "some-text"
    assert results["ada/texts", "bits_per_byte"].dataset_type == "ada/texts"
    assert ("ada/texts", "bytes_per_patch") not in results
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_folder_tells_what_the_model_tells(tiny_model, tmp_path):
    """From a folder only the configuration is read: weights may be missing, and the figures are the same."""
    tiny_model.save_pretrained(tmp_path / "my-blt")
    (tmp_path / "my-blt" / "model.safetensors").unlink()
    card = make_model_card(tmp_path / "my-blt")
    assert card.content == make_model_card(tiny_model, repo_id="my-blt").content
    assert write_model_card(tmp_path / "my-blt") == tmp_path / "my-blt" / "README.md"


def test_figures_are_those_of_the_model(tiny_model):
    text = make_model_card(make_model(tiny_config(patching_mode="entropy"))).text
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    counted = sum(float(row.rsplit("| ", 1)[1].split()[0]) for name, row in rows.items() if name != "part")
    assert counted == pytest.approx(tiny_model.num_parameters() / 1e6, abs=0.03)  # each rounded to 0.01 million
    assert rows["global transformer"].startswith("2 | 32 |")
    assert "the entropy of the next byte is above" in text


RULES = {
    "rises by more than": {"patching_mode": "entropy", "monotonicity": True},
    "and has risen by more than 0.25": {"patching_mode": "entropy", "patching_threshold_add": 0.25},
    "after spaces": {"patching_mode": "space"},
    "every 6 bytes": {"patching_mode": "static", "patch_size": 6},
    "at every byte": {"patching_mode": "byte"},
    "none is longer than 9 bytes": {"patching_mode": "space", "max_patch_length": 9},
}


@pytest.mark.parametrize("sentence", RULES)
def test_rules_in_words(sentence):
    from transformers import AutoModelForCausalLM

    assert sentence in make_model_card(AutoModelForCausalLM.from_config(tiny_config(**RULES[sentence]))).text


def test_other_models(tiny_model, tmp_path):
    for model_class, task in (
        (BltForSequenceClassification, "text-classification"),
        (BltForTokenClassification, "token-classification"),
        (BltModel, "feature-extraction"),
    ):
        model_class(tiny_config(num_labels=3)).save_pretrained(tmp_path / task)
        card = make_model_card(tmp_path / task, repo_id="ada/other")
        assert card.data.pipeline_tag == task
        assert f'pipeline("{task}", model="ada/other")' in card.text
    patcher = make_model(tiny_config(patching_mode="entropy")).model.patcher
    card = make_model_card(patcher, repo_id="ada/patcher")
    assert "whose entropies cut text" in card.text and "| layers | 2 | 16 |" in card.text


@pytest.mark.parametrize("saved", [False, True])
def test_adapters(saved, tmp_path):
    """PEFT's library, the base by its id on the Hub; a base that is a folder of this machine is not told."""
    base = make_model(tiny_config(patching_mode="entropy"))
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = "ada/base"
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    if saved:
        model.save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "ada/base"
        config["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        model = tmp_path / "adapter"
    card = make_model_card(model, repo_id="ada/adapter")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert card.data.get("base_model") == (None if saved else "ada/base")
    assert 'AutoPeftModelForCausalLM.from_pretrained("ada/adapter")' in card.text


def test_what_was_written_before_is_kept(tiny_model, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nbase_model: ada/old\ntags: [mine]\nwidget: hello\n---\n\n# Mine\n\nBy hand.\n"
    )
    write_model_card(tiny_model, tmp_path, base_model="ada/new", bits_per_byte={"A": 3.0, "B": 2.0}, tags="more")
    write_model_card(tiny_model, tmp_path, bits_per_byte={"A": 1.0})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# Mine\n\nBy hand."
    assert (card.data.license, card.data.base_model, card.data.widget) == ("mit", "ada/new", "hello")
    assert card.data.tags == ["mine", "blt", "byte-level", "tokenizer-free", "more"]
    assert {result.dataset_name: result.metric_value for result in card.data.eval_results} == {"A": 1.0, "B": 2.0}

    write_model_card(tiny_model, tmp_path, overwrite=True, repo_id="ada/blt")
    text = (tmp_path / "README.md").read_text()
    assert "By hand" not in text
    assert set(yaml.safe_load(text.split("---")[1])) == {"library_name", "pipeline_tag", "tags"}


def test_a_file_without_metadata_gets_some(tiny_model, tmp_path):
    (tmp_path / "card.md").write_text("Words only.\n")
    write_model_card(tiny_model, tmp_path / "card.md", license="mit")
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.license == "mit" and card.text.strip() == "Words only."


BAD = {
    "license": "Apache 2.0",
    "language": "English",
    "datasets": ["/home/ada/texts"],
    "base_model": "./runs/blt",
    "repo_id": "ada/my/blt",
    "bits_per_byte": {"A text": float("nan")},
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_hub_would_refuse(name, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}"):
        write_model_card(tiny_model, tmp_path, **{**GOOD, name: BAD[name]})
    assert not list(tmp_path.iterdir())


def test_other_mistakes(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="`license_name`"):
        make_model_card(tiny_model, license="other")
    with pytest.raises(ValueError, match="`path` is needed"):
        write_model_card(tiny_model)
    with pytest.raises(ValueError, match="`path` must be a folder"):
        write_model_card(tiny_model, tmp_path / "missing")
    with pytest.raises(ValueError, match="`model`.*configuration"):
        make_model_card(tmp_path)
    with pytest.raises(ValueError, match="`model` must be a BLT"):
        make_model_card(object())
    assert isinstance(make_model_card(tiny_model, bits_per_byte={"!": MEASURED}), ModelCard)


MEASURED = Measurement(
    bits_per_byte=2.0, nats=1.0, num_texts=1, num_bytes=1, num_tokens=1, bytes_per_patch=None, seconds=1.0
)
