"""Byte and hash embeddings, and embeddings that the caller gives."""

import copy

import pytest
import torch
from torch import nn

from blt_hf import (
    BltForCausalLM,
)
from blt_hf.model.layers_blt import HASH_PRIMES, ngram_hashes
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config
from helpers.texts import encode


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_ids_of_any_integer_type(model, ids, dtype):
    """Hashes wrap at 64 bits, whatever the ids are stored in."""
    expected = model(ids).logits
    assert_same(model(ids.to(dtype)).logits, expected)
    first = model(ids[:, :20].to(dtype), use_cache=True)
    assert_same(model(ids[:, 20:].to(dtype), past_key_values=first.past_key_values).logits, expected[:, 20:])


def test_hashes_against_plain_python():
    """The rule of the reference's README with Python's own integers."""
    row = encode("速い — 12")
    sizes, functions, num_rows = [1, 3, 8], 3, 101
    hashes = ngram_hashes(torch.tensor([row]), None, torch.arange(len(row))[None], sizes, functions, num_rows)

    def wrapped(value):
        return (value + 2**63) % 2**64 - 2**63

    for position in range(len(row)):
        expected = []
        for function in range(functions):
            for size in sizes:
                gram = ([0] * size + row[: position + 1])[-size:]
                value = sum(wrapped(token * HASH_PRIMES[function] ** power) for power, token in enumerate(gram))
                expected.append(wrapped(value) % num_rows + len(expected) * num_rows)
        assert hashes[0, position].tolist() == expected


@pytest.mark.parametrize(
    "rule", [{"patching_mode": "byte"}, {"patching_mode": "static", "patch_size": 3}, {}, {"patching_mode": "space"}]
)
@torch.no_grad()
def test_byte_embeds(rule, padded):
    """Sums of byte and hash embeddings; without ids, the rules that read bytes need patch lengths."""
    model = make_model(tiny_config(**rule))
    _, ids, mask = padded
    embeds = model.embed_bytes(ids, attention_mask=mask)
    expected = model(ids, attention_mask=mask, output_patches=True)
    assert_same(model(ids, byte_embeds=embeds, attention_mask=mask).logits, expected.logits)
    embeds = torch.where(mask[..., None] != 0, embeds, torch.randn_like(embeds))
    if model.config.patching_mode in ("entropy", "space"):
        with pytest.raises(ValueError, match=f"`inputs_embeds`.*'{model.config.patching_mode}'.*`patch_lengths`"):
            model(byte_embeds=embeds, attention_mask=mask)
        out = model(byte_embeds=embeds, attention_mask=mask, patch_lengths=expected.patch_lengths)
    else:
        out = model(byte_embeds=embeds, attention_mask=mask)
    assert_same(out.logits, expected.logits)


@pytest.mark.parametrize(
    "rule", [{"patching_mode": "byte"}, {"patching_mode": "static", "patch_size": 3}, {}, {"patching_mode": "space"}]
)
@torch.no_grad()
def test_inputs_embeds(rule, padded):
    """Byte embeddings as `get_input_embeddings` gives them, as for a Llama; hashes and patches come from the ids."""
    model = make_model(tiny_config(**rule))
    _, ids, mask = padded
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask, output_patches=True)
    assert_same(model(ids, inputs_embeds=embeds, attention_mask=mask).logits, expected.logits)
    with pytest.raises(ValueError, match="`inputs_embeds` are byte embeddings.*`embed_bytes.*`byte_embeds`"):
        model(inputs_embeds=embeds, attention_mask=mask, patch_lengths=expected.patch_lengths)
    with pytest.raises(ValueError, match="`inputs_embeds` and `byte_embeds` cannot be given together"):
        model(ids, inputs_embeds=embeds, byte_embeds=embeds)
    plain = make_model(tiny_config(encoder_hash_byte_group_nb_functions=0, **rule))
    expected = plain(ids, attention_mask=mask, output_patches=True)
    embeds = plain.get_input_embeddings()(ids)
    out = plain(inputs_embeds=embeds, attention_mask=mask, patch_lengths=expected.patch_lengths)
    assert_same(out.logits, expected.logits)


@torch.no_grad()
def test_embeddings_in_pieces_with_a_cache(ids):
    """A later piece has the hashes of the bytes before it."""
    model = make_model()
    expected, embed = model(ids).logits, model.get_input_embeddings()
    first = model(ids[:, :30], inputs_embeds=embed(ids[:, :30]), use_cache=True)
    cache = first.past_key_values
    more = model.embed_bytes(ids[:, 30:33], past_key_values=cache)
    second = model(ids[:, 30:33], byte_embeds=more, past_key_values=cache)
    third = model(ids[:, 33:], inputs_embeds=embed(ids[:, 33:]), past_key_values=cache)
    assert_same(torch.cat([first.logits, second.logits, third.logits], dim=1), expected)


def test_attribution_to_bytes(ids):
    """The gradient of a logit at byte embeddings, as attribution methods ask for it."""
    model = make_model()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(ids, inputs_embeds=embeds, use_cache=False).logits[0, 20].max().backward()
    assert embeds.grad[0, :21].abs().sum(dim=-1).min() > 0 and not embeds.grad[0, 21:].any()


@pytest.mark.parametrize("rule", [{"patching_mode": "byte"}, {}], ids=["byte", "entropy"])
@torch.no_grad()
def test_ids_after_inputs_embeds(rule, ids):
    """Hashes and entropies of later bytes need the ids before them, which embeddings hide: right, or refused."""
    model = make_model(tiny_config(**rule))
    expected = model(ids, output_patches=True)
    lengths = None if rule else model(ids[:, :30], output_patches=True).patch_lengths
    first = model(byte_embeds=model.embed_bytes(ids[:, :30]), patch_lengths=lengths, use_cache=True)
    assert_same(first.logits, expected.logits[:, :30])
    try:
        out = model(ids[:, 30:], past_key_values=first.past_key_values)
    except ValueError as error:
        assert "`past_key_values` holds bytes that were passed as embeddings" in str(error)
    else:
        assert_same(out.logits, expected.logits[:, 30:])


def test_in_and_output_embeddings(model, patcher):
    assert model.get_input_embeddings() is model.model.local_encoder.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert patcher.get_input_embeddings() is patcher.embed_tokens
    assert patcher.get_output_embeddings() is patcher.lm_head
    changed = copy.deepcopy(model)
    embedding, head = nn.Embedding(260, 16), nn.Linear(16, 260, bias=False)
    changed.set_input_embeddings(embedding)
    changed.set_output_embeddings(head)
    assert changed.model.local_encoder.embed_tokens is embedding and changed.lm_head is head


@torch.no_grad()
def test_more_ids_than_bytes(tmp_path, ids):
    """`tokenizer.add_tokens` and `resize_token_embeddings`: new ids run, in every mode, and survive a round trip."""
    for rule in ({}, {"patching_mode": "space"}):
        model = make_model(tiny_config(**rule))
        before = model(ids).logits
        model.resize_token_embeddings(264, mean_resizing=False)
        assert_same(model(ids).logits[..., :260], before)
        text = torch.cat([ids[:, :20], torch.tensor([[262, 261]]), ids[:, 20:]], dim=1)
        out = model(text)
        assert out.logits.shape[-1] == 264
        model.save_pretrained(tmp_path)
        loaded = BltForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.vocab_size == 264
        assert_same(loaded(text).logits, out.logits)
