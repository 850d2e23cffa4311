"""`BltLinear`: the quick product of few rows is `nn.Linear`'s, and used only where it may be."""

import pytest
import torch
from torch import nn

from blt_hf import layers_blt
from blt_hf.layers_blt import BltLinear


@pytest.fixture
def turned(monkeypatch):
    """Turns the quick path on, whatever this processor is; gives the rows of each call that took it."""
    rows, plain = [], BltLinear._turned
    monkeypatch.setattr(layers_blt, "_TURNS_FEW_ROWS", True)
    monkeypatch.setattr(layers_blt, "_LARGE", 200)

    def counted(self, input):
        rows.append(input.numel() // self.in_features)
        return plain(self, input)

    monkeypatch.setattr(BltLinear, "_turned", counted)
    return rows


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (1, 3), (2, 4), (4,), (3, 3), (0, 5)])
@pytest.mark.parametrize("outputs, inputs", [(24, 16), (16, 24), (16, 16)])
def test_equals_a_linear_layer(turned, shape, outputs, inputs):
    layer = BltLinear(inputs, outputs, bias=False)
    x = torch.randn(*shape, inputs)
    with torch.no_grad():
        output = layer(x)
    expected = nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous()
    rows = x.numel() // inputs
    assert bool(turned) == (0 < rows <= 4)


@pytest.mark.parametrize("case", ["gradients", "bias", "bfloat16", "float64", "many rows", "small"])
def test_leaves_the_rest_alone(turned, case):
    layer = BltLinear(16, 8 if case == "small" else 16, bias=case == "bias")
    x = torch.randn(9 if case == "many rows" else 1, 16)
    if case in ("bfloat16", "float64"):
        layer, x = layer.to(getattr(torch, case)), x.to(getattr(torch, case))
    with torch.set_grad_enabled(case == "gradients"):
        output = layer(x)
    torch.testing.assert_close(output, nn.functional.linear(x, layer.weight, layer.bias))
    assert not turned
    assert output.requires_grad == (case == "gradients")


def test_leaves_other_tensors_in_the_place_of_weights_alone(turned):
    class Quantized(torch.Tensor):
        pass

    layer = BltLinear(16, 16, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized))
    with torch.no_grad():
        layer(torch.randn(1, 16))
    assert not turned
