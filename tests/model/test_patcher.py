"""The entropy model: by itself, and frozen inside a BLT."""

import copy

import pytest
import torch
from torch import nn

from blt_hf import (
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
    BltPatcherConfig,
)
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config
from helpers.texts import encode


def test_without_patcher(ids):
    config = tiny_config(patch_in_forward=False)
    torch.manual_seed(0)
    model = BltForCausalLM(config).eval()
    assert model.model.patcher is None
    with pytest.raises(ValueError, match="`patch_in_forward=False`.*`patch_lengths`.*`set_patcher`"):
        model(ids)
    whole = make_model(seed=7)
    model.load_state_dict({n: w for n, w in whole.state_dict().items() if "patcher" not in n})
    lengths = whole(ids, output_patches=True).patch_lengths
    assert_same(model(ids, patch_lengths=lengths).logits, whole(ids).logits)
    model.config.patching_threshold = whole.config.patching_threshold
    model.set_patcher(copy.deepcopy(whole.model.patcher))
    assert_same(model(ids).logits, whole(ids).logits)


def test_set_patcher(tmp_path, ids):
    model = make_model(seed=7)
    before = model(ids, output_patches=True)
    wider = BltPatcherConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sliding_window=5
    )
    make_model(wider, BltPatcher, seed=1).save_pretrained(tmp_path / "patcher")
    patcher = BltPatcher.from_pretrained(tmp_path / "patcher").eval()
    model.train()
    model.set_patcher(patcher)
    model.eval()
    out = model(ids, output_patches=True)
    assert_same(out.entropies, patcher(ids, output_patches=True).entropies)
    assert not torch.allclose(out.entropies, before.entropies, atol=1e-2)
    assert model.config.patcher_config.hidden_size == 32
    assert not any(p.requires_grad for p in model.model.patcher.parameters())
    model.save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert_same(BltForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, out.logits)
    first = model(ids[:, :30], use_cache=True)
    assert_same(model(ids[:, 30:], past_key_values=first.past_key_values).logits, out.logits[:, 30:])


def test_set_patcher_refuses_what_is_none(model):
    with pytest.raises(ValueError, match="`patcher` must be a BltPatcher; got Linear"):
        model.set_patcher(nn.Linear(2, 2))
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    small = BltPatcherConfig(**sizes)
    small.vocab_size = 100
    with pytest.raises(ValueError, match="`patcher` has a vocabulary of 100; 260"):
        model.set_patcher(BltPatcher(small))


@pytest.mark.parametrize(
    "model_class", [BltForCausalLM, BltModel, BltForSequenceClassification, BltForTokenClassification]
)
def test_the_patcher_is_frozen(model_class, tmp_path):
    torch.manual_seed(0)
    model = model_class(tiny_config(num_labels=3)).train()
    base = getattr(model, "model", model)
    assert model.training and base.local_encoder.training and not base.patcher.training
    assert not any(module.training for module in base.patcher.modules())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and not [name for name in trainable if "patcher" in name]
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).train()
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "patcher" in n)
    assert not getattr(loaded, "model", loaded).patcher.training


def test_training_leaves_the_patcher_as_it_is(ids):
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if "patcher" in n)
        assert all(p.grad is not None for n, p in model.named_parameters() if "patcher" not in n)
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("patcher" in name), name


def test_the_patcher_trains_by_itself(ids):
    patcher = make_model(tiny_config().patcher_config, BltPatcher).train()
    optimizer, losses = torch.optim.AdamW(patcher.parameters(), lr=0.02), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(patcher(ids, labels=ids).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in patcher.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


@torch.no_grad()
def test_patcher_cached_padded_and_packed(patcher, padded):
    rows, ids, mask = padded
    alone = [patcher(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    out = patcher(ids, attention_mask=mask)
    for index in range(2):
        assert_same(out.logits[index][mask[index] == 1], alone[index])
    packed = torch.tensor([sum(rows, [])])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    assert_same(patcher(packed, position_ids=positions).logits[0], torch.cat(alone))
    cache, steps = None, []
    for piece in torch.tensor([rows[0]]).split([13, 1, 1, 20, 1, len(rows[0]) - 36], dim=1):
        step = patcher(piece, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits[0])
    assert_same(torch.cat(steps), alone[0])


@torch.no_grad()
def test_patcher_generates(patcher, padded):
    rows, ids, mask = padded
    text = patcher.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    for index, row in enumerate(rows):
        for _ in range(20):
            row = [*row, int(patcher(torch.tensor([row]), use_cache=False).logits[0, -1].argmax())]
        assert text[index, 50:].tolist() == row[-20:]


def test_patcher_masks_documents(patcher):
    patcher.config.mask_documents = True
    first, second = encode("one text")[:-1] + [2], encode("another, longer")[1:]
    whole = patcher(torch.tensor([first + second])).logits[0]
    alone = patcher(torch.tensor([second])).logits[0]
    assert_same(whole[len(first) :], alone)
    patcher.config.mask_documents = False
    assert not torch.allclose(patcher(torch.tensor([first + second])).logits[0, len(first) :], alone, atol=1e-2)


def test_patcher_outputs(patcher, ids):
    patcher.set_attn_implementation("eager")
    out = patcher(ids, output_hidden_states=True, output_attentions=True, output_patches=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert_same(patcher.lm_head(out.hidden_states[-1]), out.logits)
    for weights in out.attentions:
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert_same(patcher(inputs_embeds=patcher.embed_tokens(ids)).logits, out.logits)
