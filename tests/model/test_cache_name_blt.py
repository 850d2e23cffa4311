"""The cache has two names: `past_key_values` up to transformers 5.23, `cache` from 5.24 on. A BLT takes both."""

import inspect

import pytest
import torch
import transformers
from packaging.version import Version

from blt_hf import BltCache, BltForSequenceClassification, BltForTokenClassification
from blt_hf.model.names_blt import CACHE_NAME, CACHE_NAMES, takes_cache
from helpers.models import tiny_config


IDS = torch.tensor([[1, 108, 105, 112, 112, 115, 36, 123]])


def test_the_name_is_that_of_the_installed_transformers():
    assert ("cache" if Version(transformers.__version__) >= Version("5.24.0") else "past_key_values") == CACHE_NAME


def test_takes_cache():
    @takes_cache
    def function(a, past_key_values=None, *, b=2):
        return a, past_key_values, b

    assert function(1, "c") == function(1, cache="c") == function(1, past_key_values="c") == (1, "c", 2)
    assert function(1) == function(1, cache=None) == (1, None, 2)
    assert list(inspect.signature(function).parameters) == ["a", CACHE_NAME, "b"]
    with pytest.raises(ValueError, match="two names of one argument"):
        function(1, past_key_values="c", cache="c")


@torch.no_grad()
def test_forward_takes_both(tiny_model):
    config = tiny_config(num_labels=3)
    models = [tiny_model, tiny_model.model, tiny_model.model.patcher]
    models += [BltForSequenceClassification(config).eval(), BltForTokenClassification(config).eval()]
    for model in models:
        expected = model(IDS, use_cache=False)[0]
        for name in CACHE_NAMES:
            cache = BltCache(model.config)
            model(IDS[:, :-1], **{name: cache})
            out = model(IDS[:, -1:], **{name: cache})
            assert cache.get_seq_length() == IDS.shape[1]
            last = expected if expected.dim() == 2 else expected[:, -1:]
            torch.testing.assert_close(out[0], last, atol=1e-5, rtol=1e-5)
            if CACHE_NAME in type(out).__dataclass_fields__:
                assert getattr(out, CACHE_NAME) is out.past_key_values is cache


def test_generate_gives_and_takes_the_cache(tiny_model):
    arguments = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for drafts in ({}, {"self_speculation_window": 3}, {"num_beams": 2}):
        whole = tiny_model.generate(IDS, max_new_tokens=12, **arguments, **drafts).sequences
        first = tiny_model.generate(IDS, max_new_tokens=6, **arguments, **drafts)
        cache = getattr(first, CACHE_NAME)
        assert isinstance(cache, BltCache)
        if "num_beams" in drafts:
            continue
        second = tiny_model.generate(first.sequences, max_new_tokens=6, **arguments, **drafts, **{CACHE_NAME: cache})
        assert torch.equal(second.sequences, whole)
