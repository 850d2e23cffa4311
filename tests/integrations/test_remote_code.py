"""Code that came with a checkpoint, with and without the package installed: what it does, and what it refuses."""

import pathlib

import pytest
import torch

import blt_hf
from blt_hf import BltTokenizer
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
    BltTokenizer().save_pretrained(folder / "lm")
    ids = BltTokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        torch.save({"source": TEXT, "ids": ids, "lm": model(ids).logits, "text": text}, folder / "expected.pt")
    return folder


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
seen = {}
try:
    (output,) = model.generate_batch(ids.tolist(), generation_config=config).values()
    seen["text"] = ids[0].tolist() + output.generated_tokens
except ImportError as error:
    seen["error"] = str(error)
seen["manager"] = [name for name in sys.modules if name.startswith("blt_hf")]
seen["in-tree"] = transformers.BltForCausalLM.__module__
print(json.dumps(seen))
"""


def test_continuous_batching_needs_the_package_installed_and_not_imported(folder):
    """It serves the classes of the checkpoint, and the process keeps the in-tree names."""
    seen = run_elsewhere(INSTALLED + SERVE, folder)
    assert seen.get("text") == torch.load(folder / "expected.pt")["text"][0].tolist(), seen
    assert "blt_hf" not in seen["manager"]
    assert seen["in-tree"].startswith("transformers.models.blt.")


def test_continuous_batching_without_the_package_says_so(folder):
    """Not a word of transformers' own manager, which would page a cache of tokens."""
    seen = run_elsewhere(SERVE, folder)
    assert "continuous batching" in seen["error"] and "pip install blt-hf" in seen["error"]
