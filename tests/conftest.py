"""Small random models that every test module builds on."""

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
from blt_hf import BltConfig, BltForCausalLM


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


# `make test-gpu`: where the tests' own tensors and random models lie
DEVICE = torch.device(os.environ.get("BLT_TEST_DEVICE", "cpu"))
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
    tests, on_device = Path(__file__).parent, TorchOnDevice("torch")
    for name, module in sys.modules.items():
        is_test = tests in Path(getattr(module, "__file__", None) or "/").parents
        if is_test and name != __name__ and getattr(module, "torch", None) is torch:
            module.torch = on_device


def cases(count: int):
    """For a property whose cases take long: so many in the default run, and as many as others have in a longer one."""
    return settings() if "BLT_PROPERTY_CASES" in os.environ else settings(max_examples=count)


def tiny_config(**overrides) -> BltConfig:
    """A BLT of a few thousand weights whose windows are shorter than the tests' texts."""
    values = {
        "patcher_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sliding_window": 12,
        },
        "encoder_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "cross_attn_k": overrides.get("cross_attn_k", 2),
        },
        "decoder_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_size_global": 32,
            "cross_attn_k": overrides.get("cross_attn_k", 2),
        },
        "global_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "encoder_hash_byte_group_vocab": 101,
        "local_attention_window_len": 10,
        "patching_threshold": 5.0,
    }
    for name, value in overrides.items():
        if isinstance(value, dict):
            values[name] = {**values.get(name, {}), **value}
        else:
            values[name] = value
    return BltConfig(**values)


def make_model(config: BltConfig | None = None, model_class=BltForCausalLM, seed: int = 0):
    """A model in eval mode whose norms and entropies vary as those of a trained one."""
    torch.manual_seed(seed)
    model = model_class(config or tiny_config()).eval().to(DEVICE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.25 * torch.randn_like(weight))
            if name.endswith("patcher.lm_head.weight"):
                weight.mul_(2.5)
    if getattr(model.config, "patching_mode", None) == "entropy":
        _calibrate(model)
    return model


def _calibrate(model) -> None:
    """Thresholds in the widest gap near a quantile, so that patches hold a few bytes and no start hangs by a hair."""
    config, text = model.config, "some text, with 2 lines\nand words of many lengths; é速 ab\n" * 2
    with torch.no_grad():
        ids = torch.tensor([[1] + [b + 4 for b in text.encode()]], device=DEVICE)
        entropies = model(ids, output_patches=True).entropies[0]

    def threshold(scores: torch.Tensor, quantile: float) -> float:
        scores = scores.sort().values
        middle = int(len(scores) * quantile)
        near = scores[middle - 5 : middle + 5]
        index = int((near[1:] - near[:-1]).argmax())
        return float(near[index] + near[index + 1]) / 2

    rises = entropies[1:] - entropies[:-1]
    if config.monotonicity:
        config.patching_threshold = threshold(rises, 0.7)
    else:
        config.patching_threshold = threshold(entropies, 0.5 if config.patching_threshold_add is not None else 0.7)
    if config.patching_threshold_add is not None:
        config.patching_threshold_add = threshold(rises, 0.5)


@pytest.fixture(scope="session")
def tiny_model() -> BltForCausalLM:
    return make_model()


@pytest.fixture
def byte_ids() -> torch.Tensor:
    """Two rows of text with a BOS, long enough to leave every window."""
    texts = ["The quick brown fox, jumps over 13 lazy dogs!", "Zażółć gęślą jaźń — naïve café über 速い狐."]
    rows = [[1] + [b + 4 for b in text.encode()][:43] for text in texts]
    return torch.tensor([row[:44] for row in rows], device=DEVICE)
