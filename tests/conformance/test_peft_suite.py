"""PEFT's own suite for decoders, as its source distribution holds it, on a tiny BLT: every method that PEFT has.

A test that fails is accepted only where `REASONS` says what it is about a BLT, with the words of its error; a test that
passes in spite of its reason fails here, so that the table stays true. In the default run every method trains and is
saved, and LoRA goes through every test; `-m slow` runs the rest.
"""

import fnmatch
import functools
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import peft
import pytest
from packaging.version import Version
from transformers import AutoModelForCausalLM, set_seed

from blt_hf import BltForCausalLM, BltTokenizer
from helpers import transformers_suites as suites
from helpers.models import tiny_config


class Reason(NamedTuple):
    tests: tuple[str, ...]  # names of tests, and of methods after a blank, with `*`
    error: type[Exception]
    words: str
    why: str


_PROMPTS = ("PromptTuning", "PromptEncoder", "PrefixTuning*", "CPT", "Cartridge")
_WHY_PROMPTS = (
    "vectors in front of a text stand for no byte, and patches and hashes are found from bytes. Prefix tuning makes keys "
    "and values instead, in a cache with a column for each: a BLT's cache counts bytes and patches, and patches without "
    "bytes have no place in its counters"
)
REASONS = [
    Reason(
        tuple(f"test_prompt_learning_with_gradient_checkpointing {name}" for name in _PROMPTS),
        AssertionError,
        "",
        "PEFT's test knows no other refusal than its own, which comes after ours: " + _WHY_PROMPTS,
    ),
    Reason(
        tuple(f"* {name}" for name in _PROMPTS),
        ValueError,
        "puts vectors that stand for no byte in front of the text",
        _WHY_PROMPTS,
    ),
    Reason(
        ("* ActivatedLora",),
        ValueError,
        "aLoRA counts bytes in layers whose positions are patches",
        "an adapter that is switched on behind a byte would have to know which patches stand behind it",
    ),
    Reason(
        ("* Shadow",),
        AttributeError,
        "Unable to automatically find a `nn.ModuleList` of decoder layers",
        "a small copy of a decoder's one stack rides along with it; a BLT has three stacks, over bytes and over patches",
    ),
    Reason(
        ("test_merge_layers* Beft",),
        ValueError,
        "Base layer has no bias, cannot merge bias adapter",
        "no projection of a BLT has a bias to merge into, as in a Llama, for which PEFT's suite leaves these tests out",
    ),
]
# What a user of a BLT has to say as well: one basis serves all targets, so that they must be of one shape.
_ONE_SHAPE = [f"global_transformer.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "v")]
OWN_SETTINGS = {"Frod": {"target_modules": _ONE_SHAPE}}
# Tests that load a model of another architecture from the Hub by its name, or look for the modules of a Llama
ABOUT_OTHERS = (
    "test_lora_embed_scale_is_applied",
    "test_lora_embed_scale_is_applied_mixed_batch",
    "test_lora_layer_replication",
    "test_merge_and_unload_fixes_tie_word_embeddings_config",
    "test_prefix_tuning_*",
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask",
    "test_prompt_tuning_text_tokenizer_kwargs",
    "test_prompt_tuning_trust_remote_code",
    "test_save_pretrained_targeting_lora_to_embedding_layer",
)

_folder = tempfile.TemporaryDirectory(prefix="blt-peft-")
MODEL, READS_NO_IDS = f"{_folder.name}/blt", f"{_folder.name}/blt-without-hashes"


def write_models() -> None:
    """A model with all that a BLT has, and one in which embeddings say all that there is of a byte."""
    # The suite asks whether a first stack of one layer is all there is; and takes ends for padding
    config = {"encoder_config": {"num_hidden_layers": 2}}
    plain = {**config, "patching_mode": "static", "patch_size": 3, "encoder_hash_byte_group_nb_functions": 0}
    for folder, settings in ((MODEL, config), (READS_NO_IDS, plain)):
        set_seed(0)
        model = BltForCausalLM(tiny_config(**settings))
        model.generation_config.pad_token_id = model.config.eos_token_id
        model.save_pretrained(folder)
        BltTokenizer().save_pretrained(folder)


class _Marks:
    """`pytest.mark` for the suite: its models become ours, methods get names, and marks unknown to pytest go."""

    def __getattr__(self, name: str):
        if name == "parametrize":
            return self.parametrize
        if name in ("skipif", "xfail", "filterwarnings", "usefixtures"):
            return getattr(_pytest_mark, name)
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else lambda decorated: decorated

    def parametrize(self, names, values, **kwargs):
        def decorate(function):
            found = values
            if names == "model_id":
                reads_no_ids = function.__name__ == "test_passing_input_embeds_works"
                found = [_pytest_param(READS_NO_IDS if reads_no_ids else MODEL, id="blt")]
            elif names == "config_cls,config_kwargs":
                found = name_methods(function.__name__, values)
            return _pytest_mark.parametrize(names, found, **kwargs)(function)

        return decorate


_pytest_mark, _pytest_param = pytest.mark, pytest.param


def name_methods(test: str, values: list) -> list:
    """The grid of methods of a test, with names; most are slow."""
    params, seen = [], {}
    for config_class, settings in values:
        name = config_class.__name__.removesuffix("Config")
        seen[name] = seen.get(name, 0) + 1
        settings = {**settings, **OWN_SETTINGS.get(name, {})}
        name = name if seen[name] == 1 else f"{name}{seen[name]}"
        is_default = name == "Lora" or test == "test_training_decoders"
        params.append(_pytest_param(config_class, settings, id=name, marks=() if is_default else _pytest_mark.slow))
    return params


def load(name: str) -> ModuleType:
    """A module of the suite, such as `"test_decoder_models"`. Its tests of images want diffusers; none of them is run."""
    folder = str(suites.fetch(peft.__version__, "peft"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    absent = ModuleType("diffusers")
    absent.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    is_absent = sys.modules.setdefault("diffusers", absent) is absent
    try:
        with mock.patch.object(pytest, "mark", _Marks()):
            return importlib.import_module(f"peft_tests.{name}")
    finally:
        if is_absent:
            del sys.modules["diffusers"]


if Version(peft.__version__) < Version("0.21"):
    pytest.skip("the tables here are about the tests that PEFT has from 0.21 on", allow_module_level=True)
try:
    decoders = load("test_decoder_models")
except suites.SuitesUnavailable as error:
    suites.leave_out(f"PEFT's source distribution cannot be fetched: {error}")

write_models()
sys.modules["peft_tests.testing_utils"]._HUB_MODEL_ACCESSES.update(
    {MODEL: 1, READS_NO_IDS: 1}
)  # no need to ask the Hub
decoders.PEFT_DECODER_MODELS_TO_TEST[:] = [MODEL]


class OurModels:
    """Whatever model of the Hub a test names, it gets a BLT."""

    @staticmethod
    def from_pretrained(name: str, *args, **kwargs):
        return AutoModelForCausalLM.from_pretrained(name if Path(name).is_dir() else MODEL, *args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    plugin = suites.Summary(__file__, "a tiny BLT", f"PEFT {peft.__version__}")
    request.config.pluginmanager.register(plugin)


def find_reason(test: str, method: str) -> Reason | None:
    for reason in REASONS:
        if any(fnmatch.fnmatch(f"{test} {method}", pattern) for pattern in reason.tests):
            return reason
    return None


def with_reason(test):
    """A test that has a reason to fail must fail, in the words of the reason."""

    @functools.wraps(test)
    def wrapper(self, *args, **kwargs):
        config_class = kwargs.get("config_cls")
        method = config_class.__name__.removesuffix("Config") if config_class is not None else ""
        if (kwargs.get("config_kwargs") or {}).get("alora_invocation_tokens") is not None:
            method = "ActivatedLora"  # which has no class of its own
        reason = find_reason(test.__name__, method)
        if reason is None:
            return test(self, *args, **kwargs)
        with pytest.raises(reason.error, match=reason.words):
            test(self, *args, **kwargs)
        pytest.xfail(reason.why)

    return wrapper


class TestPeftSuite(decoders.TestDecoderModels):
    transformers_class = OurModels


for _name in dir(decoders.TestDecoderModels):
    if any(fnmatch.fnmatch(_name, pattern) for pattern in ABOUT_OTHERS):
        setattr(TestPeftSuite, _name, None)
    elif _name.startswith("test_"):
        setattr(TestPeftSuite, _name, with_reason(getattr(decoders.TestDecoderModels, _name)))


def test_no_entry_is_left_behind():
    """What the tables name is there, in this release of PEFT's suite."""
    names = [name for name in dir(decoders.TestDecoderModels) if name.startswith("test_")]
    for pattern in ABOUT_OTHERS:
        assert fnmatch.filter(names, pattern), pattern
    methods = {config.__name__.removesuffix("Config") for config, _ in decoders.ALL_CONFIGS} | {
        "ActivatedLora",
        "Cartridge",
    }
    assert set(OWN_SETTINGS) <= methods
    every = [f"{name} {method}" for name in names for method in methods]
    for reason in REASONS:
        for pattern in reason.tests:
            assert fnmatch.filter(every, pattern), pattern
