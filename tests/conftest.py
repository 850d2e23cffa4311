"""Settings of the whole run, and the two fixtures that most tests build on."""

import os
import sys
import types
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

import blt_hf  # noqa: F401 (registers the classes)
from blt_hf import BltForCausalLM
from blt_hf.model import step_blt
from helpers.models import DEVICE, make_model
from helpers.texts import encode


torch.set_num_threads(1)
settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck)
)
# `make test-properties`: as many new random cases of each property as this says
settings.register_profile(
    "many",
    settings.get_profile("default"),
    max_examples=int(os.environ.get("BLT_PROPERTY_CASES", 25)),
    derandomize=False,
    print_blob=True,
)
settings.load_profile("many" if "BLT_PROPERTY_CASES" in os.environ else "default")


FACTORIES = ("tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randn", "randint", "randperm")


class TorchOnDevice(types.ModuleType):
    """`torch` as a test module sees it: new tensors lie on `DEVICE`. The package's own code sees torch as it is."""

    def __getattr__(self, name: str):
        found = getattr(torch, name)
        if name not in FACTORIES:
            return found

        def make(*args, device=None, **kwargs):
            if "generator" not in kwargs:
                return found(*args, device=device or DEVICE, **kwargs)
            return found(*args, device=device, **kwargs).to(device or DEVICE)  # the numbers of a CPU's generator

        return make


def pytest_collection_finish() -> None:
    if torch.device("cpu") == DEVICE:
        return
    step_blt.CAPTURES_BY_DEFAULT = True  # all that a GPU is asked, it is asked with captured steps, too
    tests, on_device = Path(__file__).parent, TorchOnDevice("torch")
    for name, module in sys.modules.items():
        is_test = tests in Path(getattr(module, "__file__", None) or "/").parents
        if is_test and name != __name__ and getattr(module, "torch", None) is torch:
            module.torch = on_device


@pytest.fixture(scope="session")
def tiny_model() -> BltForCausalLM:
    return make_model()


@pytest.fixture
def byte_ids() -> torch.Tensor:
    """Two rows of text with a BOS, long enough to leave every window."""
    texts = ["The quick brown fox, jumps over 13 lazy dogs!", "Zażółć gęślą jaźń — naïve café über 速い狐."]
    return torch.tensor([encode(text)[:44] for text in texts], device=DEVICE)
