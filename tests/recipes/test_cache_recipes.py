"""Caches as people use them: kept, copied, cut, split, reordered, handed from call to call."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.recipes import (
    BOTH,
    CAUSAL,
    TEXTS,
    assert_other,
    assert_same,
    encode,
    make,
    on,
    tokenizer,
    write,
)


IDS = tokenizer(TEXTS[1], return_tensors="pt").input_ids
OTHER = tokenizer("another ending of it", add_special_tokens=False, return_tensors="pt").input_ids


@torch.no_grad()
def read(model, ids, cache=None, **kwargs):
    return model(ids, past_key_values=cache, use_cache=True, **kwargs)


@torch.no_grad()
def whole(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@on(*CAUSAL)
def test_one_prefix_is_read_once_for_two_endings(kind):
    """The cache of a system prompt is deep-copied for each question."""
    model = make(kind)
    prefix = read(model, IDS[:, :25]).past_key_values
    for ending in (IDS[:, 25:], OTHER):
        found = read(model, ending, copy.deepcopy(prefix)).logits
        assert_same(found, whole(model, torch.cat([IDS[:, :25], ending], dim=1))[:, 25:])
    assert prefix.get_seq_length() == 25


@on(*CAUSAL)
def test_a_prefix_is_spread_over_the_rows_of_a_batch(kind):
    """`batch_repeat_interleave`, then another text in each row."""
    model = make(kind)
    cache = read(model, IDS[:, :25]).past_key_values
    cache.batch_repeat_interleave(2)
    endings = torch.cat([IDS[:, 25:35], OTHER[:, :10]])
    found = read(model, endings, cache).logits
    for row, ending in enumerate(endings):
        expected = whole(model, torch.cat([IDS[:, :25], ending[None]], dim=1))
        assert_same(found[row], expected[0, 25:])


@on(*CAUSAL)
def test_rows_of_a_cache_are_split_off(kind):
    """`batch_select_indices`: the rows of a batch go on by themselves, in another order."""
    model, batch = make(kind), encode()
    cache = read(model, batch.input_ids, attention_mask=batch.attention_mask).past_key_values
    for row in (2, 0):
        one = copy.deepcopy(cache)
        one.batch_select_indices(torch.tensor([row]))
        mask = torch.cat([batch.attention_mask[row : row + 1], torch.ones(1, OTHER.shape[1], dtype=torch.long)], dim=1)
        found = read(model, OTHER, one, attention_mask=mask).logits
        alone = torch.cat([tokenizer(TEXTS[row], return_tensors="pt").input_ids, OTHER], dim=1)
        assert_same(found, whole(model, alone)[:, -OTHER.shape[1] :])


@on(*CAUSAL)
def test_reordered_rows_go_on_as_what_they_became(kind):
    model = make(kind)
    texts = torch.cat([IDS[:, :20], torch.cat([IDS[:, :1], OTHER[:, :19]], dim=1)])
    cache = read(model, texts).past_key_values
    cache.reorder_cache(torch.tensor([1, 1]))
    found = read(model, IDS[:, 20:30].expand(2, -1), cache).logits
    expected = whole(model, torch.cat([texts[1:], IDS[:, 20:30]], dim=1))[:, 20:]
    assert_same(found, expected.expand(2, -1, -1))


@on(*CAUSAL)
def test_bytes_that_were_cropped_never_were(kind):
    model = make(kind)
    cache = read(model, IDS[:, :30]).past_key_values
    cache.crop(-6)
    assert cache.get_seq_length() == 24
    found = read(model, OTHER, cache).logits
    expected = whole(model, torch.cat([IDS[:, :24], OTHER], dim=1))[:, 24:]
    assert_same(found, expected)
    assert_other(found[:, :6], whole(model, torch.cat([IDS[:, :30], OTHER], dim=1))[:, 30:36])


@on(*CAUSAL)
def test_a_reset_cache_is_a_new_one(kind):
    model = make(kind)
    # A DynamicCache keeps its length when it is reset, so the Llama has the cache that is made to be reset.
    cache = StaticCache(model.config, max_cache_len=64) if kind == "llama" else None
    cache = read(model, IDS[:, :30], cache).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(read(model, IDS, cache).logits, whole(model, IDS))


@on(*CAUSAL)
@pytest.mark.parametrize("sizes", [(1,) * 40, (7, 1, 1, 12, 3, 1), (39, 1), (2, 20, 20)])
def test_a_text_in_pieces_is_the_text(kind, sizes):
    model, cache, found, start = make(kind), None, [], 0
    for size in sizes:
        piece = IDS[:, start : start + size]
        output = read(model, piece, cache)
        found.append(output.logits)
        cache, start = output.past_key_values, start + piece.shape[1]
    assert_same(torch.cat(found, dim=1), whole(model, IDS)[:, :start])


@on(*CAUSAL)
def test_a_padded_batch_goes_on_under_its_grown_mask(kind):
    """The mask of the past and one more column a step, as loops written by hand keep it."""
    model, batch = make(kind), encode()
    mask, cache, ids = batch.attention_mask, None, batch.input_ids
    written = []
    for _ in range(8):
        output = read(model, ids, cache, attention_mask=mask)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        written.append(ids)
    written = torch.cat(written, dim=1)
    for row, text in enumerate(TEXTS):
        assert written[row].tolist() == write(make(kind), text, 8, eos_token_id=None)


@on(*CAUSAL)
def test_positions_that_are_given_beside_a_cache(kind):
    model = make(kind)
    cache = read(model, IDS[:, :25]).past_key_values
    found = read(model, IDS[:, 25:], cache, position_ids=torch.arange(25, IDS.shape[1])[None]).logits
    assert_same(found, whole(model, IDS)[:, 25:])


@on(*CAUSAL)
def test_kept_logits_after_a_cache_are_the_last_ones(kind):
    model = make(kind)
    cache = read(model, IDS[:, :25], logits_to_keep=1).past_key_values
    found = read(model, IDS[:, 25:], cache, logits_to_keep=3).logits
    assert_same(found, whole(model, IDS)[:, -3:])


@on(*CAUSAL)
def test_a_cache_comes_back_from_a_file(kind):
    """Pickled, as prompt caches are kept on disk, and by `torch.save`."""
    model = make(kind)
    cache = read(model, IDS[:, :25]).past_key_values
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for kept in (pickle.loads(pickle.dumps(cache)), torch.load(file, weights_only=False)):
        assert_same(read(model, IDS[:, 25:], kept).logits, whole(model, IDS)[:, 25:])


@on(*CAUSAL)
def test_an_empty_dynamic_cache_is_filled(kind):
    """Made by hand and handed to each call, never taken from an output: what many loops do."""
    model, cache = make(kind), DynamicCache()
    read(model, IDS[:, :25], cache)
    assert cache.get_seq_length() == 25
    assert_same(read(model, IDS[:, 25:], cache).logits, whole(model, IDS)[:, 25:])
    assert isinstance(cache, DynamicCache)


@on(*CAUSAL)
def test_a_filled_dynamic_cache_is_copied_and_cropped(kind):
    model, cache = make(kind), DynamicCache()
    read(model, IDS[:, :30], cache)
    twin = copy.deepcopy(cache)
    twin.crop(-5)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (25, 30)
    assert_same(read(model, IDS[:, 25:], twin).logits, whole(model, IDS)[:, 25:])
    assert_same(read(model, IDS[:, 30:], cache).logits, whole(model, IDS)[:, 30:])


@on(*CAUSAL)
def test_generate_fills_a_dynamic_cache(kind):
    """Given empty, it holds the text afterwards, and the next turn goes on from it."""
    model, cache = make(kind), DynamicCache()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    first = model.generate(IDS, past_key_values=cache, **settings)
    assert first[0, IDS.shape[1] :].tolist() == write(model, TEXTS[1], 8, eos_token_id=None)
    assert cache.get_seq_length() == first.shape[1] - 1
    longer = torch.cat([first, OTHER], dim=1)
    second = model.generate(longer, past_key_values=cache, **settings)
    assert torch.equal(second, model.generate(longer, use_cache=False, **settings))


@on(*CAUSAL)
def test_a_dynamic_cache_that_holds_another_models_keys(kind):
    """A Llama takes what it is given. A BLT finds patches in what it has read, and refuses by name."""
    model, cache = make(kind), DynamicCache()
    read(make("llama", seed=1), IDS[:, :25], cache)
    if kind == "llama":
        assert_other(read(model, IDS[:, 25:], cache).logits, whole(model, IDS)[:, 25:])
    else:
        with pytest.raises(ValueError, match="past_key_values"):
            read(model, IDS[:, 25:], cache)


@on(*CAUSAL)
def test_a_static_cache_that_was_made_by_hand(kind):
    model = make(kind)
    if kind == "llama":
        cache = StaticCache(model.config, max_cache_len=64)
        read(model, IDS[:, :25], cache)
        assert_same(read(model, IDS[:, 25:], cache).logits, whole(model, IDS)[:, 25:])
    else:
        cache = StaticCache(make("llama").config, max_cache_len=64)
        with pytest.raises(ValueError, match="past_key_values"):
            read(model, IDS[:, :25], cache)


@on(*CAUSAL)
def test_turns_of_a_talk_share_a_cache(kind):
    model = make(kind)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    text, cache = IDS[:, :25], None
    for turn in (OTHER, IDS[:, 3:11], OTHER[:, 5:]):
        output = model.generate(text, past_key_values=cache, **settings)
        alone = model.generate(text, use_cache=False, **settings)
        assert torch.equal(output.sequences, alone.sequences)
        text, cache = torch.cat([output.sequences, turn], dim=1), output.past_key_values


@on(*CAUSAL)
def test_a_cache_beside_use_cache_false(kind):
    """A Llama goes on from it; a BLT, which would have to write to it, refuses by name and leaves it as it was."""
    model = make(kind)
    cache = read(model, IDS[:, :25]).past_key_values
    if kind == "llama":
        with torch.no_grad():
            found = model(IDS[:, 25:], past_key_values=cache, use_cache=False).logits
        assert_same(found, whole(model, IDS)[:, 25:])
        return
    with pytest.raises(ValueError, match="past_key_values.*use_cache"):
        model(IDS[:, 25:], past_key_values=cache, use_cache=False)
    assert_same(read(model, IDS[:, 25:], cache).logits, whole(model, IDS)[:, 25:])


@on(*CAUSAL)
def test_gradients_flow_through_a_cache(kind):
    """The loss of the second half, with the first half in the cache, is that of the whole text's second half."""
    model = make(kind)

    def gradient(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 26:]).backward()
        return model.get_input_embeddings().weight.grad.clone()

    expected = gradient(model(IDS, use_cache=False).logits[:, 25:])
    cache = model(IDS[:, :25], use_cache=True).past_key_values
    found = gradient(model(IDS[:, 25:], past_key_values=cache, use_cache=True).logits)
    assert_same(found, expected)
    assert expected.abs().sum() > 0


@on(*BOTH)
def test_a_classifier_reads_the_rest_of_a_text_from_a_cache(kind):
    model = make(kind, "sequence", num_labels=3)
    with torch.no_grad():
        expected = model(IDS).logits
        cache = model(IDS[:, :25], use_cache=True).past_key_values
        assert_same(model(IDS[:, 25:], past_key_values=cache, use_cache=True).logits, expected)


@on(*CAUSAL)
def test_two_caches_take_turns_on_one_model(kind):
    """Nothing of a text lies on the model: two texts are read in turns."""
    model = make(kind)
    texts = (IDS, torch.cat([IDS[:, :1], OTHER], dim=1))
    caches, found = [None, None], [[], []]
    for start in range(0, 20, 4):
        for index, text in enumerate(texts):
            output = read(model, text[:, start : start + 4], caches[index])
            caches[index] = output.past_key_values
            found[index].append(output.logits)
    for index, text in enumerate(texts):
        assert_same(torch.cat(found[index], dim=1), whole(model, text[:, :20]))
