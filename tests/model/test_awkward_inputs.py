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
def test_the_loss_of_a_padded_batch(make, side):
    """That of its rows; on the left, as in every model of transformers, the label of a text's first byte counts too,
    unless it is -100."""
    model = make()
    ids, mask = pad(ROWS, side)
    alone = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in ROWS]
    expected = sum(alone) / sum(len(row) - 1 for row in ROWS)
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(dim=1)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert torch.allclose(loss, expected) == (side == "right")
    labels[torch.arange(len(ROWS)), first] = -100
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected)


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
