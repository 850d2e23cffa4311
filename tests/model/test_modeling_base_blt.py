"""What all models share: outputs, initialisation, saving and loading."""

import pytest
import torch
from torch import nn

from blt_hf import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
)
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config


@torch.no_grad()
def test_return_dict_false_gives_tuples(model, ids):
    out = model(ids, labels=ids, return_dict=False, use_cache=True)
    assert isinstance(out, tuple) and len(out) == 3
    expected = model(ids, labels=ids)
    assert_same(out[0], expected.loss)
    assert_same(out[1], expected.logits)
    assert isinstance(model.model(ids, return_dict=False, use_cache=False), tuple)


@pytest.fixture(scope="module")
def eager_model() -> BltForCausalLM:
    model = make_model(seed=7)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_hidden_states(model, ids):
    out = model(ids, output_hidden_states=True, output_patches=True)
    num_bytes = ids.shape[1]
    closed = int((out.patch_lengths > 0).sum()) - 1
    assert [tuple(s.shape) for s in out.hidden_states] == [(1, num_bytes, 16)] * 3
    assert [tuple(s.shape) for s in out.encoder_hidden_states] == [(1, num_bytes, 16)] * 2
    assert [tuple(s.shape) for s in out.global_hidden_states] == [(1, closed, 32)] * 3
    assert_same(model.lm_head(out.hidden_states[-1]), out.logits)
    assert_same(out.hidden_states[0], out.encoder_hidden_states[-1])
    assert model(ids).hidden_states is None
    base = model.model(ids, output_hidden_states=True)
    assert torch.equal(base.hidden_states[-1], base.last_hidden_state)


@torch.no_grad()
def test_attentions_are_distributions_inside_the_windows(eager_model, ids):
    out = eager_model(ids, output_attentions=True, output_patches=True)
    num_bytes, closed = ids.shape[1], int((out.patch_lengths > 0).sum()) - 1
    assert [tuple(w.shape) for w in out.attentions] == [(1, 2, num_bytes, num_bytes)] * 2
    assert [tuple(w.shape) for w in out.encoder_attentions] == [(1, 2, num_bytes, num_bytes)]
    assert [tuple(w.shape) for w in out.global_attentions] == [(1, 4, closed, closed)] * 2
    index = torch.arange(num_bytes)
    outside = (index > index[:, None]) | (index <= index[:, None] - 10)
    for weights in (*out.attentions, *out.encoder_attentions):
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[..., outside] == 0).all() and (weights[..., ~outside] > 0).all()
    for weights in out.global_attentions:
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights.triu(1) == 0).all()
    assert eager_model(ids).attentions is None


@torch.no_grad()
def test_padded_rows_report_what_they_report_alone(eager_model, padded):
    rows, ids, mask = padded
    arguments = {"output_hidden_states": True, "output_attentions": True, "output_patches": True}
    out = eager_model(ids, attention_mask=mask, **arguments)
    for index, row in enumerate(rows):
        alone = eager_model(torch.tensor([row]), **arguments)
        text = mask[index] == 1
        for name in ("hidden_states", "encoder_hidden_states"):
            for actual, expected in zip(out[name], alone[name]):
                assert_same(actual[index][text], expected[0])
                assert (actual[index][~text] == 0).all()
        for name in ("attentions", "encoder_attentions"):
            for actual, expected in zip(out[name], alone[name]):
                assert_same(actual[index][:, text][:, :, text], expected[0])
                assert (actual[index][:, text][:, :, ~text] == 0).all()
        closed = int((alone.patch_lengths > 0).sum()) - 1
        for name in ("global_hidden_states", "global_attentions"):
            for actual, expected in zip(out[name], alone[name]):
                actual = actual[index][:closed] if "states" in name else actual[index][:, :closed, :closed]
                assert_same(actual, expected[0])
        assert_same(out.entropies[index][text], alone.entropies[0])
        assert (out.entropies[index][~text] == 0).all()
        assert out.patch_lengths[index][: closed + 1].tolist() == alone.patch_lengths[0].tolist()


@torch.no_grad()
def test_attentions_after_a_cache(eager_model, ids):
    full = eager_model(ids, output_attentions=True)
    first = eager_model(ids[:, :40], use_cache=True)
    out = eager_model(ids[:, 40:47], past_key_values=first.past_key_values, output_attentions=True)
    for actual, expected in zip(out.attentions, full.attentions):
        assert actual.shape[-1] == 9 + 7  # the window's past, and the chunk
        assert_same(actual, expected[:, :, 40:47, 31:47])


def test_attentions_without_eager_are_said_to_be_missing(ids):
    model, said = make_model(), []
    model.set_attn_implementation("sdpa")
    logger = __import__("blt_hf.model.modeling_base_blt", fromlist=["logger"]).logger
    original, logger.warning_once = logger.warning_once, said.append
    try:
        assert model(ids, output_attentions=True).attentions is None
    finally:
        logger.warning_once = original
    assert said and "attn_implementation='eager'" in said[0] and "'sdpa'" in said[0]


@torch.no_grad()
def test_output_patches(model, ids):
    out = model(ids, output_patches=True)
    assert out.patch_lengths.dtype == torch.int64 and int(out.patch_lengths.sum()) == ids.shape[1] + 1
    assert out.entropies.shape == ids.shape and out.entropies.dtype == torch.float32
    logits = model.model.patcher(ids).logits
    assert_same(out.entropies, torch.distributions.Categorical(logits=logits).entropy())
    starts = [0, 1] + [
        p for p in range(2, ids.shape[1] + 1) if out.entropies[0, p - 1] > model.config.patching_threshold
    ]
    assert out.patch_lengths[0].cumsum(0).tolist() == [*starts[1:], ids.shape[1] + 1]
    plain = model(ids)
    assert plain.entropies is None and plain.patch_lengths is None
    assert make_model(tiny_config(patching_mode="byte"))(ids, output_patches=True).entropies is None
    assert_same(model.model.patcher(ids, output_patches=True, logits_to_keep=1).entropies, out.entropies)


@torch.no_grad()
def test_output_patches_after_a_cache(model, ids):
    first = model(ids[:, :30], use_cache=True, output_patches=True)
    second = model(ids[:, 30:], past_key_values=first.past_key_values, output_patches=True)
    whole = model(ids, output_patches=True)
    assert_same(torch.cat([first.entropies, second.entropies], dim=1), whole.entropies)
    joined = first.patch_lengths[0].tolist()
    rest = second.patch_lengths[0].tolist()
    # The open patch was counted with its next byte; that byte is the first of the second call.
    assert [*joined[:-1], joined[-1] - 1 + rest[0], *rest[1:]] == whole.patch_lengths[0].tolist()


def test_initialisation_follows_fan_in():
    torch.manual_seed(0)
    config = tiny_config(encoder_hash_byte_group_vocab=2000)
    model = BltForCausalLM(config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight, std = module.weight, module.weight.shape[-1] ** -0.5
            assert abs(float(weight.std()) / std - 1) < 0.15 + 3 / weight.numel() ** 0.5, name
            assert float(weight.abs().max()) <= 3.001 * std, name
            assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5, name
        elif "norm" in name.rsplit(".", 1)[-1]:
            assert (module.weight == 1).all(), name
    logits = model(torch.randint(4, 260, (2, 200))).logits
    assert 0.3 < float(logits.std()) < 3


@pytest.mark.parametrize(
    "model_class", [BltForCausalLM, BltModel, BltPatcher, BltForSequenceClassification, BltForTokenClassification]
)
@torch.no_grad()
def test_save_and_load(model_class, tmp_path, ids):
    config = tiny_config(patching_mode="space")
    model = make_model(config.patcher_config if model_class is BltPatcher else config, model_class)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = model_class.from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert_same(loaded(ids)[0], model(ids)[0])


@torch.no_grad()
def test_a_base_model_loads_into_heads_and_back(tmp_path, ids):
    model = make_model()
    model.save_pretrained(tmp_path / "lm")
    base = BltModel.from_pretrained(tmp_path / "lm").eval()
    assert_same(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    classifier = BltForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert_same(classifier.model(ids).last_hidden_state, base(ids).last_hidden_state)
