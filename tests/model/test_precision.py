"""Half precision and autocast."""

import pytest
import torch

from helpers.checks import assert_same
from helpers.models import make_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, ids):
    """Given the same patches, logits are close; entropies are fp32 sums over what the half-precision head says."""
    model = make_model(seed=7)
    expected = model(ids, output_patches=True)
    model.to(dtype)
    out = model(ids, patch_lengths=expected.patch_lengths)
    assert out.logits.dtype == torch.float32
    assert (out.logits - expected.logits).abs().mean() < (0.1 if dtype == torch.bfloat16 else 0.02)
    own = model(ids, output_patches=True)
    assert own.entropies.dtype == torch.float32
    assert (own.entropies - expected.entropies).abs().mean() < 0.05
    logits = model.model.patcher(ids).logits
    assert_same(own.entropies, torch.distributions.Categorical(logits=logits).entropy())
    first = model(ids[:, :30], use_cache=True)
    second = model(ids[:, 30:], past_key_values=first.past_key_values)
    assert first.past_key_values.history.entropies.values.dtype == torch.float32
    assert (torch.cat([first.logits, second.logits], dim=1) - own.logits).abs().mean() < 0.1
    text = model.generate(ids[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 32)


def test_half_precision_trains(ids):
    model = make_model().to(torch.bfloat16).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_autocast_is_close(ids):
    model = make_model(seed=7)
    expected = model(ids, output_patches=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, patch_lengths=expected.patch_lengths, labels=ids)
    assert (out.logits - expected.logits).abs().mean() < 0.1
    out.loss.backward()
