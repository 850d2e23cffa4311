"""One answer: however a text reaches the model, its logits are the same (laws 1 and 2 of the design)."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.checks import alone, assert_same
from helpers.models import RULES, model_for, rules
from helpers.texts import encode, pad, text_ids, texts


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rules_make_patches_of_several_bytes(rule):
    """The tests below would prove little on patches of one byte, or on a single one."""
    row = text_ids(rule, "some text, with 2 lines\nand words of many lengths; é速 ab" * 2)
    lengths = model_for(rule)(torch.tensor([row]), output_patches=True).patch_lengths[0]
    assert lengths.sum() == len(row) + 1
    assert rule == "byte" or (lengths > 1).sum() >= 4
    assert (lengths > 0).sum() >= 8


@given(rule=rules, text=texts, cut=st.integers(0, 200))
@torch.no_grad()
def test_byte_by_byte_equals_full(rule, text, cut):
    model, row = model_for(rule), text_ids(rule, text)
    expected = alone(model, row)
    cut = cut % len(row)
    ids, cache, steps = torch.tensor([row]), None, []
    chunks = ([ids[:, :cut]] if cut else []) + list(ids[:, cut:].split(1, dim=1))
    for chunk in chunks:
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0])
    assert_same(torch.cat(steps), expected)
    assert cache.get_seq_length() == len(row)


@given(rule=rules, text=texts, sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4))
@torch.no_grad()
def test_chunks_equal_full(rule, text, sizes):
    model, row = model_for(rule), text_ids(rule, text)
    ids, cache, steps, start = torch.tensor([row]), None, [], 0
    while start < len(row):
        size = sizes[len(steps) % len(sizes)]
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        steps.append(out.logits[0])
    assert_same(torch.cat(steps), alone(model, row))


@given(rule=rules, rows=st.lists(texts, min_size=2, max_size=4), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_batches_equal_rows_alone(rule, rows, side):
    model, rows = model_for(rule), [text_ids(rule, row) for row in rows]
    ids, mask = pad(rows, side)
    ids = torch.where(mask == 1, ids, 3)  # some tokenizers pad with another id: only the mask may count
    out = model(ids, attention_mask=mask, use_cache=False, output_patches=True)
    for index, row in enumerate(rows):
        assert_same(out.logits[index][mask[index] == 1], alone(model, row))
        lengths = model(torch.tensor([row]), output_patches=True).patch_lengths[0]
        assert out.patch_lengths[index][: len(lengths)].tolist() == lengths.tolist()


@given(
    rule=rules,
    rows=st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=3),
    sides=st.tuples(*[st.sampled_from(["left", "right"])] * 2),
)
@torch.no_grad()
def test_padded_turns_then_bytes_equal_rows_alone(rule, rows, sides):
    """Two padded chunks and then one byte at a time: rows stand at different places on both clocks."""
    model = model_for(rule)
    turns = [[text_ids(rule, a), encode(b)[1:]] for a, b, _ in rows]
    tails = [(encode(c)[1:] * 20)[:20] for *_, c in rows]
    cache, seen, masks = None, [[] for _ in rows], []
    for turn, side in enumerate(sides):
        ids, mask = pad([row[turn] for row in turns], side)
        masks.append(mask)
        out = model(ids, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for index in range(len(rows)):
            seen[index].append(out.logits[index][mask[index] == 1])
    for step in range(20):
        ids = torch.tensor([[tail[step]] for tail in tails])
        out = model(ids, past_key_values=cache, use_cache=True)
        for index in range(len(rows)):
            seen[index].append(out.logits[index])
    for index, (a, b) in enumerate(turns):
        assert_same(torch.cat(seen[index]), alone(model, a + b + tails[index]))


PACKABLE = sorted(set(RULES) - {"wide_cross"})


@given(rule=st.sampled_from(PACKABLE), rows=st.lists(texts, min_size=2, max_size=4), cut=st.integers(0, 200))
@torch.no_grad()
def test_packed_texts_equal_texts_alone(rule, rows, cut):
    """`position_ids` that restart separate the texts of a row, also when the row comes in two chunks."""
    model, rows = model_for(rule), [text_ids(rule, row) for row in rows]
    ids = torch.tensor([sum(rows, [])])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    expected = torch.cat([alone(model, row) for row in rows])
    assert_same(model(ids, position_ids=positions, use_cache=False).logits[0], expected)
    cut = 1 + cut % (ids.shape[1] - 1)
    first = model(ids[:, :cut], position_ids=positions[:, :cut], use_cache=True)
    second = model(ids[:, cut:], position_ids=positions[:, cut:], past_key_values=first.past_key_values)
    assert_same(torch.cat([first.logits[0], second.logits[0]]), expected)


@given(rule=rules, text=texts, wrong=texts, keep=st.integers(0, 60), chunk=st.integers(1, 9))
@torch.no_grad()
def test_crop_leaves_no_trace(rule, text, wrong, keep, chunk):
    """Drafts that are cropped away are forgotten by both clocks."""
    model, row = model_for(rule), text_ids(rule, text)
    drafts = torch.tensor([encode(wrong)[1:]])
    cut = 1 + keep % len(row)
    ids = torch.tensor([row])
    out = model(ids[:, :cut], use_cache=True)
    cache = out.past_key_values
    cache.activate_past_recording()
    for _ in range(2):
        for piece in drafts.split(chunk, dim=1):
            model(piece, past_key_values=cache)
        cache.crop(-drafts.shape[1])
        assert cache.get_seq_length() == cut
    rest = [out.logits[0]]
    for piece in ids[:, cut:].split(1, dim=1) if cut < len(row) else ():
        rest.append(model(piece, past_key_values=cache).logits[0])
        model(drafts, past_key_values=cache)
        cache.crop(-drafts.shape[1])
    assert_same(torch.cat(rest), alone(model, row))


@given(
    rule=rules, rows=st.lists(texts, min_size=2, max_size=3), order=st.lists(st.integers(0, 2), min_size=1, max_size=5)
)
@torch.no_grad()
def test_rows_of_a_cache_can_be_reordered(rule, rows, order):
    model, rows = model_for(rule), [text_ids(rule, row) for row in rows]
    order = [index % len(rows) for index in order]
    ids, mask = pad(rows, "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor(order))
    tail = encode("xy z é\nq")[1:]
    out = [model(torch.tensor([[byte]] * len(order)), past_key_values=cache).logits for byte in tail]
    out = torch.cat(out, dim=1)
    for index, source in enumerate(order):
        assert_same(out[index], alone(model, rows[source] + tail)[-len(tail) :])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_causality(rule):
    """Logits up to a byte do not depend on what follows it."""
    model, row = model_for(rule), text_ids(rule, "ab cd, é速2\nabab cdcd  aé " * 2)
    with torch.no_grad():
        full = alone(model, row)
        for cut in range(1, len(row)):
            assert_same(full[:cut], alone(model, row[:cut]))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_greedy_text_is_the_same_with_and_without_a_cache(rule):
    model = model_for(rule)
    ids, mask = pad([text_ids(rule, "ab cd é"), text_ids(rule, "速"), text_ids(rule, "one two, three\n")], "left")
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **arguments)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
    assert torch.equal(cached, model.generate(ids, prefill_chunk_size=4, **arguments))
