"""Building blocks: products of few rows."""

import pytest
import torch
from torch import nn

from blt_hf.model import layers_blt
from blt_hf.model.layers_blt import project


@pytest.fixture(autouse=True)
def products_in_parts(monkeypatch):
    """As on an AMD processor, with no matrix too small; counts them."""
    calls, bmm = [], torch.bmm

    def counted(*arguments):
        calls.append(arguments)
        return bmm(*arguments)

    monkeypatch.setattr(layers_blt, "_IS_AMD", True)
    monkeypatch.setattr(layers_blt, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(torch, "bmm", counted)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 4), (16, 1)])
def test_few_rows_in_parts(shape, products_in_parts):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=False)
    states = torch.randn(*shape, 24)
    output = project(linear, states)
    assert len(products_in_parts) == 1
    torch.testing.assert_close(output, linear(states))
    assert output.is_contiguous()
    torch.testing.assert_close(project(linear, states.transpose(0, 1)), output.transpose(0, 1))


@torch.no_grad()
def test_everything_else_is_the_layer_itself(products_in_parts):
    """A bias, adapters' hooks, other types, weights that cannot be cut, many rows."""
    torch.manual_seed(0)
    row = torch.randn(1, 1, 24)
    hooked, transposed = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    transposed.weight = nn.Parameter(torch.randn(24, 40).t())
    cases = [
        (nn.Linear(24, 40), row),
        (hooked, row),
        (transposed, row),
        (nn.Linear(24, 41, bias=False), row),
        (nn.Linear(24, 40, bias=False, dtype=torch.bfloat16), row.bfloat16()),
        (nn.Linear(24, 40, bias=False, dtype=torch.float64), row.double()),
        (nn.Linear(24, 40, bias=False), torch.randn(17, 1, 24)),
        (nn.Sequential(nn.Linear(24, 40)), row),
    ]
    for linear, states in cases:
        assert project(linear, states).equal(linear(states))
    with torch.enable_grad():
        assert project(nn.Linear(24, 40, bias=False), row).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(nn.Linear(24, 40, bias=False), row).dtype is torch.bfloat16
    assert not products_in_parts
