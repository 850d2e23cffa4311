"""Memory and parameters from a configuration alone: what a model and its cache really hold."""

import pytest
import torch

from blt_hf.evaluation.memory import cache_bytes
from helpers.models import make_model, tiny_config
from helpers.texts import encode


def test_cache_bytes_are_those_of_a_cache():
    model = make_model(tiny_config(patcher_config={"sliding_window": 24}))
    text = ("some text, with 2 lines and words of many lengths; " * 4)[:150]
    with torch.no_grad():
        output = model(torch.tensor([encode(text)]), use_cache=True, output_patches=True)
    num_patches = len(model.get_patches(text)) - (not model.get_patches(text).is_last_complete)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert cache_bytes(model.config, len(text) + 1, num_patches, torch.float32) == pytest.approx(kept, rel=0.05)
