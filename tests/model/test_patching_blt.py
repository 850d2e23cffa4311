"""Patching rules against a plain-Python oracle, and the bookkeeping between ends, lengths and ids."""

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from blt_hf.model.patching_blt import (
    PatchingRule,
    RowLayout,
    entropy_from_logits,
    find_patch_ends,
    open_patch_bytes,
    patch_ends_from_lengths,
    patch_lengths_from_ends,
)
from blt_hf.patches.lengths import compute_patch_lengths
from blt_hf.rules import describe_rule
from helpers.texts import encode


# The oracle. It follows the text of FACTS and of the reference's README, with one `if` for each sentence.


def is_space_like(token_id: int) -> bool:
    byte = token_id - 4
    if ord("0") <= byte <= ord("9") or ord("A") <= byte <= ord("Z") or ord("a") <= byte <= ord("z"):
        return False
    return not 0x80 <= byte <= 0xBF


def is_special(token_id: int) -> bool:
    return token_id < 4 or token_id >= 260


def starts_patch(rule: PatchingRule, position: int, ids: list[int], entropies: list[float]) -> bool:
    """Whether `position` starts a patch, from what was known at `position - 1`; splitting long patches comes later."""
    if position in (0, 1):
        return True
    if rule.mode == "byte":
        return True
    if rule.mode == "static":  # the first patch has 1 byte
        return (position - 1) % rule.patch_size == 0
    last = position - 1
    if rule.mode == "space":
        if is_special(ids[last]):
            return True
        return is_space_like(ids[last]) and not (is_space_like(ids[last - 1]) or is_special(ids[last - 1]))
    if rule.monotonicity:
        return position == 2 or entropies[last] - entropies[last - 1] > rule.threshold
    if rule.threshold_add is not None:
        if position == 2:
            return True
        if position == 3:
            return False
        return entropies[last] - entropies[last - 1] > rule.threshold_add and entropies[last] > rule.threshold
    return entropies[last] > rule.threshold


def split(length: int, limit: int) -> list[int]:
    return [limit] * (length // limit) + [length % limit] * (length % limit > 0)


def oracle_patch_lengths(rule: PatchingRule, ids: list[int], entropies: list[float]) -> list[int]:
    """Lengths of the patches of one text, the next byte included."""
    lengths = []
    for position in range(len(ids) + 1):
        if starts_patch(rule, position, ids, entropies):
            lengths.append(0)
        lengths[-1] += 1
    if rule.max_patch_length is not None:
        lengths = sum((split(length, rule.max_patch_length) for length in lengths), [])
    return lengths


# Entropies on a grid: sums and differences are exact, and equality with a threshold happens.
nats = st.integers(0, 8).map(lambda n: n / 4)
token_ids = st.one_of(
    st.integers(0, 3), st.integers(260, 263), st.integers(4, 259), st.sampled_from([ord(c) + 4 for c in " ,aZ09\n"])
)
rows = st.lists(st.tuples(token_ids, nats), min_size=1, max_size=30)
limits = st.one_of(st.none(), st.integers(1, 6))
rules = st.one_of(
    st.builds(PatchingRule, threshold=nats, max_patch_length=limits),
    st.builds(
        PatchingRule,
        threshold=st.integers(-4, 4).map(lambda n: n / 4),
        monotonicity=st.just(True),
        max_patch_length=limits,
    ),
    st.builds(
        PatchingRule, threshold=nats, threshold_add=st.integers(-4, 4).map(lambda n: n / 4), max_patch_length=limits
    ),
    st.builds(PatchingRule, mode=st.just("space"), max_patch_length=limits),
    st.builds(PatchingRule, mode=st.just("static"), patch_size=st.integers(1, 7), max_patch_length=limits),
    st.builds(PatchingRule, mode=st.just("byte"), max_patch_length=limits),
)


def batch_of(texts: list[list[tuple[int, float]]], columns: list[list[int]], width: int):
    """Ids, entropies and mask `(B, width)`; byte `i` of text `b` stands in column `columns[b][i]`."""
    ids = torch.full((len(texts), width), ord("x") + 4)
    entropies = torch.full((len(texts), width), 99.0)  # what padding holds must not count
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, (text, places) in enumerate(zip(texts, columns)):
        for (token_id, entropy), place in zip(text, places):
            ids[row, place], entropies[row, place], mask[row, place] = token_id, entropy, 1
    return ids, entropies, mask


def trimmed(lengths: torch.Tensor) -> list[list[int]]:
    rows = [row.tolist() for row in lengths]
    for row in rows:
        count = sum(length > 0 for length in row)
        assert all(row[:count]) and not any(row[count:]), "zeros stand on the right alone"
    return [[length for length in row if length] for row in rows]


def expected_lengths(rule, texts) -> list[list[int]]:
    return [oracle_patch_lengths(rule, [i for i, _ in text], [e for _, e in text]) for text in texts]


@given(rule=rules, text=rows)
@example(rule=PatchingRule(threshold=1.0), text=[(1, 2.0)])
@example(rule=PatchingRule(threshold=0.0, threshold_add=0.0), text=[(1, 0.0), (5, 1.0), (6, 2.0), (7, 2.0)])
def test_one_text_against_the_oracle(rule, text):
    ids, entropies, _ = batch_of([text], [list(range(len(text)))], len(text))
    lengths = compute_patch_lengths(rule, ids, entropies)
    assert lengths.dtype == torch.int64
    assert trimmed(lengths) == expected_lengths(rule, [text])
    assert int(lengths.sum()) == len(text) + 1


@given(
    rule=rules,
    texts=st.lists(rows, min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    spare=st.integers(0, 3),
)
def test_padded_batches_against_the_oracle(rule, texts, side, spare):
    width = max(map(len, texts)) + spare
    columns = [list(range(width))[-len(t) :] if side == "left" else list(range(len(t))) for t in texts]
    ids, entropies, mask = batch_of(texts, columns, width)
    assert trimmed(compute_patch_lengths(rule, ids, entropies, mask)) == expected_lengths(rule, texts)


@given(rule=rules, texts=st.lists(rows, min_size=1, max_size=3), data=st.data())
def test_holes_against_the_oracle(rule, texts, data):
    width = max(map(len, texts)) + 6
    columns = [sorted(data.draw(st.permutations(range(width)), label="columns")[: len(text)]) for text in texts]
    ids, entropies, mask = batch_of(texts, columns, width)
    assert trimmed(compute_patch_lengths(rule, ids, entropies, mask)) == expected_lengths(rule, texts)


def test_a_row_without_text_has_no_patches():
    ids, entropies, mask = batch_of([[(1, 0.0), (9, 2.0)], []], [[0, 1], []], 2)
    assert compute_patch_lengths(PatchingRule(threshold=1.0), ids, entropies, mask).tolist() == [[1, 1, 1], [0, 0, 0]]


@given(rule=rules, text=rows)
def test_rules_are_incremental(rule, text):
    """Patches of a prefix are a prefix of the patches: nothing that is closed opens again."""
    ids, entropies, _ = batch_of([text], [list(range(len(text)))], len(text))
    whole = trimmed(compute_patch_lengths(rule, ids, entropies))[0]
    for cut in range(1, len(text) + 1):
        part = trimmed(compute_patch_lengths(rule, ids[:, :cut], entropies[:, :cut]))[0]
        assert part[:-1] == whole[: len(part) - 1]
        assert part[-1] <= whole[len(part) - 1]


@given(rule=rules, text=rows, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_ends_of_chunks_are_the_ends_of_the_text(rule, text, sizes):
    """`find_patch_ends` continues from the three facts that it takes about the bytes before."""
    ids, entropies, _ = batch_of([text], [list(range(len(text)))], len(text))
    expected = patch_ends_from_lengths(compute_patch_lengths(rule, ids, entropies), len(text))
    pieces, start, open_bytes = [], 0, torch.zeros(1, dtype=torch.int64)
    while start < len(text):
        stop = start + sizes[len(pieces) % len(sizes)]
        past = (ids[:, :start], entropies[:, :start]) if start else (torch.tensor([[77]]), torch.tensor([[99.0]]))
        positions = torch.arange(start, min(stop, len(text)))[None]
        pieces.append(
            find_patch_ends(rule, ids[:, start:stop], entropies[:, start:stop], positions, *past, open_bytes)
        )
        open_bytes = open_patch_bytes(pieces[-1], open_bytes)[:, -1]
        start = stop
    assert torch.equal(torch.cat(pieces, dim=1), expected)


@given(rule=rules, texts=st.lists(rows, min_size=2, max_size=3))
def test_positions_that_restart_begin_a_text(rule, texts):
    """Texts in one row are cut as each alone, but that a text's last patch is left to its successor."""
    ids = torch.tensor([[i for text in texts for i, _ in text]])
    entropies = torch.tensor([[e for text in texts for _, e in text]])
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    zero = torch.zeros(1, dtype=torch.int64)
    ends = find_patch_ends(rule, ids, entropies, positions, zero[:, None], zero.float()[:, None], zero)[0]
    start = 0
    for text, lengths in zip(texts, expected_lengths(rule, texts)):
        alone = patch_ends_from_lengths(torch.tensor([lengths]), len(text))[0]
        assert torch.equal(ends[start : start + len(text)], alone)
        start += len(text)


def test_space_patches_of_every_pair_of_ids():
    """The edges of each class of bytes, specials and ids that were added included."""
    pairs = [[1, first, second] for first in range(262) for second in range(262)]
    lengths = compute_patch_lengths(PatchingRule(mode="space"), torch.tensor(pairs))
    expected = [oracle_patch_lengths(PatchingRule(mode="space"), ids, []) for ids in pairs]
    assert trimmed(lengths) == expected


@pytest.mark.parametrize(
    "text, patches",
    [
        ("x" * 9, [b"\1", b"xxxxxxxxx?"]),
        ("ab cd", [b"\1", b"ab ", b"cd?"]),
        ("a, b", [b"\1", b"a,", b" b?"]),
        ("  ", [b"\1", b"  ?"]),  # specials count as space-like, so the first space ends nothing
        (",\xe9\u901f", [b"\1", b",\xc3\xa9\xe9", b"\x80\x9f?"]),  # bytes from 0xC0 on are space-like
    ],
)
def test_space_patches_by_eye(text, patches):
    """BOS, text, and `?` for the next byte."""
    ids = torch.tensor([encode(text)])
    assert trimmed(compute_patch_lengths(PatchingRule(mode="space"), ids))[0] == [len(patch) for patch in patches]


@given(bits=st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4))
def test_ends_to_lengths_and_back(bits):
    width = max(map(len, bits))
    ends = torch.zeros(len(bits), width, dtype=torch.bool)
    for row, values in enumerate(bits):
        ends[row, : len(values)] = torch.tensor([True, *values[1:]])  # byte 0 ends its patch
    num_bytes = torch.tensor([len(values) for values in bits])
    lengths = patch_lengths_from_ends(ends, num_bytes)
    assert lengths.sum(dim=1).tolist() == (num_bytes + 1).tolist()
    assert torch.equal(patch_ends_from_lengths(lengths, width), ends)
    assert torch.equal(patch_lengths_from_ends(patch_ends_from_lengths(lengths, width), num_bytes), lengths)


def test_lengths_that_sum_to_the_text_leave_the_last_patch_open():
    assert patch_ends_from_lengths(torch.tensor([[1, 2, 2]]), 5).tolist() == [[True, False, True, False, False]]
    assert patch_ends_from_lengths(torch.tensor([[1, 2, 2, 1]]), 5).tolist() == [[True, False, True, False, True]]
    assert patch_ends_from_lengths(torch.tensor([[1, 2, 2, 0]]), 5).tolist() == [[True, False, True, False, False]]


@given(
    mask=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_row_layout(mask):
    mask = torch.tensor(mask)
    layout = RowLayout.from_mask(mask)
    for shape in ((), (3,)):
        values = torch.randn(*mask.shape, *shape)
        packed = layout.pack(values)
        for row in range(mask.shape[0]):
            text = values[row][mask[row] == 1]
            assert torch.equal(packed[row, : len(text)], text)
            assert layout.num_bytes[row] == len(text)
        expected = torch.where((mask == 1).view(*mask.shape, *[1] * len(shape)), values, torch.zeros(()))
        assert torch.equal(layout.unpack(packed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entropy_is_in_nats_and_fp32(dtype):
    logits = torch.randn(3, 260).to(dtype)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    entropy = entropy_from_logits(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), expected, atol=2e-6, rtol=1e-6)
    assert entropy_from_logits(torch.zeros(4)).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert entropy_from_logits(torch.tensor([0.0, 1e4])).item() == 0.0


@pytest.mark.parametrize("mode, missing", [("space", "input_ids"), ("entropy", "entropies")])
def test_missing_tensors_are_named(mode, missing):
    tensors = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "entropies": torch.ones(1, 3)}
    del tensors[missing]
    with pytest.raises(ValueError, match=f"'{mode}' needs `{missing}`; got None"):
        compute_patch_lengths(PatchingRule(mode=mode), **tensors)
    with pytest.raises(ValueError, match="'byte' needs `input_ids`"):
        compute_patch_lengths(PatchingRule(mode="byte"))


def test_rule_from_config_reads_every_field():
    class Config:
        patching_mode, patching_threshold, patching_threshold_add, monotonicity = "static", 0.5, 0.25, True
        patch_size, max_patch_length = 5.0, 9

    rule = PatchingRule.from_config(Config)
    assert dataclasses.astuple(rule) == ("static", 0.5, 0.25, True, 5, 9)
    assert isinstance(rule.patch_size, int)


@pytest.mark.parametrize(
    "rule, words",
    [
        (PatchingRule(threshold=1.5), "where the entropy of the next byte is above the threshold 1.500 nats"),
        (
            PatchingRule(threshold=0.5, monotonicity=True),
            "where the entropy of the next byte rises by more than the threshold 0.500 nats",
        ),
        (
            PatchingRule(threshold=1.0, threshold_add=0.25, max_patch_length=9),
            "where the entropy of the next byte is above the threshold 1.000 nats and has risen by more than 0.250; "
            "none is longer than 9 bytes",
        ),
        (PatchingRule("static", patch_size=6), "every 6 bytes"),
        (PatchingRule("byte"), "at every byte"),
        (PatchingRule("space"), "after spaces and other bytes that are in no word"),
        (PatchingRule("vowels"), "by the rule `vowels`"),
    ],
)
def test_a_rule_in_words(rule, words):
    assert describe_rule(rule) == words
