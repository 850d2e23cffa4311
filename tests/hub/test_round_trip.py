"""The Hub by its real client: what is pushed comes back, with this package and without it.

A small Hub (`helpers.hub_server`) runs in this process; every client is a new one that knows it by `HF_ENDPOINT` alone.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from blt_hf import BltTokenizer
from helpers import processes
from helpers.hub_server import HubServer
from helpers.models import make_model, tiny_config


ROOT = Path(__file__).parents[2]
TEXT = "Some text, with naïve words: 速い"
PRELUDE = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
import torch
torch.set_num_threads(1)
expected = torch.load(folder / "expected.pt")
ids = expected["ids"]

def difference(model, name="first"):
    with torch.no_grad():
        return float((model.eval()(ids).logits - expected[name]).abs().max())

seen = {}
"""
STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "blt_hf":
            raise ImportError("blt_hf is not installed here")

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two models, as their owner has them, and what they answer."""
    folder = tmp_path_factory.mktemp("source")
    ids = BltTokenizer()(TEXT, return_tensors="pt").input_ids
    expected = {"ids": ids}
    for seed, name in enumerate(("first", "second")):
        model = make_model(tiny_config(patching_mode="entropy"), seed=seed)
        model.save_pretrained(folder / name)
        BltTokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            expected[name] = model(ids).logits
            expected[f"{name} text"] = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
        assert not server.unknown, "the client asked what the server does not know"


class Clients:
    """Starts clients: processes whose Hub is `hub`, each with a home of its own."""

    def __init__(self, hub: HubServer, source: Path, folder: Path):
        self.hub, self.source, self.folder = hub, source, folder
        self.count = 0

    def environment(self, has_package: bool = True) -> dict[str, str]:
        self.count += 1
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept.pop("PYTHONPATH", None)
        return {
            **kept,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / f"home-{self.count}"),
            "HF_HUB_DISABLE_XET": "1",  # a protocol that asks servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"PYTHONPATH": str(ROOT / "src")} if has_package else {}),
            "HF_TOKEN": "hf_writer",
        }

    def run(self, script: str, **kwargs) -> dict:
        """What `script` leaves in `seen`."""
        prelude = PRELUDE + "import blt_hf\n" if kwargs.get("has_package", True) else STRANGER + PRELUDE
        program = prelude + script + "\nprint(json.dumps(seen))"
        options = {"env": self.environment(**kwargs), "cwd": self.folder, "capture_output": True, "text": True}
        done = processes.run([sys.executable, "-c", program, self.source], **options)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def clients(hub, source, tmp_path_factory) -> Clients:
    return Clients(hub, source, tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def published(hub, clients) -> dict:
    """What its owner does with a model: push it in shards, push a branch, an adapter, and a folder with a card."""
    return clients.run(
        """
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from blt_hf.evaluation import make_model_card, measure_bits_per_byte, write_model_card

api = HfApi()
model = AutoModelForCausalLM.from_pretrained(folder / "first")
tokenizer = AutoTokenizer.from_pretrained(folder / "first")
model.push_to_hub("ada/blt", max_shard_size="60KB")
tokenizer.push_to_hub("ada/blt")
seen["first commit"] = api.model_info("ada/blt").sha
second = AutoModelForCausalLM.from_pretrained(folder / "second")
second.push_to_hub("ada/blt", revision="next", commit_message="Trained for longer")

base = AutoModelForCausalLM.from_pretrained("ada/blt")
adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(generator=torch.Generator().manual_seed(3), std=0.2)
    expected["adapted"] = adapted.eval()(ids).logits
torch.save(expected, folder / "expected.pt")
adapted.push_to_hub("ada/adapter")
card = make_model_card(adapted, repo_id="ada/adapter", license="mit")  # PEFT's push leaves a card that names no base
api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="ada/adapter")

second.save_pretrained("whole")
tokenizer.save_pretrained("whole")
bits = {"A text": measure_bits_per_byte(second, ["A text of the test"]), "ada/texts": 2.5}
options = {"license": "apache-2.0", "language": ["en", "de"], "datasets": "ada/texts", "base_model": "ada/blt"}
write_model_card(second, "whole", repo_id="ada/whole", bits_per_byte=bits, **options)
api.create_repo("ada/whole")
api.upload_folder(folder_path="whole", repo_id="ada/whole", commit_message="All at once")
info = api.model_info("ada/whole")
seen["info"] = [info.library_name, info.pipeline_tag, info.card_data.license, info.card_data.base_model]
seen["results"] = [[r.dataset_name, r.metric_type, r.metric_value] for r in info.card_data.eval_results]
seen["bits"] = bits["A text"].bits_per_byte
second.push_to_hub("ada/whole")  # a card that is there stays
seen["kept"] = api.model_info("ada/whole").card_data.license
"""
    )


def test_push_uploads_weights_code_and_tokenizer(hub, published):
    """Whole shards with their index; a commit for the model, one for the tokenizer; a branch leaves main alone."""
    repo = hub.repos["ada/blt"]
    files = repo.resolve("main").files
    weight_map = json.loads(files["model.safetensors.index.json"])["weight_map"]
    shards = set(weight_map.values())
    assert len(shards) >= 3
    assert {name for shard in shards for name in load(files[shard])} == set(weight_map)
    code = {path.name for path in (ROOT / "src" / "blt_hf" / "model").glob("*_blt.py")}
    assert {"modeling_blt.py", "cache_blt.py"} <= {name for name in files if name.endswith(".py")} <= code
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    titles = {name: [commit.title for commit in commits] for name, commits in repo.branches.items()}
    assert titles["main"] == ["initial commit", "Upload BltForCausalLM", "Upload tokenizer"]
    assert titles["next"][-1] == "Trained for longer"
    assert repo.resolve("main").oid == published["first commit"]


def test_pushed_cards_tell_what_it_is(hub, published):
    for repo, library in (("ada/blt", "transformers"), ("ada/adapter", "peft")):
        data = ModelCard(hub.repos[repo].resolve("main").files["README.md"].decode()).data
        assert data.library_name == library
        assert {"blt", "byte-level"} <= set(data.tags)
    assert data.base_model == "ada/blt"


def test_cards_as_the_hub_reads_them(hub, published):
    """Licence, data, base and bits per byte come back as the client's `model_info` parses them."""
    assert published["info"] == ["transformers", "text-generation", "apache-2.0", "ada/blt"]
    names = [(name, metric) for name, metric, _ in published["results"]]
    assert names == [("A text", "bits_per_byte"), ("A text", "bytes_per_patch"), ("ada/texts", "bits_per_byte")]
    assert published["results"][0][2] == pytest.approx(published["bits"], abs=1e-4)
    assert published["kept"] == "apache-2.0"
    empty, whole, *_ = hub.repos["ada/whole"].branches["main"]
    assert not empty.files and whole.title == "All at once"
    assert {"model.safetensors", "tokenizer.json", "README.md", "modeling_blt.py"} <= set(whole.files)


def test_the_bundled_models_card():
    data = ModelCard.load(ROOT / "pretrained" / "blt-5m" / "README.md").data
    assert {result.metric_type for result in data.eval_results} == {"bits_per_byte", "bytes_per_patch"}


def test_adapters_are_small(hub, published):
    """An adapter's repository holds what was trained and names its base; neither the base nor its code."""
    files = hub.repos["ada/adapter"].resolve("main").files
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not [name for name in load(files["adapter_model.safetensors"]) if "patcher" in name]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ada/blt"


def test_loading_with_the_package(published, clients):
    """By name: both branches, the adapter with its base, a snapshot, a pipeline."""
    seen = clients.run(
        """
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

load = AutoModelForCausalLM.from_pretrained
model = load("ada/blt")
seen["class"] = type(model).__module__
seen["main"] = difference(model)
seen["tokenizer"] = AutoTokenizer.from_pretrained("ada/blt")("Some text, with naïve words: 速い").input_ids
seen["next"] = difference(load("ada/blt", revision="next"), "second")
seen["peft"] = difference(AutoPeftModelForCausalLM.from_pretrained("ada/adapter"), "adapted")
seen["adapter by name"] = difference(load("ada/adapter"), "adapted")
seen["folder"] = difference(load(snapshot_download("ada/blt")))
writer = pipeline("text-generation", model="ada/blt")
text = writer.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
seen["same text"] = bool((text == expected["first text"]).all())
"""
    )
    assert seen.pop("class") == "blt_hf.model.modeling_blt"
    assert seen.pop("tokenizer") == BltTokenizer()(TEXT).input_ids
    assert seen.pop("same text")
    assert max(seen.values()) < 1e-5, seen


def test_loading_without_the_package(published, clients):
    """A stranger who trusts the code: the same answers, with code of the revision that was asked for."""
    seen = clients.run(
        f"""
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

def load(name, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **kwargs)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model

seen["main"] = difference(load("ada/blt"))
seen["commit"] = difference(load("ada/blt", revision={published["first commit"]!r}))
seen["next"] = difference(load("ada/blt", revision="next"), "second")
seen["cached"] = difference(load("ada/blt", local_files_only=True))
adapted = AutoPeftModelForCausalLM.from_pretrained("ada/adapter", trust_remote_code=True)
seen["peft"] = difference(adapted, "adapted")
seen["base class"] = type(adapted.get_base_model()).__module__
tokenizer = AutoTokenizer.from_pretrained("ada/blt", trust_remote_code=True)
seen["tokenizer"] = tokenizer({TEXT!r}).input_ids
writer = pipeline("text-generation", model="ada/blt", trust_remote_code=True)
text = writer({TEXT!r}, max_new_tokens=8, do_sample=False, eos_token_id=None, return_full_text=False)
seen["text"] = text[0]["generated_text"]
""",
        has_package=False,
    )
    assert seen.pop("base class").startswith("transformers_modules.")
    assert seen.pop("tokenizer") == BltTokenizer()(TEXT).input_ids
    expected = torch.load(clients.source / "expected.pt")
    new = expected["first text"][0, expected["ids"].shape[1] :]
    assert seen.pop("text") == BltTokenizer().decode(new, skip_special_tokens=True)
    assert max(seen.values()) < 1e-5, seen
