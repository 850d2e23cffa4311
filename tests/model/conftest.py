"""What most tests of models start with; a file that needs another text or model has a fixture of the same name."""

import pytest
import torch

from blt_hf import BltForCausalLM, BltPatcher
from helpers.models import DEVICE, make_model, tiny_config
from helpers.texts import TEXT, encode


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([encode(TEXT)], device=DEVICE)


@pytest.fixture
def padded() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Two texts of unequal length, left-padded with an id that is not the pad id: rows, ids and mask."""
    rows = [encode(TEXT)[:50], encode("速い狐 and more, words")]
    ids = torch.tensor([[3] * (50 - len(row)) + row for row in rows], device=DEVICE)
    mask = torch.tensor([[0] * (50 - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
    return rows, ids, mask


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(seed=7)


@pytest.fixture
def patcher() -> BltPatcher:
    return make_model(tiny_config().patcher_config, BltPatcher, seed=9)
