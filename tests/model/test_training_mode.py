"""Models in training mode: checkpointing, caches, dropout, batches in parts."""

import warnings

import pytest
import torch

from blt_hf import (
    BltForCausalLM,
    BltPatcher,
)
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config


def gradients_of(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", ["model", "patcher"])
def test_gradient_checkpointing_changes_nothing(part, use_reentrant, padded):
    _, ids, mask = padded
    config = tiny_config(encoder_config={"num_hidden_layers": 2, "cross_attn_all_layers": True})
    parts = {"model": (config, BltForCausalLM), "patcher": (config.patcher_config, BltPatcher)}
    model = make_model(*parts[part]).train()
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        calls = []
        layer = model.layers[0] if part == "patcher" else model.model.local_decoder.layers[0]
        hook = layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        hook.remove()
        results.append(
            (loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(calls))
        )
    (loss, gradients, once), (other_loss, other_gradients, twice) = results
    assert (once, twice) == (1, 2), "checkpointing did recompute"
    assert_same(other_loss, loss)
    assert set(gradients) == set(other_gradients)
    for name in gradients:
        assert_same(other_gradients[name], gradients[name])


def test_gradient_checkpointing_and_a_cache_exclude_each_other(ids):
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with (
        warnings.catch_warnings()
    ):  # transformers blames its own file for what we call, so the suite's filter is blind
        warnings.simplefilter("error", FutureWarning)
        assert model(ids, use_cache=True).past_key_values is None
    model.eval()
    assert model(ids, use_cache=True).past_key_values is not None


def test_training_makes_no_cache_unless_asked(ids):
    model = make_model().train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.eval()
    assert model(ids).past_key_values is not None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_dropout_acts_in_training_alone(ids):
    parts = {
        name: {"dropout": 0.3} for name in ("encoder_config", "decoder_config", "global_config", "patcher_config")
    }
    model = make_model(tiny_config(**parts))
    assert_same(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-2)
    entropies = [model(ids, output_patches=True).entropies for _ in range(2)]
    assert torch.equal(*entropies), "the entropy model never drops anything"


def test_gradient_accumulation_matches_one_batch(ids):
    """`num_items_in_batch` makes the sum over parts the loss of the whole."""
    model = make_model(seed=7)
    rows = torch.cat([ids[:, :40], ids[:, 20:60]])
    items = torch.tensor(2 * 39)
    _, whole = gradients_of(model, rows)
    parts = [gradients_of(model, row[None], num_items_in_batch=items)[1] for row in rows]
    for name in whole:
        assert_same(parts[0][name] + parts[1][name], whole[name])
