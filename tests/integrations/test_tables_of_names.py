"""Tables of transformers and PEFT by names of classes or model types: each of our classes is where a Llama's is."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)
from transformers.models.auto import modeling_auto

from blt_hf import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
    BltPatcherConfig,
    BltTokenizer,
)
from blt_hf.model.names_blt import TASK_TABLES
from helpers.models import make_model, tiny_config
from helpers.processes import run_elsewhere
from helpers.texts import encode
from helpers.training import make_trainer, pad_collator


TABLES = {
    BltModel: ("MODEL_MAPPING_NAMES", None),
    BltForCausalLM: ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", AutoModelForCausalLM),
    BltPatcher: ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", AutoModelForCausalLM),
    BltForSequenceClassification: (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        AutoModelForSequenceClassification,
    ),
    BltForTokenClassification: ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", AutoModelForTokenClassification),
}
BATCH = [{"input_ids": encode(text)} for text in ("some bytes, to be smoothed", "naïve")]


def make(model_class):
    config = tiny_config()
    if model_class is BltPatcher:
        return make_model(BltPatcherConfig(**config.patcher_config.to_dict()), model_class)
    torch.manual_seed(0)
    return make_model(config) if model_class is BltForCausalLM else model_class(config).eval()


def smoothed(logits: torch.Tensor, labels: torch.Tensor, factor: float) -> float:
    """The loss that label smoothing is defined by, of labels that stand where their logits are."""
    log_probs, counts = functional.log_softmax(logits.double(), dim=-1), labels != -100
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return float((-(1 - factor) * picked - factor * log_probs.mean(dim=-1))[counts].mean())


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "with LoRA"])
@pytest.mark.parametrize("model_class", [BltForCausalLM, BltPatcher])
def test_label_smoothing_shifts_labels_of_language_models(model_class, adapted, tmp_path):
    model = make(model_class)
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    batch = pad_collator(BATCH)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = smoothed(logits[:, :-1], batch["labels"][:, 1:], 0.1)
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
    with torch.no_grad():
        assert float(trainer.compute_loss(model, batch)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model_class", [BltForSequenceClassification, BltForTokenClassification])
def test_label_smoothing_leaves_labels_of_classifiers_where_they_are(model_class, tmp_path):
    model, batch = make(model_class), pad_collator(BATCH)
    is_row = model_class is BltForSequenceClassification
    batch["labels"] = torch.tensor([0, 1]) if is_row else batch["labels"].where(batch["labels"] < 0, 1)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.2)
    expected = smoothed(logits, batch["labels"], 0.2)
    with torch.no_grad():
        loss = float(trainer.compute_loss(model, batch))
    assert loss == pytest.approx(expected, abs=1e-4) and not math.isnan(loss)


@pytest.mark.parametrize("model_class", TABLES)
def test_every_class_is_in_its_table(model_class):
    name, auto_class = TABLES[model_class]
    table = getattr(modeling_auto, name)
    assert list(table.values()).count(model_class.__name__) == 1
    if auto_class is not None:
        assert TASK_TABLES[model_class.__name__] == name
        mapping = auto_class._model_mapping  # which reads the same table by model type
        assert mapping[model_class.config_class] is model_class
        assert not any(model_type.startswith("BltHf") for model_type in mapping._config_mapping)


def test_pipelines_know_the_classifiers(caplog):
    for task, model_class in (
        ("text-classification", BltForSequenceClassification),
        ("token-classification", BltForTokenClassification),
        ("text-generation", BltForCausalLM),
        ("text-generation", BltPatcher),
    ):
        pipeline(task, make(model_class), tokenizer=BltTokenizer())
    assert "is not supported" not in caplog.text


def test_default_targets_are_in_every_table_of_peft():
    """In PEFT's modules that nobody has imported yet too: a table there would be one that the package does not know."""
    constants = pytest.importorskip("peft.utils.constants")
    tables = {name: table for name, table in vars(constants).items() if isinstance(table, dict) and "llama" in table}
    assert len(tables) > 20
    for name, table in tables.items():
        assert table["blt"] == table["blt_patcher"] == table["llama"], name


REMOTE = """
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

before = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True).eval()
arguments = TrainingArguments(str(folder / "run"), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
with torch.no_grad():
    loss = float(Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids}))
changed = [name for name, value in before.items() if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] != value]
try:
    AutoModelForCausalLM.from_pretrained(folder / "model")
    refused = False
except ValueError as error:
    refused = "trust_remote_code" in str(error)
print()  # below the question whether to trust the code
print(json.dumps({"loss": loss, "changed": changed, "refused": refused}))
"""


@pytest.mark.timeout(900)
def test_code_of_a_checkpoint_adds_its_names_and_changes_none(tmp_path):
    model = make(BltPatcher)
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([encode("some bytes, to be smoothed")])
    torch.save({"source": "", "ids": ids}, tmp_path / "expected.pt")
    with torch.no_grad():
        expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.1)
    found = run_elsewhere(REMOTE, tmp_path)
    assert found == {"loss": pytest.approx(expected, abs=1e-4), "changed": [], "refused": True}
