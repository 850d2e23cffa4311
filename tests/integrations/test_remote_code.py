"""Code that came with a checkpoint, with and without the package installed: what it does, and what it refuses."""

import pathlib
import re

import pytest
import torch

import blt_hf
from blt_hf import BltForTokenClassification, BltTokenizer
from helpers.exporting import make_small
from helpers.models import make_model, tiny_config
from helpers.processes import run_elsewhere


pytestmark = pytest.mark.timeout(900)  # a new process that imports everything, for machines that are busy
ROOT = pathlib.Path(__file__).parents[2]
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
    model.model.patcher.save_pretrained(folder / "patcher")
    small = make_small(patching_mode="entropy")  # a layer of each kind, for programs that take long
    small.save_pretrained(folder / "small")
    for name in ("lm", "blocks", "tagger", "patcher"):
        BltTokenizer().save_pretrained(folder / name)
    make_model(tiny_config(patching_mode="entropy", diffusion_block_size=4), seed=21).save_pretrained(
        folder / "blocks"
    )
    BltForTokenClassification(tiny_config(num_labels=3, patching_mode="space")).save_pretrained(folder / "tagger")
    ids = BltTokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        logits = {"lm": model(ids).logits, "patcher": model.model.patcher(ids).logits, "small": small(ids).logits}
        torch.save({"source": TEXT, "ids": ids, "text": text, **logits}, folder / "expected.pt")
    return folder


# The table in docs/hub.md: a program for each feature, which ends without an error where the cell says yes.
# `is_imported` and `is_installed` say where the package is.
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
import contextlib, io
from transformers import TextStreamer
model = load("lm")
assert model.generate(ids, **greedy).tolist() == expected["text"].tolist()
model.generate(ids, max_new_tokens=4, do_sample=True)
model.generate(ids, max_new_tokens=4, num_beams=3)
assert model.generate(ids, **greedy, prefill_chunk_size=5).tolist() == expected["text"].tolist()
with contextlib.redirect_stdout(io.StringIO()) as printed:
    model.generate(ids, **greedy, streamer=TextStreamer(tokenizer("lm")))
assert printed.getvalue().strip() == tokenizer("lm").decode(expected["text"][0]).strip()
first = model.generate(ids[:, :9], **greedy, return_dict_in_generate=True)
longer = torch.cat([first.sequences, ids[:, 9:]], dim=1)
second = model.generate(longer, **greedy, past_key_values=first.past_key_values)
assert second.tolist() == model.generate(longer, **greedy).tolist()
""",
    "self-speculation (`self_speculation_window`)": """
model = load("lm")
for window in (3, "auto"):
    assert model.generate(ids, **greedy, self_speculation_window=window).tolist() == expected["text"].tolist()
""",
    'compiled steps, CUDA graphs (`cache_implementation="static"`)': """
import warnings
from unittest import mock
from transformers import CompileConfig
model = load("lm")
static = {**greedy, "cache_implementation": "static"}
compiled = model.generate(ids, **static, compile_config=CompileConfig(backend="eager"))
assert compiled.tolist() == expected["text"].tolist()
# A CPU that is asked for a graph refuses, with a warning; without the package steps run as they are.
with mock.patch.object(module_of(model, "step_blt"), "can_capture", lambda device: True):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        captured = model.generate(ids, **static, disable_compile=True)
assert captured.tolist() == expected["text"].tolist()
assert len([one for one in told if "CUDA graphs" in str(one.message)]) == is_installed
""",
    "prompts where torch's own products are slow": """
model = load("lm")
assert (module_of(model, "layers_blt")._products is not None) == is_installed
prompt = ids.repeat(1, 96 // ids.shape[1] + 1)
with torch.no_grad():
    whole, halves = model(prompt).logits, torch.cat([model(row).logits for row in prompt.repeat(2, 1).split(1)])
torch.testing.assert_close(halves, whole.expand_as(halves))
""",
    "continuous batching, `transformers serve --continuous-batching`": """
# tests/clients/test_serve_continuous.py starts `transformers serve` where the package is installed and not imported.
from transformers import GenerationConfig
model = load("lm")
config = GenerationConfig(**{**greedy, "pad_token_id": 0})
(output,) = model.generate_batch(ids.tolist(), generation_config=config).values()
assert ids[0].tolist() + output.generated_tokens == expected["text"][0].tolist()
assert type(model.init_continuous_batching()).__name__ == "BltContinuousBatchingManager"
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
if is_imported:
    blt_hf.register_patching_rule("vowels", lambda ids, entropies, positions, rule: ids[..., -1] == 101)
config = AutoConfig.from_pretrained(folder / "lm", trust_remote_code=True, patching_mode="vowels")
AutoModelForCausalLM.from_config(config, trust_remote_code=True)(ids)
""",
    "the tokenizer": """
assert tokenizer("lm")(TEXT).input_ids == ids[0].tolist()
assert tokenizer("lm").decode(ids[0], skip_special_tokens=True) == TEXT
""",
    "`torch.export`, whole-graph `torch.compile`, ONNX": """
import importlib.util
model, inputs = load("small"), {"input_ids": ids, "use_cache": False}
with torch.no_grad():
    program = torch.export.export(model, (), inputs, strict=False)
    same(program.module()(**inputs).logits, "small")
    same(torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits, "small")
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        import onnxruntime
        torch.onnx.export(program, dynamo=True, verbose=False).save(folder / "blt.onnx")
        session = onnxruntime.InferenceSession(folder / "blt.onnx")
        same(torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]), "small")
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
    "the entropy model alone (`BltPatcher`)": """
patcher = load("patcher")
with torch.no_grad():
    same(patcher(ids).logits, "patcher")
patcher.train()(ids, labels=ids).loss.backward()
assert all(weight.grad is not None for weight in patcher.parameters())
""",
    "layers on several devices or on disk (`device_map`)": """
settings = {"device_map": "auto", "max_memory": {"cpu": 150_000}, "offload_folder": folder / "offload"}
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=True, **settings).eval()
assert set(model.hf_device_map.values()) == {"cpu", "disk"}
with torch.no_grad():
    same(model(ids).logits, "lm")
""",
    "adapters of PEFT, also in TRL": """
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

def by_peft(config):
    adapted = get_peft_model(load("lm"), config)
    with torch.no_grad():
        same(adapted.eval()(input_ids=ids).logits, "lm")  # only training is refused
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
    return adapted

def by_trl(config):
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    data, arguments = Dataset.from_dict({"text": [TEXT] * 2}), SFTConfig(str(folder / "run"), **settings)
    trainer = SFTTrainer(
        load("lm"), arguments, train_dataset=data, processing_class=tokenizer("lm"), peft_config=config
    )
    trainer.train()
    return trainer.model

errors = []
for adapt in (by_peft, by_trl):
    for options in ({}, {"exclude_modules": r".*patcher.*"}):
        try:
            adapted = adapt(LoraConfig(task_type="CAUSAL_LM", **options))
        except ValueError as error:
            assert not options and "lora_A" in str(error) and "exclude_modules" in str(error), error
            errors.append(error)
        else:
            trained = {name.split(".")[3] for name, weight in adapted.named_parameters() if weight.requires_grad}
            assert trained == {"global_transformer", "local_decoder", "local_encoder"}
assert len(errors) == (0 if is_imported else 2)
if errors:
    raise errors[0]
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
assert len(told) == is_installed
""",
    "memory of a row (`BltCache.memory`)": """
model = load("lm")
assert model.make_cache().memory(model.config, num_bytes=100, num_patches=30) > 0
""",
    "the command line, Meta's checkpoints, calibration, byteify, patches of a corpus, bits per byte, model cards": """
import importlib
errors = []
for name in ("cli", "conversion", "training.calibration", "training.byteify", "training.corpus", "evaluation"):
    try:
        importlib.import_module(f"blt_hf.{name}")
    except ImportError as error:
        errors.append(error)
assert len(errors) == (0 if is_imported else 6)
if errors:
    raise errors[0]
from typer.testing import CliRunner
printed = CliRunner().invoke(blt_hf.cli.app, ["info", str(folder / "lm"), "--json"])
assert json.loads(printed.stdout)["memory_bytes"]["weights"] > 0, printed.output
model = load("lm")
blt_hf.conversion.export_meta_checkpoint(folder / "lm", folder / "meta")
blt_hf.conversion.convert_meta_checkpoint(folder / "meta", folder / "converted")
with torch.no_grad():
    same(load("converted")(ids).logits, "lm")
found = blt_hf.training.calibration.calibrate_threshold(model, [TEXT, "another text"], 4.0)
assert 1 < found.mean_patch_size < 8
size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
assert torch.isfinite(blt_hf.training.byteify.byteify(llama, patching_mode="space")(ids).logits).all()
(folder / "corpus.txt").write_text(TEXT)
assert blt_hf.training.corpus.write_patches(model, [folder / "corpus.txt"], folder / "patches").num_files == 1
measured = blt_hf.evaluation.measure_bits_per_byte(model, [TEXT])
assert 0 < measured.bits_per_byte < 20
card = blt_hf.evaluation.make_model_card(model, repo_id="ada/blt", bits_per_byte={"a text": measured})
assert "ada/blt" in card.content
""",
    "OpenAI's protocol (`blt_hf.serving.server`)": """
import blt_hf.serving.server
from fastapi.testclient import TestClient
server = blt_hf.serving.server.TextServer(load("lm"), tokenizer("lm"), "tiny")
try:
    request = {"model": "tiny", "prompt": TEXT, "max_tokens": 4, "temperature": 0}
    answer = TestClient(blt_hf.serving.server.make_app(server)).post("/v1/completions", json=request).json()
finally:
    server.stop()
assert answer["usage"]["completion_tokens"] == 4, answer
""",
}
# The rows that other files run: their cells, those files, and a text that they hold because they run it.
NEEDS = ["needs the package", "yes"]
RUN_ELSEWHERE = {
    "training in several processes: DDP, FSDP2": (
        ["yes", "yes"],
        {
            "tests/training/test_distributed.py": "def test_code_of_a_checkpoint_in_two_processes(",
            "tests/clients/train_script.py": "trust_remote_code=True",
        },
    ),
    "training with DeepSpeed": (
        ["yes", "not tried"],
        {"tests/clients/test_deepspeed.py": "DEEPSPEED", "tests/clients/train_script.py": "trust_remote_code=True"},
    ),
    "vLLM (`blt-hf-vllm`)": (
        NEEDS,
        {
            "integrations/vllm/tests/test_equal.py": "from blt_hf_vllm",
            "integrations/vllm/blt_hf_vllm/__init__.py": "import blt_hf ",
        },
    ),
    "replicas on Ray Serve (`examples/serve_ray.py`)": (
        NEEDS,
        {"tests/test_example_serve_ray.py": "import serve_ray", "examples/serve_ray.py": "from blt_hf."},
    ),
    "patches of a corpus by Ray Data (`examples/patches_ray.py`)": (
        NEEDS,
        {"tests/test_example_patches_ray.py": "patches_ray.py", "examples/patches_ray.py": "import blt_hf "},
    ),
    "the page in the browser (`examples/space/app.py`)": (
        NEEDS,
        {"tests/test_space.py": 'SPACE / "app.py"', "examples/space/app.py": "from blt_hf "},
    ),
}
RUN_FEATURES = f"""
import transformers
greedy = {{"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}}

def load(name, auto_class="AutoModelForCausalLM"):
    model = getattr(transformers, auto_class).from_pretrained(folder / name, trust_remote_code=True).eval()
    assert type(model).__module__.partition(".")[0] == ("blt_hf" if is_imported else "transformers_modules")
    return model

def module_of(model, name):
    return sys.modules[type(model).__module__.rpartition(".")[0] + "." + name]

def tokenizer(name):
    return transformers.AutoTokenizer.from_pretrained(folder / name)

seen = {{}}
for feature, program in {FEATURES!r}.items():
    if feature not in features:
        continue
    try:
        exec(program)
        seen[feature] = "yes"
    except (ImportError, ValueError) as error:
        seen[feature] = f"`{{type(error).__name__}}` {{error}}"
    except Exception as error:
        raise AssertionError(feature) from error
if not is_imported:  # nothing of the package is left, and the in-tree names are those of transformers
    assert not [name for name in sys.modules if name.startswith("blt_hf")]
    assert transformers.BltForCausalLM.__module__.startswith("transformers.models.blt.")
print(json.dumps(seen))
"""


def table_of_features() -> dict[str, list[str]]:
    """The cells of the table in docs/hub.md by feature."""
    page = (ROOT / "docs" / "hub.md").read_text()
    (table,) = re.findall(r"^\| feature \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return {feature: cells for feature, *cells in rows}


def test_the_table_has_rows_that_are_run():
    """Here, or in files that are there and name the feature."""
    table = table_of_features()
    assert table.keys() == FEATURES.keys() | RUN_ELSEWHERE.keys()
    for feature, (cells, files) in RUN_ELSEWHERE.items():
        assert table[feature] == cells
        for file, text in files.items():
            assert text in (ROOT / file).read_text(), (feature, file, text)


PLACES = {
    "remote code alone": "is_installed = is_imported = False\n",
    "installed, not imported": INSTALLED + "is_installed, is_imported = True, False\n",
    "imported": INSTALLED + "is_installed = is_imported = True\nimport blt_hf\n",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_table_of_features(folder, place):
    """Each cell, by a program that a user could have written."""
    table = table_of_features()
    cells = {feature: table[feature][1 if place == "imported" else 0] for feature in FEATURES}
    if place == "installed, not imported":
        cells = {feature: "yes" for feature, cell in cells.items() if "installed, without importing it" in cell}
        assert len(cells) == 5
    seen = run_elsewhere(f"{PLACES[place]}features = {list(cells)!r}\n" + RUN_FEATURES, folder)
    assert seen.keys() == cells.keys()
    for feature, cell in cells.items():
        said = re.match(r"yes|`\w+Error`", cell)[0]
        assert seen[feature].startswith(said), (feature, seen[feature])
        if said != "yes":  # our own errors say what to install; a module of the package is just not found
            assert re.search("pip install blt-hf|package blt_hf|blt_hf is not installed", seen[feature]), seen[feature]
