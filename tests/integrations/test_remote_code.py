"""Code that came with a checkpoint, with and without the package installed: what it does, and what it refuses."""

import pathlib
import re

import pytest
import torch

import blt_hf
from blt_hf import BltForTokenClassification, BltTokenizer
from helpers.models import make_model, tiny_config
from helpers.processes import run_elsewhere


pytestmark = pytest.mark.timeout(900)  # a new process that imports everything, for machines that are busy
TEXT = "Some text, with naïve words: 速い"
# Lets a process that `run_elsewhere` has started find the package, as where it is installed; nobody has imported it.
INSTALLED = f"""
sys.meta_path = [finder for finder in sys.meta_path if type(finder) is not Absent]
sys.path.insert(0, {str(pathlib.Path(blt_hf.__file__).parents[1])!r})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("remote")
    model = make_model(tiny_config(patching_mode="entropy"), seed=21)
    model.save_pretrained(folder / "lm")
    for name in ("lm", "blocks", "tagger"):
        BltTokenizer().save_pretrained(folder / name)
    make_model(tiny_config(patching_mode="entropy", diffusion_block_size=4), seed=21).save_pretrained(
        folder / "blocks"
    )
    BltForTokenClassification(tiny_config(num_labels=3, patching_mode="space")).save_pretrained(folder / "tagger")
    ids = BltTokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        torch.save({"source": TEXT, "ids": ids, "lm": model(ids).logits, "text": text}, folder / "expected.pt")
    return folder


# The table in docs/hub.md: a program for each feature, which ends without an error where the cell says yes.
FEATURES = {
    "one answer: whole, with a cache, byte by byte, padded, packed": """
model = load("lm")
with torch.no_grad():
    same(model(ids).logits, "lm")
    out = model(ids[:, :7], use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    pieces = [out.logits, model(ids[:, 7:12], past_key_values=cache, use_cache=True).logits]
    pieces += [model(i, past_key_values=cache, use_cache=True).logits for i in ids[:, 12:].split(1, dim=1)]
    same(torch.cat(pieces, dim=1), "lm")
    padded, mask = torch.cat([torch.zeros(1, 5).long(), ids], 1), torch.cat([torch.zeros(1, 5), torch.ones(ids.shape)], 1)
    same(model(padded, attention_mask=mask).logits[:, 5:], "lm")
    packed = model(torch.cat([ids, ids], 1), position_ids=torch.arange(ids.shape[1]).repeat(2)[None], use_cache=False)
    same(packed.logits[:, ids.shape[1] :], "lm")
""",
    "saved folders have code and load again": """
load("lm").save_pretrained(folder / "again")
assert (folder / "again" / "modeling_blt.py").exists()
with torch.no_grad():
    same(load("again")(ids).logits, "lm")
""",
    "`generate`: greedy, sampling, beams, streaming, several turns, prompts in chunks": """
from transformers import TextStreamer
model = load("lm")
assert model.generate(ids, **greedy).tolist() == expected["text"].tolist()
model.generate(ids, max_new_tokens=4, do_sample=True)
model.generate(ids, max_new_tokens=4, num_beams=3)
assert model.generate(ids, **greedy, prefill_chunk_size=5).tolist() == expected["text"].tolist()
out = model.generate(ids[:, :9], max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
again = model.generate(ids[:, :9], **greedy, streamer=TextStreamer(tokenizer("lm")))
""",
    "self-speculation (`self_speculation_window`)": """
model = load("lm")
for window in (3, "auto"):
    assert model.generate(ids, **greedy, self_speculation_window=window).tolist() == expected["text"].tolist()
""",
    'compiled steps, CUDA graphs (`cache_implementation="static"`)': """
from transformers import CompileConfig
static = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
assert load("lm").generate(ids, **greedy, **static).tolist() == expected["text"].tolist()
""",
    "prompts where torch's own products are slow": """
model = load("lm")
layers = sys.modules[type(model).__module__.rsplit(".", 1)[0] + ".layers_blt"]
assert (layers._products is not None) == with_package
prompt = ids.repeat(1, 96 // ids.shape[1] + 1)
with torch.no_grad():
    whole, halves = model(prompt).logits, torch.cat([model(row).logits for row in prompt.repeat(2, 1).split(1)])
torch.testing.assert_close(halves, whole.expand_as(halves))
""",
    "continuous batching, `transformers serve --continuous-batching`": """
from transformers import GenerationConfig
config = GenerationConfig(**{**greedy, "pad_token_id": 0})
(output,) = load("lm").generate_batch(ids.tolist(), generation_config=config).values()
assert ids[0].tolist() + output.generated_tokens == expected["text"][0].tolist()
""",
    "Fast BLT, writing (`diffusion_block_size`)": """
model = load("blocks")
assert model.generate(ids, **greedy).shape == expected["text"].shape  # byte by byte
model.generate(ids, **greedy, diffusion_block_size=4)
""",
    "Fast BLT, training on masked blocks": """
model = load("blocks").train()
model.config.diffusion_loss_weight = 0
assert torch.isfinite(model(ids, labels=ids).loss)
model.config.diffusion_loss_weight = 1.0
assert model(ids, labels=ids).masked_loss > 0
""",
    "patches of a forward (`output_patches=True`)": """
with torch.no_grad():
    out = load("lm")(ids, output_patches=True)
assert out.patch_lengths.sum() == ids.shape[1] + 1 and out.entropies.shape == ids.shape
""",
    "patches as data and pictures (`get_patches`)": """
model = load("lm")
assert sum(model.get_patches(TEXT).patch_lengths) == ids.shape[1]
""",
    "patching rules of your own": """
from transformers import AutoConfig, AutoModelForCausalLM
if with_package:
    blt_hf.register_patching_rule("vowels", lambda ids, entropies, positions, rule: ids[..., -1] == 101)
config = AutoConfig.from_pretrained(folder / "lm", trust_remote_code=True, patching_mode="vowels")
AutoModelForCausalLM.from_config(config, trust_remote_code=True)(ids)
""",
    "the tokenizer": """
assert tokenizer("lm")(TEXT).input_ids == ids[0].tolist()
assert tokenizer("lm").decode(ids[0], skip_special_tokens=True) == TEXT
""",
    "`torch.export`, whole-graph `torch.compile`, ONNX": """
model = load("lm")
program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
same(program.module()(input_ids=ids, use_cache=False).logits, "lm")
""",
    "training with `Trainer`, the entropy model frozen": """
from transformers import Trainer, TrainingArguments
model = load("lm")
before = {name: weight.clone() for name, weight in model.named_parameters()}
settings = {"max_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
arguments = TrainingArguments(folder / "run", **settings)
Trainer(model, arguments, train_dataset=[{"input_ids": ids[0], "labels": ids[0]}]).train()
changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
assert "lm_head.weight" in changed and not any("patcher" in name for name in changed)
""",
    "adapters of PEFT, also in TRL": """
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(load("lm"), LoraConfig(task_type="CAUSAL_LM")).train()
adapted(input_ids=ids, labels=ids).loss.backward()
assert not any("patcher" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
""",
    "classifiers and pipelines": """
from transformers import pipeline
assert load("tagger", "AutoModelForTokenClassification")(ids).logits.shape == (*ids.shape, 3)
writer = pipeline("text-generation", model=str(folder / "lm"), trust_remote_code=True)
assert writer(TEXT, **greedy)[0]["generated_text"].startswith(TEXT)
""",
    "warnings of mistyped fields of a configuration": """
from transformers import AutoConfig
from transformers.utils import logging
told, logger = [], logging.get_logger("blt_hf.unknown_fields")
logger.warning_once = lambda message, *_: told.append(message)
type(AutoConfig.from_pretrained(folder / "lm", trust_remote_code=True))(patching_treshold=1.0)
assert len(told) == with_package
""",
    "memory of a row (`BltCache.memory`)": """
model = load("lm")
assert model.make_cache().memory(model.config, num_bytes=100, num_patches=30) > 0
""",
    "the command line, Meta's checkpoints, calibration, byteify, patches of a corpus, bits per byte, model cards": """
import importlib
for name in ("cli", "conversion", "training.calibration", "training.byteify", "training.corpus", "evaluation"):
    importlib.import_module(f"blt_hf.{name}")
""",
    "OpenAI's protocol (`blt_hf.serving.server`)": """
import blt_hf.serving.server
""",
}
RUN_FEATURES = f"""
import transformers
greedy = {{"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}}

def load(name, auto_class="AutoModelForCausalLM"):
    model = getattr(transformers, auto_class).from_pretrained(folder / name, trust_remote_code=True).eval()
    assert type(model).__module__.partition(".")[0] == ("blt_hf" if with_package else "transformers_modules")
    return model

def tokenizer(name):
    return transformers.AutoTokenizer.from_pretrained(folder / name)

seen = {{}}
for feature, program in {FEATURES!r}.items():
    try:
        exec(program)
        seen[feature] = "yes"
    except (ImportError, ValueError) as error:
        seen[feature] = f"`{{type(error).__name__}}` {{error}}"
    except Exception as error:
        raise AssertionError(feature) from error
print(json.dumps(seen))
"""


def table_of_features() -> dict[str, list[str]]:
    """The cells of the table in docs/hub.md by feature."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    (table,) = re.findall(r"^\| feature \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return {feature: cells for feature, *cells in rows}


@pytest.mark.parametrize("column", [0, 1], ids=["remote code alone", "with the package"])
def test_the_table_of_features(folder, column):
    """Each cell, by a program that a user could have written."""
    table = table_of_features()
    assert table.keys() == FEATURES.keys()
    prelude = "with_package = False\n" if column == 0 else INSTALLED + "import blt_hf\nwith_package = True\n"
    seen = run_elsewhere(prelude + RUN_FEATURES, folder)
    for feature, cells in table.items():
        said = re.match(r"yes|`\w+Error`", cells[column])[0]
        assert seen[feature].startswith(said), (feature, seen[feature])
        if said != "yes":  # our own errors say what to install; a module of the package is just not found
            assert re.search("pip install blt-hf|package blt_hf|blt_hf is not installed", seen[feature]), seen[feature]


ADAPT = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

seen = {}
for name, arguments in {"plain": {}, "excluded": {"exclude_modules": r".*patcher.*"}}.items():
    model = AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=True)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments))
    with torch.no_grad():
        same(adapted.eval()(input_ids=ids).logits, "lm")  # only training is refused
    try:
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
    except ValueError as error:
        seen[name] = str(error)
    else:
        trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert trained and all(weight.grad is not None for weight in trained.values())
        seen[name] = sorted({name.split(".")[3] for name in trained})
print(json.dumps(seen))
"""


def test_adapters_of_the_entropy_model_are_refused_in_training(folder):
    """The package hides it from PEFT; without the package the first training forward names both remedies."""
    seen = run_elsewhere(ADAPT, folder)
    assert "exclude_modules" in seen["plain"] and "pip install blt-hf" in seen["plain"] and "lora_A" in seen["plain"]
    assert seen["excluded"] == ["global_transformer", "local_decoder", "local_encoder"]


SERVE = """
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

model = AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=True).eval()
config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
(output,) = model.generate_batch(ids.tolist(), generation_config=config).values()
seen = {
    "text": ids[0].tolist() + output.generated_tokens,
    "manager": type(model.init_continuous_batching()).__name__,
    "modules": [name for name in sys.modules if name.startswith("blt_hf")],
    "in-tree": transformers.BltForCausalLM.__module__,
}
print(json.dumps(seen))
"""


GRAPHS = """
import warnings
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=True).eval()
home = type(model).__module__.rpartition(".")[0]
sys.modules[f"{home}.step_blt"].can_capture = lambda device: True  # a CPU that is asked for a graph refuses
settings = {"do_sample": False, "eos_token_id": None, "cache_implementation": "static", "disable_compile": True}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    text = model.generate(ids, max_new_tokens=10, **settings)
told = [str(warning.message) for warning in told if "CUDA graphs" in str(warning.message)]
print(json.dumps({"text": text[0].tolist(), "told": told}))
"""


@pytest.mark.parametrize("is_installed", [False, True])
def test_cuda_graphs_need_the_package_installed_and_not_imported(folder, is_installed):
    """Without it steps run as they are."""
    seen = run_elsewhere((INSTALLED if is_installed else "") + GRAPHS, folder)
    assert seen["text"] == torch.load(folder / "expected.pt")["text"][0].tolist()
    assert len(seen["told"]) == is_installed


def test_continuous_batching_needs_the_package_installed_and_not_imported(folder):
    """It serves the classes of the checkpoint, and the process keeps the in-tree names."""
    seen = run_elsewhere(INSTALLED + SERVE, folder)
    assert seen["text"] == torch.load(folder / "expected.pt")["text"][0].tolist()
    assert seen["manager"] == "BltContinuousBatchingManager" and not seen["modules"]
    assert seen["in-tree"].startswith("transformers.models.blt.")
