"""Inputs that work for a row alone, and elsewhere: padding before labels, weights that are away, ids without values."""

import pytest
import torch

from blt_hf import BltPatcher, BltPatcherConfig
from helpers.models import make_model, tiny_config
from helpers.texts import encode, pad


ROWS = [encode("some text, of many bytes"), encode("other"), encode("速い狐")]


def make_patcher():
    return make_model(BltPatcherConfig(**tiny_config().patcher_config.to_dict()), BltPatcher)


@torch.no_grad()
@pytest.mark.parametrize("make", [make_model, make_patcher])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(make, side):
    model = make()
    ids, mask = pad(ROWS, side)
    alone = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in ROWS]
    expected = sum(alone) / sum(len(row) - 1 for row in ROWS)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(loss, expected)
    # Of the last columns alone, and of a text that goes on behind a cache, whose mask is longer.
    kept = model(ids, attention_mask=mask, labels=ids[:, -2:], logits_to_keep=2).loss
    whole = model(ids, attention_mask=mask).logits[:, -2]
    if side == "left":
        torch.testing.assert_close(kept, torch.nn.functional.cross_entropy(whole, ids[:, -1]))


@torch.no_grad()
def test_patches_of_an_offloaded_model():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    expected = model.get_patches(["to be or not", "é"])
    accelerate.cpu_offload(model)
    assert model.device.type == "meta"
    assert [patches.texts for patches in model.get_patches(["to be or not", "é"])] == [p.texts for p in expected]


@pytest.mark.parametrize("make", [make_model, make_patcher])
def test_ids_without_values_are_refused(make):
    with pytest.raises(ValueError, match="`input_ids` on the device `meta`"):
        make().to("meta")(torch.ones(1, 5, dtype=torch.int64, device="meta"))
