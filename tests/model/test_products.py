"""Products by oneDNN are those of torch, stand only for plain layers, and are made in few shapes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blt_hf import products
from blt_hf.model.layers_blt import project
from blt_hf.products import absorb, choose, multiply, prefers_onednn
from helpers.checks import assert_same
from helpers.models import make_model, model_for, tiny_config
from helpers.texts import encode


pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Makes any processor prefer oneDNN; rows of each product that it makes."""
    found = []
    monkeypatch.setattr(products, "prefers_onednn", lambda num_rows=128: True)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    multiply_few = products.multiply_few

    def count(rows, weight):
        found.append(len(rows))
        return multiply_few(rows, weight)

    monkeypatch.setattr(products, "multiply_few", count)
    return found


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 16, 32, 33, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("is_turned", [False, True])
def test_products_equal_those_of_torch(rows, is_turned):
    generator = torch.Generator().manual_seed(0)
    states, weight, other = (torch.randn(*shape, generator=generator) for shape in ((rows, 24), (40, 24), (rows, 40)))
    expected = states @ weight.t()
    weight = weight.t().contiguous().t() if is_turned else weight
    assert_same(multiply(states, weight), expected)
    chosen, chosen_sum = choose(rows)
    assert_same(chosen(states, weight), expected)
    for beta in (1, 2):
        assert_same(chosen_sum(other, states, weight, beta=beta), expected + beta * other)


@torch.no_grad()
def test_a_linear_layer_that_does_no_more_than_its_weight_says_is_multiplied(made):
    linear, states = nn.Linear(8, 6, bias=False), torch.randn(2, 70, 8)
    assert_same(project(linear, states), states @ linear.weight.t())
    assert made == [128, 12]
    project(linear, states[:, :20])  # too few
    with torch.enable_grad():
        assert project(linear, states).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert project(linear, states).dtype == torch.bfloat16
    assert project(linear.to(torch.bfloat16), states.bfloat16()).dtype == torch.bfloat16
    assert len(made) == 2


class _Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def _with_hook(linear):
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return linear


def _with_pre_hook(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return linear


def _with_forward(linear):
    forward = linear.forward
    linear.forward = lambda states: 2 * forward(states)
    return linear


def _of_another_class(linear):
    doubled = _Doubled(8, 6, bias=False)
    doubled.weight = linear.weight
    return doubled


@torch.no_grad()
@pytest.mark.parametrize("change", [_with_hook, _with_pre_hook, _with_forward, _of_another_class])
def test_a_linear_layer_that_does_more_is_called(change, made):
    linear, states = nn.Linear(8, 6, bias=False), torch.randn(70, 8)
    expected = 2 * states @ linear.weight.t()
    assert_same(project(change(linear), states), expected)
    assert not made


@torch.no_grad()
def test_a_bias_is_added(made):
    linear, states = nn.Linear(8, 6), torch.randn(70, 8)
    assert_same(project(linear, states), linear(states))
    assert not made


@torch.no_grad()
@pytest.mark.parametrize("change", [None, _with_hook, _with_pre_hook, _with_forward])
def test_keys_of_a_lexicon_are_multiplied(change, made, monkeypatch):
    model, states = model_for("lexicon"), torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    lexicon = copy.deepcopy(model.model.local_decoder.lexicon)
    if change is not None:
        change(lexicon.keys)
    found = lexicon.rank(states)
    assert made == ([] if change else [6])
    monkeypatch.setattr(products, "prefers_onednn", lambda num_rows=128: False)
    assert_same(found, lexicon.rank(states))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_forward_and_steps_equal_those_by_torch(rows, made, monkeypatch):
    model = make_model(tiny_config())
    ids = torch.tensor([encode("some text, with 2 lines\nand words " * 6)] * rows)
    ids[-1] = ids[-1].roll(5)
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def run():
        written = model.generate(ids, eos_token_id=None, pad_token_id=0, **settings)
        drafted = model.generate(ids, eos_token_id=None, pad_token_id=0, self_speculation_window=4, **settings)
        assert written.sequences.equal(drafted.sequences)
        return model(ids, use_cache=False).logits, torch.stack(written.logits)

    found = run()
    assert {128, rows} <= set(made)
    monkeypatch.setattr(products, "prefers_onednn", lambda num_rows=128: False)
    made.clear()
    for one, other in zip(found, run()):
        assert_same(one, other)
    assert not made


@torch.no_grad()
def test_few_shapes_whatever_comes(made):
    model = make_model(tiny_config())
    for length in range(64, 400, 7):
        model(torch.full((2, length), 70), use_cache=True)
    assert set(made) <= {128, *range(1, 33)}


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_absorbed_latents_give_the_attention(kv_heads):
    layers, heads, size, width, patches, latents = 3, 4, 6, 10, 2, 5
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, width, generator=generator)
    queries, outputs = (torch.randn(layers, heads * size, width, generator=generator) for _ in range(2))
    read = torch.randn(patches, layers, 2, latents, kv_heads, size, generator=generator)
    for number, (keys, values) in enumerate(absorb(queries, outputs, read)):
        query = (states @ queries[number].t()).view(1, 7, heads, size).transpose(1, 2)
        key, value = read[:, number].transpose(0, 1).flatten(1, 2).transpose(1, 2)[:, None]
        expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0, enable_gqa=True)
        expected = expected.transpose(1, 2).flatten(2)[0] @ outputs[number]
        found = (states @ keys).view(7, heads, -1).softmax(dim=-1).flatten(1) @ values
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("onednn", "expected"), [(0.5, True), (0.9, False), (2.0, False)])
def test_what_is_clearly_faster_here_is_chosen(onednn, expected, monkeypatch):
    """By its best time, once for a number of rows and of threads, and not while somebody counts operations."""
    asked = []

    def seconds(function, states, weight):
        asked.append(len(states))
        mine = 1.0 if function is nn.functional.linear else onednn
        return mine * (50 if len(asked) <= 4 else 1)  # a neighbour is busy at first

    monkeypatch.setattr(products, "_preferred", {})
    monkeypatch.setattr(products, "_seconds", seconds)
    with FlopCounterMode(display=False):
        assert not prefers_onednn(16) and not asked
    state = torch.get_rng_state()
    assert prefers_onednn(16) is expected
    count = len(asked)
    assert prefers_onednn(16) is expected and len(asked) == count and set(asked) == {16}
    assert prefers_onednn(128) is expected and set(asked) == {16, 128}
    assert torch.equal(torch.get_rng_state(), state)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not prefers_onednn(16)


def test_one_row_is_not_given_to_all_cores_beside_a_busy_neighbour(monkeypatch):
    """Its usual time decides, not its best: the neighbour has a core in most rounds."""
    asked = []

    def seconds(function, states, weight):
        asked.append(function)
        is_held_up = function is not nn.functional.linear and len(asked) % 8 > 2
        return 1.0 if function is nn.functional.linear else 3.0 if is_held_up else 0.5

    monkeypatch.setattr(products, "_preferred", {})
    monkeypatch.setattr(products, "_seconds", seconds)
    assert not prefers_onednn(1)
    assert prefers_onednn(16)


def test_measuring_is_plain_work_under_autocast_and_other_defaults(monkeypatch):
    monkeypatch.setattr(products, "_preferred", {})
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert prefers_onednn(16) in (True, False)
    assert len(products._preferred) == 1
