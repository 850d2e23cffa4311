"""The Hub by its real client: what is pushed comes back, to this package and to strangers, and never by halves.

A small Hub (`helpers.hub_server`) runs in this process; every client is a new one that knows it by `HF_ENDPOINT` alone.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load

from blt_hf import BltTokenizer
from helpers import processes
from helpers.hub_server import HubServer, Refused, metadata_errors, metadata_of
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
        server.part_size = 50_000
        yield server
        assert not server.unknown, "the client asked what the server does not know"
        assert not server.leaked_tokens, "a token went to the host of the large files"


class Clients:
    """Starts clients: processes whose Hub is `hub`, each with a home of its own."""

    def __init__(self, hub: HubServer, source: Path, folder: Path):
        self.hub, self.source, self.folder = hub, source, folder
        self.count = 0

    def environment(self, token: str | None = None, has_package: bool = True) -> dict[str, str]:
        self.count += 1
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept.pop("PYTHONPATH", None)
        return {
            **kept,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / f"home-{self.count}"),
            "HF_HUB_DISABLE_XET": "1",  # the other protocol for large files, which asks servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"PYTHONPATH": str(ROOT / "src")} if has_package else {}),
            **({"HF_TOKEN": token} if token else {}),
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
    """What its owner does with a model: push, cut into shards; a branch, a tag, a pull request; private; an adapter."""
    seen = clients.run(
        """
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from blt_hf.evaluation import make_model_card, measure_bits_per_byte, write_model_card

api = HfApi()
seen["who"] = api.whoami()["name"]
model = AutoModelForCausalLM.from_pretrained(folder / "first")
tokenizer = AutoTokenizer.from_pretrained(folder / "first")
model.push_to_hub("ada/blt", max_shard_size="60KB")
tokenizer.push_to_hub("ada/blt")
api.create_tag("ada/blt", tag="v1")
seen["first commit"] = api.model_info("ada/blt").sha

second = AutoModelForCausalLM.from_pretrained(folder / "second")
second.push_to_hub("ada/blt", revision="next", commit_message="Trained for longer")
seen["pull request"] = second.push_to_hub("ada/blt", create_pr=True).pr_revision
api.create_branch("ada/blt", branch="mistake")
api.delete_branch("ada/blt", branch="mistake")
seen["refs"] = sorted(branch.name for branch in api.list_repo_refs("ada/blt").branches)
seen["titles"] = [commit.title for commit in api.list_repo_commits("ada/blt", revision="next")]

second.push_to_hub("ada/secret")
api.update_repo_settings("ada/secret", private=True)
tokenizer.push_to_hub("ada/secret")

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

tokenizer.push_to_hub("ada/mistake", private=True)
seen["mistake is private"] = api.model_info("ada/mistake").private
api.delete_repo("ada/mistake")
seen["mistake is gone"] = not api.repo_exists("ada/mistake")

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

try:
    api.upload_file(path_or_fileobj=b"---\\nlicense: my own\\n---\\n", path_in_repo="README.md", repo_id="ada/whole")
except ValueError as error:
    seen["refused card"] = str(error)
""",
        token="hf_writer",
    )
    return seen


def test_push_cuts_into_shards(hub, published):
    """Shards with their index, each whole; large files in several parts; all of a model in one commit."""
    files = hub.repos["ada/blt"].head.files
    index = json.loads(hub.read("ada/blt", "model.safetensors.index.json"))
    shards = set(index["weight_map"].values())
    assert len(shards) >= 3 and shards <= set(files)
    assert all(files[shard].sha256 is not None for shard in shards), "weights are large files"
    stored = {name for shard in shards for name in load(hub.read("ada/blt", shard))}
    assert stored == set(index["weight_map"])
    assert any(path.endswith("/complete") for _, path in hub.requests), "no file was uploaded in parts"
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "modeling_blt.py",
        "cache_blt.py",
    } <= set(files)
    titles, commit = [], hub.repos["ada/blt"].head
    while commit is not None:
        titles.append(commit.title)
        commit = hub.repos["ada/blt"].commits.get(commit.parent)
    assert titles == ["Upload tokenizer", "Upload BltForCausalLM", "initial commit"]


def test_push_names_revisions(hub, published):
    assert published["who"] == "ada"
    assert published["refs"] == ["main", "next"]
    assert published["titles"][0] == "Trained for longer"
    assert published["pull request"] == "refs/pr/1"
    assert hub.repos["ada/blt"].head.oid == published["first commit"], "a branch and a pull request leave main alone"
    assert hub.repos["ada/secret"].is_private
    assert published["mistake is private"] and published["mistake is gone"]


def test_pushed_cards_tell_what_it_is(hub, published):
    for repo, library in (("ada/blt", "transformers"), ("ada/adapter", "peft")):
        data = metadata_of(hub.read(repo, "README.md").decode())
        assert data["library_name"] == library
        assert {"blt", "byte-level"} <= set(data["tags"])
    assert data["base_model"] == "ada/blt"


def test_cards_as_the_hub_reads_them(hub, published):
    """Licence, data, base and bits per byte come back as the client's `model_info` parses them."""
    assert published["info"] == ["transformers", "text-generation", "apache-2.0", "ada/blt"]
    names = [(name, metric) for name, metric, _ in published["results"]]
    assert names == [("A text", "bits_per_byte"), ("A text", "bytes_per_patch"), ("ada/texts", "bits_per_byte")]
    assert published["results"][0][2] == pytest.approx(published["bits"], abs=1e-4)
    assert published["kept"] == "apache-2.0"
    assert '"license"' in published["refused card"], "the server does refuse"
    commit = hub.repos["ada/whole"].head
    while commit.title != "All at once":
        commit = hub.repos["ada/whole"].commits[commit.parent]
    assert {"model.safetensors", "tokenizer.json", "README.md", "modeling_blt.py"} <= set(commit.files)
    before = hub.repos["ada/whole"].commits[commit.parent]
    assert set(before.files) == {".gitattributes"}, "model, tokenizer and card appear together"


def test_the_bundled_models_card():
    """What the Hub would say to the card that ships with the project."""
    data = metadata_of((ROOT / "pretrained" / "blt-5m" / "README.md").read_text())
    assert not metadata_errors(data)
    assert {metric["type"] for result in data["model-index"][0]["results"] for metric in result["metrics"]} == {
        "bits_per_byte",
        "bytes_per_patch",
    }


def test_adapters_are_small(hub, published):
    """An adapter's repository holds what was trained and names its base; neither the base nor its code."""
    files = hub.repos["ada/adapter"].head.files
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not [name for name in load(hub.read("ada/adapter", "adapter_model.safetensors")) if "patcher" in name]
    assert json.loads(hub.read("ada/adapter", "adapter_config.json"))["base_model_name_or_path"] == "ada/blt"


def test_loading_with_the_package(hub, published, clients):
    """By name: every revision, the private one with the token of the environment, the adapter with its base.

    The first two downloads of large files break off in the middle: the client asks for the rest, by itself or, before
    huggingface_hub 1.20, when it is called again.
    """
    hub.cut_downloads = 2
    seen = clients.run(
        """
import httpx
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

load = AutoModelForCausalLM.from_pretrained
model, seen["errors"] = None, 0
while model is None:
    try:
        model = load("ada/blt")
    except httpx.RemoteProtocolError:
        seen["errors"] += 1
seen["class"] = type(model).__module__
seen["main"] = difference(model)
seen["tokenizer"] = AutoTokenizer.from_pretrained("ada/blt")("Some text, with naïve words: 速い").input_ids
seen["next"] = difference(load("ada/blt", revision="next"), "second")
seen["v1"] = difference(load("ada/blt", revision="v1"))
seen["pull request"] = difference(load("ada/blt", revision="refs/pr/1"), "second")
seen["private"] = difference(load("ada/secret"), "second")
seen["peft"] = difference(AutoPeftModelForCausalLM.from_pretrained("ada/adapter"), "adapted")
seen["adapter by name"] = difference(load("ada/adapter"), "adapted")
seen["folder"] = difference(load(snapshot_download("ada/blt")))
writer = pipeline("text-generation", model="ada/blt")
text = writer.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
seen["same text"] = bool((text == expected["first text"]).all())
seen["incomplete"] = [str(path) for path in Path(os.environ["HF_HOME"]).rglob("*.incomplete")]
""",
        token="hf_writer",
    )
    assert hub.cut_downloads == 0, "two downloads did break off"
    assert seen.pop("errors") == 0 or Version(huggingface_hub.__version__) < Version("1.20")
    assert not seen.pop("incomplete")
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
try:
    load("ada/secret")
except OSError as error:
    seen["refusal"] = str(error)
seen["private"] = difference(load("ada/secret", token="hf_writer"), "second")
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
    assert "ada/secret" in seen.pop("refusal")
    assert seen.pop("base class").startswith("transformers_modules.")
    assert seen.pop("tokenizer") == BltTokenizer()(TEXT).input_ids
    expected = torch.load(clients.source / "expected.pt")
    new = expected["first text"][0, expected["ids"].shape[1] :]
    assert seen.pop("text") == BltTokenizer().decode(new, skip_special_tokens=True)
    assert max(seen.values()) < 1e-5, seen


# Uploads and downloads that end too early.


@pytest.fixture
def untouched(hub, published):
    """Whatever happens in the test, who looks at the repository sees what was there before."""
    repo = hub.repos["ada/blt"]
    before = (repo.branches.copy(), repo.head.files, set(repo.commits))
    yield repo
    hub.on_upload, hub.refuse_commits = None, 0
    assert (repo.branches, repo.head.files, set(repo.commits)) == before


def test_a_client_killed_while_it_uploads(hub, clients, source, untouched):
    """`hf upload`, the second large file on its way when the process dies."""
    on_its_way, may_go_on = threading.Event(), threading.Event()
    stored, arrivals = len(hub.large), itertools.count()
    (source / "second" / "learning.png").write_bytes(b"\0" * 1000)  # two large files that the Hub does not have yet
    (source / "second" / "patches.png").write_bytes(b"\0" * 2000)

    def hold(_: int) -> None:
        """The client sends its files side by side: the first to arrive is stored, whatever comes after it waits."""
        if next(arrivals) > 0:
            on_its_way.set()
            may_go_on.wait(60)

    hub.on_upload = hold
    command = [Path(sys.executable).with_name("hf"), "upload", "ada/blt", source / "second"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=clients.environment("hf_writer"), cwd=clients.folder, **pipes)
    assert on_its_way.wait(120), process.communicate()[1][-3000:]
    deadline = time.monotonic() + 60
    while len(hub.large) == stored and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    may_go_on.set()
    assert len(hub.large) > stored, "something was uploaded, which nobody sees"


def test_uploads_that_the_hub_refuses(hub, clients, untouched):
    """A large file, the commit, the person: the owner gets an error, and nobody sees anything."""
    refusals = iter([Refused(403, "your storage is full")])

    def full_once(num_stored: int) -> None:
        for refusal in refusals:
            raise refusal

    hub.on_upload, hub.refuse_commits = full_once, 1
    seen = clients.run(
        """
from transformers import AutoModelForCausalLM

second = AutoModelForCausalLM.from_pretrained(folder / "second")
with torch.no_grad():
    for weight in second.parameters():
        weight.add_(0.125)  # files that nobody has uploaded
for attempt, options in {"storage": {}, "commit": {}, "reader": {"token": "hf_reader"}}.items():
    try:
        second.push_to_hub("ada/blt", max_shard_size="1GB", **options)
    except Exception as error:
        seen[attempt] = f"{error} {error.__cause__}"
""",
        token="hf_writer",
    )
    assert "your storage is full" in seen["storage"] or "model.safetensors" in seen["storage"]
    assert "bad day" in seen["commit"]
    assert "bob may not write to ada" in seen["reader"]
