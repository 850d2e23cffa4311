"""The cache: what it keeps and for how long, what may be done to it, and that training through it is exact."""

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from blt_hf import BltForCausalLM
from blt_hf.model.cache_blt import BltCache, SlotIndex, Slots, SlotTensor
from helpers.checks import alone, assert_same
from helpers.models import DEVICE, make_model, model_for, rules, step_logits, tiny_config
from helpers.texts import TEXT, encode, text_ids, texts


WINDOW, PATCHER_WINDOW = 10, 12  # of `tiny_config`


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([encode(TEXT)])


def closed_patches(model, ids) -> list[int]:
    """Patches that each row has closed: all but the last one, which holds the next byte."""
    lengths = model(ids, output_patches=True, use_cache=False).patch_lengths
    return ((lengths > 0).sum(dim=1) - 1).tolist()


# Slots.


def test_slots_hold_the_last_entries_of_each_row():
    slots = Slots(None)
    slots.size = 4
    assert slots.held(torch.tensor([0, 3, 6])).tolist() == [[-4, -3, -2, -1], [0, 1, 2, -1], [4, 5, 2, 3]]
    assert slots.find(torch.tensor([[5], [2]])).tolist() == [[1], [6]]


@torch.no_grad()
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("window", [150, None])
def test_short_texts_read_the_slots_in_use(window, packs):
    """A small chunk leaves out slots that no byte has reached, until the rows are as long as there are slots."""
    model = make_model(tiny_config(local_attention_window_len=window, patcher_config={"sliding_window": 150}))
    ids = torch.tensor([encode(TEXT * 9)[start : start + 190] for start in range(3)])
    expected = model(ids, use_cache=False).logits
    cache = model(ids[:, :97], use_cache=True).past_key_values
    runner, start, seen = model.make_runner(cache, packs), 97, []
    for width in (1, 3, 8, 1, 16, 2, 8, 1, 16, 16, 1, 16, 3, 1):
        assert_same(runner.step(ids[:, start : start + width]), expected[:, start : start + width])
        if width == 8:
            cache.crop_rows([8, 3, 0])
            lengths = [8, 3, 0]
            again = torch.stack([row[start + 8 - n : start + 16 - n] for row, n in zip(ids, lengths)])
            logits = runner.step(again, lengths)
            assert_same(logits[0], expected[0, start : start + 8])
            assert_same(logits[1, :3], expected[1, start + 5 : start + 8])
        start += width
        seen.append(cache.local_slots.seen)
    assert 160 in seen and seen[-1] is None and cache.local_slots.size == 192 and start == 190


def test_slots_against_lists():
    """Small and large writes, rows cropped and selected, and slots that become more or fewer: each row's last entries."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    keep, slack = 5, 4
    slots, rows = Slots(keep), [[] for _ in range(3)]
    tensor = SlotTensor(slots)
    for step in range(400):
        counts = torch.tensor([len(row) for row in rows])
        width = draw(1, slack + 1)[0] if step % 3 else draw(1, 40)[0]
        numbers = draw(0, width + 1, len(rows))
        new = torch.randn(len(rows), width, 2, generator=generator)
        slots.reserve(max(map(len, rows)) + width, slack, counts if step else None)
        if width <= slack:
            slot_index = SlotIndex(index=slots.find(counts[:, None] + torch.arange(width)).flatten())
        else:
            slot_index = SlotIndex(source=slots.held(counts + torch.tensor(numbers)) - counts[:, None])
        tensor.write(new, slot_index)
        for row, values, number in zip(rows, new, numbers):
            row.extend(values[:number].tolist())
        counts = torch.tensor([len(row) for row in rows])
        if step % 7 == 3:
            index = draw(0, len(rows), 3)
            tensor.select_rows(torch.tensor(index))
            rows = [list(rows[i]) for i in index]
            counts = counts[index]
        if step % 50 == 20:
            slots.resize(slots.size + 32, counts)
        if step % 50 == 40:
            slots.resize(32, counts)
        held = slots.held(counts)
        for row, entries, values in zip(rows, held.tolist(), tensor.values):
            for entry, value in zip(entries, values.tolist()):
                if entry >= 0 and entry >= len(row) - keep:
                    torch.testing.assert_close(torch.tensor(value), torch.tensor(row[entry]))


@torch.no_grad()
def test_what_later_bytes_may_see_is_shown_and_no_more(model, ids):
    chunks = [ids[:, :3], ids[:, 3:9], ids[:, 9:60], *ids[:, 60:].split(1, dim=1)]
    cache, seen = None, 0
    for chunk in chunks:
        cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        seen += chunk.shape[1]
        for layers, window in ((cache.encoder, WINDOW), (cache.decoder, WINDOW), (cache.patcher, PATCHER_WINDOW)):
            for layer in layers:
                assert layer.keys.shape[-2] == layer.values.shape[-2] == min(seen, window - 1)
                assert layer.get_seq_length() == min(seen, window - 1)
        count = closed_patches(model, ids[:, :seen])[0]
        for layer in cache.global_transformer:
            assert layer.keys.shape[-2] == layer.get_seq_length() == count
        assert cache.num_bytes.tolist() == [seen] and cache.num_patches.tolist() == [count]
        last = ids[0, max(seen - 7, 0) : seen].tolist()
        assert cache.history.last_ids[0].tolist() == [0] * (7 - len(last)) + last
    assert len(cache.patcher) == len(cache.decoder) == 2 and len(cache.encoder) == 1


@torch.no_grad()
def test_keys_are_shown_in_order(model, ids):
    """Rows of different lengths end in the last column."""
    alone = [model(ids[:, :n], use_cache=True).past_key_values for n in (40, 33)]
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 33:] = 0
    cache = model(ids[:, :20].repeat(2, 1), use_cache=True).past_key_values
    for start, stop in ((20, 23), (23, 40)):
        model(ids[:, start:stop].repeat(2, 1), attention_mask=mask[:, start:stop], past_key_values=cache)
    for index in range(len(cache.layers)):
        for row in range(2):
            for name in ("keys", "values"):
                expected = getattr(alone[row].layers[index], name)[0]
                shown = getattr(cache.layers[index], name)[row]
                assert_same(shown[:, shown.shape[1] - expected.shape[1] :], expected)


@torch.no_grad()
def test_memory_of_the_byte_part_does_not_grow(model, ids):
    def storage(cache):
        slots = (cache.patcher_slots, cache.local_slots, cache.recent_slots, cache.latent_slots)
        return sum(tensor.values.nbytes for kind in slots for tensor in kind.tensors)

    cache, sizes = None, []
    for byte in ids.repeat(1, 8)[:, :700].split(1, dim=1):
        cache = model(byte, past_key_values=cache, use_cache=True).past_key_values
        sizes.append(storage(cache))
    assert max(sizes[400:]) <= max(sizes[150:300])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["entropy", "space", "all_layers", "full_windows"])
def test_memory_of_a_row_is_known(rule):
    model = model_for(rule)
    cache = model(torch.tensor([encode("ab, cd é速2\nab cd" * 20)] * 3), use_cache=True).past_key_values
    held = sum(tensor.values.nbytes for slots in cache.kinds for tensor in slots.tensors)
    memory = BltCache.memory(
        model.config, cache.row_bytes[0], cache.row_patches[0], max_open_bytes=cache.max_open_bytes
    )
    assert held == 3 * memory


def flops(call) -> int:
    """Of the matrix products that `call` makes."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU runs all rows, in shapes that it has seen")
@torch.no_grad()
def test_a_step_costs_the_same_in_any_text_and_more_for_each_patch_that_it_closes(model, ids):
    """Law 8; a row that closes no patch does not pay for one that does."""
    rows = torch.stack([ids[0, :40], ids[0, 30:70]])
    cache = model(rows[:, :10], use_cache=True).past_key_values
    costs = {0: set(), 1: set(), 2: set()}
    for step in range(10, 40):
        before = closed_patches(model, rows[:, :step])
        cost = flops(lambda step=step: model(rows[:, step : step + 1], past_key_values=cache))
        after = closed_patches(model, rows[:, : step + 1])
        costs[sum(one > other for one, other in zip(after, before))].add(cost)
    (none,), (one,), (two,) = costs.values()
    assert none < one < two and two - one == one - none
    assert cache.num_patches.tolist() == cache.row_patches == closed_patches(model, rows)
    assert len(set(cache.row_patches)) == 2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU runs every step whole, in shapes that it has seen")
@torch.no_grad()
def test_generation_costs_what_its_steps_cost(model, ids):
    """So the global transformer runs once a patch; its attention may be over more slots than a short text fills."""
    prompt = ids[:, :20]
    texts = []
    cost = flops(lambda: texts.append(model.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=None)))
    (text,) = texts

    def read_byte_by_byte():
        cache = model(prompt, use_cache=True).past_key_values
        for step in range(20, 69):  # the last byte is never read
            model(text[:, step : step + 1], past_key_values=cache)

    closed = closed_patches(model, text[:, :-1])[0] - closed_patches(model, prompt)[0]
    assert 2 <= closed < 45
    assert cost < 1.15 * flops(read_byte_by_byte)


@torch.no_grad()
def test_sequence_length_counts_columns_and_num_bytes_counts_text(model, ids):
    rows = ids[:, :12].repeat(2, 1)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == cache.get_seq_length(3) == 12
    assert cache.num_bytes.tolist() == cache.row_bytes == [12, 7]
    assert cache.get_mask_sizes(4, 0) == (16, 0)
    assert cache.batch_size == cache.max_batch_size == 2 and not cache.is_empty and cache.is_initialized
    empty = BltCache(model.config)
    assert empty.get_seq_length() == 0 and empty.is_empty and empty.batch_size == -1 and not empty.is_initialized
    assert not empty.is_compileable


@torch.no_grad()
def test_a_row_without_text_starts_later(model, ids):
    """A turn may leave a row out altogether, the first turn included."""
    rows = ids[:, :12].repeat(2, 1)
    mask = torch.stack([torch.ones(12), torch.zeros(12)])
    cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
    out = model(ids[:, :9].repeat(2, 1), past_key_values=cache)
    both = torch.cat([ids[:, :12], ids[:, :9]], dim=1)
    assert_same(out.logits[0], model(both).logits[0, 12:])
    assert_same(out.logits[1], model(ids[:, :9]).logits[0])


# What may be done to a cache.


@torch.no_grad()
def continues(model, cache, rows, tail) -> None:
    """Asserts that `tail` after the cache gives what it gives after `rows` without one."""
    out = model(tail.expand(len(rows), -1), past_key_values=cache)
    for index, row in enumerate(rows):
        full = model(torch.cat([row, tail[0]])[None], use_cache=False).logits[0, len(row) :]
        assert_same(out.logits[index], full)


@pytest.fixture
def rows_and_cache(model, ids):
    """Three texts of 14, 30 and 22 bytes, left-padded, and their cache."""
    rows = [ids[0, :14], ids[0, 20:50], ids[0, 60:82]]
    batch, mask = torch.zeros(3, 30, dtype=torch.int64), torch.zeros(3, 30, dtype=torch.int64)
    for index, row in enumerate(rows):
        batch[index, 30 - len(row) :], mask[index, 30 - len(row) :] = row, 1
    with torch.no_grad():
        cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
    return rows, cache


def test_reorder_select_repeat(model, ids, rows_and_cache):
    rows, cache = rows_and_cache
    tail = ids[:, 5:25]
    for method, argument, order in (
        ("reorder_cache", torch.tensor([2, 0, 1]), [2, 0, 1]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("reorder_cache", torch.tensor([1, 1, 1]), [1, 1, 1]),
    ):
        changed = copy.deepcopy(cache)
        getattr(changed, method)(argument)
        assert changed.batch_size == len(order)
        assert changed.num_bytes.tolist() == [len(rows[i]) for i in order]
        continues(model, changed, [rows[i] for i in order], tail)
    continues(model, cache, rows, tail)  # the copies were copies


def test_empty_caches_take_every_operation(model, ids):
    cache = BltCache(model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    cache.crop(0)
    cache.reset()
    cache = copy.deepcopy(cache)
    assert cache.is_empty
    continues(model, cache, [ids[0, :0]], ids[:, :15])


def test_reset_empties_everything(model, ids, rows_and_cache):
    _, cache = rows_and_cache
    cache.activate_past_recording()
    cache.reset()
    assert cache.is_empty and cache.get_seq_length() == 0 and cache.row_bytes == [] and not cache.record_past
    assert all(layer.get_seq_length() == 0 and layer.keys is None for layer in cache.layers)
    continues(model, cache, [ids[0, :0]], ids[:, :30])


@torch.no_grad()
def test_crop_takes_back_up_to_slack_bytes(model, ids):
    cache = BltCache(model.config, slack=8)
    model(ids[:, :20], past_key_values=cache)
    model(ids[:, 60:68], past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot go back 9 bytes.*activate_past_recording"):
        cache.crop(-9)
    with pytest.raises(ValueError, match="cannot remove 29 bytes from a cache that holds 28"):
        cache.crop(-29)
    cache.crop(-8)
    assert cache.get_seq_length() == 20
    with pytest.raises(RuntimeError, match="cannot go back 1 bytes"):
        cache.crop(-1)
    continues(model, cache, [ids[0, :20]], ids[:, 30:50])


@torch.no_grad()
def test_crop_after_recording(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 20:85], past_key_values=cache)
    cache.crop(-60)
    assert cache.get_seq_length() == 25 and int(cache.num_bytes) == 25
    continues(model, cache, [ids[0, :25]], ids[:, 50:70])


@torch.no_grad()
def test_room_for_what_was_recorded_is_given_back(model, ids):
    long = ids.repeat(1, 8)[:, :600]
    cache = BltCache(model.config)
    cache.activate_past_recording()
    model(long, past_key_values=cache)
    assert cache.local_slots.size >= 600
    cache.crop(-300)
    assert cache.local_slots.size < 200
    continues(model, cache, [long[0, :300]], ids[:, 50:70])


@torch.no_grad()
def test_crop_to_a_length_and_to_nothing(model, ids):
    cache = BltCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :30], past_key_values=cache)
    cache.crop(25)  # the older convention: a length
    assert cache.get_seq_length() == 25
    cache.crop(99)  # longer than it is: nothing to do
    assert cache.get_seq_length() == 25
    cache.crop(-25)
    assert cache.is_empty and cache.record_past
    continues(model, cache, [ids[0, :0]], ids[:, :15])


@torch.no_grad()
def test_crop_does_not_reach_into_padding(model, ids):
    """Columns are removed from every row; a row whose last columns were padding would lose other bytes."""
    rows, mask = ids[:, :20].repeat(2, 1), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    cache = BltCache(model.config)
    model(rows, attention_mask=mask, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot go back 2 bytes: only the last 0 columns"):
        cache.crop(-2)
    model(ids[:, 20:26].repeat(2, 1), past_key_values=cache)
    cache.crop(-4)
    continues(model, cache, [ids[0, :22], torch.cat([ids[0, :15], ids[0, 20:22]])], ids[:, 30:50])


@torch.no_grad()
def test_rows_are_cropped_by_numbers_of_their_own(model, ids, rows_and_cache):
    rows, cache = rows_and_cache
    drafts = ids[:, 40:49]
    for counts in ([9, 0, 4], [9, 9, 9]):
        model(drafts.repeat(3, 1), past_key_values=cache)
        cache.crop_rows(counts)
        rows = [torch.cat([row, drafts[0, : 9 - n]]) for row, n in zip(rows, counts)]
        assert cache.row_bytes == cache.num_bytes.tolist() == [len(row) for row in rows]
        assert cache.num_patches.tolist() == [closed_patches(model, row[None])[0] for row in rows]
    with pytest.raises(ValueError, match="takes back"):
        cache.crop_rows([1, 2])
    with pytest.raises(RuntimeError, match="cannot go back"):
        cache.crop_rows([0, 13, 0])
    continues(model, cache, rows, ids[:, 5:25])


@torch.no_grad()
def test_rows_leave_and_join_while_others_go_on(model, ids):
    """What a server does: rows end, others take their places, and their neighbours do not notice."""
    text = ids[0].tolist() * 3
    cache = BltCache(model.config)
    cache.start(3, ids.device)
    rows, at = [None] * 3, 0
    for step in range(60):
        for row in range(3):
            if rows[row] is None and step % 4 == row:
                prompt = text[at % 40 : at % 40 + 5 + 7 * (at % 4)]
                at += 13
                other = BltCache(model.config)
                for piece in torch.tensor([prompt]).split(6, dim=1):
                    model(piece, past_key_values=other)
                cache.write_rows([row], other)
                rows[row] = prompt
        if not any(rows):
            continue
        new = torch.tensor([[text[step + 5 * row]] for row in range(3)])
        logits = step_logits(model, new, cache, [int(row is not None) for row in rows])
        for row in range(3):
            if rows[row] is not None:
                rows[row] = [*rows[row], int(new[row])]
                assert_same(logits[row, 0], alone(model, rows[row])[-1])
        assert cache.row_bytes == cache.num_bytes.tolist() == [len(row or []) for row in rows]
        ended = step % 9
        if ended < 3 and rows[ended] is not None:
            cache.reset_rows([ended])
            rows[ended] = None
    assert at > 80


@given(
    rule=rules,
    rows=st.lists(texts, min_size=2, max_size=3),
    plan=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(1, 9)),
            st.tuples(st.just("crop"), st.lists(st.integers(0, 9), min_size=3, max_size=3), st.just(0)),
            st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3), st.just(0)),
            st.tuples(st.just("reset"), st.lists(st.integers(0, 2), min_size=1, max_size=1), st.just(0)),
            st.tuples(st.just("long"), st.lists(st.integers(0, 2), min_size=1, max_size=1), st.integers(20, 60)),
        ),
        max_size=8,
    ),
)
@example(  # a row without a byte, whose columns have no patch to read
    rule="wide_cross",
    rows=["2", "2"],
    plan=[("reset", [1], 0), ("read", [0, 0, 0], 2), ("read", [0, 1, 0], 1)],
)
@settings(max_examples=max(60, settings().max_examples))
@torch.no_grad()
def test_any_sequence_of_operations(rule, rows, plan):
    """After any of them, every row goes on as its text alone."""
    model, source = model_for(rule), (encode("ab, cd é速2\nab cd") * 8)[1:]
    rows = [text_ids(rule, row) for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for name, numbers, size in plan:
        if name == "read":
            lengths = [min(number, size) for number in numbers[: len(rows)]]
            new = torch.tensor([source[index * 3 : index * 3 + size] for index in range(len(rows))])
            if any(map(len, rows)):
                step_logits(model, new, cache, lengths)
                rows = [row + line[:n] for row, line, n in zip(rows, new.tolist(), lengths)]
        elif name == "crop":
            counts = [min(n, len(row)) for n, row in zip(numbers, rows)]
            try:
                cache.crop_rows(counts)
            except RuntimeError:  # more than the slack
                continue
            rows = [row[: len(row) - n] for row, n in zip(rows, counts)]
        elif name == "select":
            index = [n % len(rows) for n in numbers]
            cache.select_rows(torch.tensor(index))
            rows = [rows[n] for n in index]
        elif name == "reset":
            index = numbers[0] % len(rows)
            cache.reset_rows([index])
            rows[index] = []
        else:
            new = torch.tensor([source[index : index + size] for index in range(len(rows))])
            model(new, past_key_values=cache)
            rows = [row + line for row, line in zip(rows, new.tolist())]
    tail = torch.tensor([encode("xy z é\nq")[1:]] * len(rows))
    logits = model(tail, past_key_values=cache).logits
    for row, line, row_logits in zip(rows, tail.tolist(), logits):
        assert_same(row_logits, alone(model, row + line)[len(row) :])


@torch.no_grad()
def test_a_cache_may_be_reused_from_a_copy(model, ids):
    """A shared prompt: continuing one copy leaves the other alone, even though there is room to write in place."""
    cache = model(ids[:, :20], use_cache=True).past_key_values
    model(ids[:, 20:21], past_key_values=cache)
    other = copy.deepcopy(cache)
    model(ids[:, 40:60], past_key_values=cache)
    continues(model, other, [ids[0, :21]], ids[:, 60:80])


@torch.no_grad()
def test_reading_a_cache_changes_nothing(model, ids):
    """What a debugger does."""
    cache = model(ids[:, :20], use_cache=True).past_key_values
    for byte in ids[:, 20:40].split(1, dim=1):
        for name in dir(cache):
            getattr(cache, name)
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape
        repr(cache), vars(cache)
        model(byte, past_key_values=cache)
    continues(model, cache, [ids[0, :40]], ids[:, 40:60])


def test_caches_made_in_inference_mode_go_on_outside(model, ids):
    with torch.inference_mode():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model(ids[:, 20:23], past_key_values=cache)
    continues(model, cache, [ids[0, :23]], ids[:, 23:24])
    continues(model, cache, [ids[0, :24]], ids[:, 24:60])


# Caches that do not fit.


@pytest.mark.parametrize(
    "make",
    [lambda config: DynamicCache(), lambda config: (torch.zeros(1, 2, 3, 8),) * 2],
    ids=["DynamicCache", "tuple"],
)
def test_foreign_caches_are_refused(model, ids, make):
    cache = make(model.config)
    if isinstance(cache, DynamicCache):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match=f"`past_key_values` must be a BltCache.*got {type(cache).__name__}"):
        model(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_an_empty_dynamic_cache_is_filled_in_place(model, ids, make):
    cache, expected = make(model.config), model(ids[:1], use_cache=False).logits
    out = model(ids[:1, :-3], past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache and isinstance(cache, DynamicCache) and isinstance(cache, BltCache)
    assert cache.get_seq_length() == ids.shape[1] - 3
    for kept in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        assert isinstance(kept, DynamicCache)
        torch.testing.assert_close(model(ids[:1, -3:], past_key_values=kept).logits, expected[:, -3:])
    cache.crop(ids.shape[1] - 1)
    torch.testing.assert_close(model(ids[:1, -1:], past_key_values=cache).logits, expected[:, -1:])
    cache.reset()
    torch.testing.assert_close(model(ids[:1], past_key_values=cache).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 2}, {"self_speculation_window": 3}, {"prompt_lookup_num_tokens": 3}]
)
def test_generate_fills_a_dynamic_cache(model, ids, way):
    settings = {"do_sample": False, "eos_token_id": None, **way}
    expected = model.generate(ids[:, :20], max_new_tokens=12, **settings)
    cache = DynamicCache()
    first = model.generate(ids[:, :20], past_key_values=cache, max_new_tokens=6, **settings)
    assert cache.get_seq_length() == first.shape[1] - 1
    if "num_beams" not in way:
        second = model.generate(first, past_key_values=cache, max_new_tokens=6, **settings)
        assert second.tolist() == expected.tolist()


class OwnCache(DynamicCache):
    pass


@torch.no_grad()
def test_other_empty_caches_are_refused(model, ids):
    static = StaticCache(config=model.config.decoder_config, max_cache_len=4)
    for cache in (
        OwnCache(),
        static,
        # torch built for CUDA makes no stream, which such a cache begins with, where there is no GPU.
        *([DynamicCache(offloading=True)] if torch.version.cuda is None or torch.cuda.is_available() else []),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
    ):
        with pytest.raises(ValueError, match=f"`past_key_values` must be .*got {type(cache).__name__}"):
            model(ids[:, :20], past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_a_cache_of_another_copy_of_the_code_is_told_apart(model, ids):
    other = type("BltCache", (DynamicCache,), {"__module__": "transformers_modules.some.cache_blt"})()
    with pytest.raises(ValueError, match=r"BltCache of blt_hf.*got BltCache, of transformers_modules\.some"):
        model(ids, past_key_values=other)


@torch.no_grad()
def test_wrong_number_of_rows(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds 1 rows and the input has 2"):
        model(ids[:, 20:22].repeat(2, 1), past_key_values=cache)


@torch.no_grad()
def test_a_full_cache_without_use_cache_is_refused(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds bytes.*`use_cache=False`"):
        model(ids[:, 20:22], past_key_values=cache, use_cache=False)
    assert model(ids[:, :20], use_cache=False).past_key_values is None
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_a_forward_that_is_refused_leaves_the_cache_as_it_was(model, ids):
    """Checks come before anything is written."""
    cache = model(ids[:, :20], use_cache=True).past_key_values
    for wrong in (
        {"attention_mask": torch.ones(1, 7)},
        {"position_ids": torch.zeros(1, 9, dtype=torch.int64)},
        {"patch_lengths": torch.tensor([[1, 3]])},
    ):
        with pytest.raises(ValueError):
            model(ids[:, 20:23], past_key_values=cache, **wrong)
    continues(model, cache, [ids[0, :20]], ids[:, 20:50])


def test_patcher_cache_is_a_blt_cache(model, ids):
    patcher = model.model.patcher
    cache = BltCache(patcher.config)
    assert len(cache.layers) == 2 and not cache.encoder and not cache.global_transformer
    with torch.no_grad():
        assert patcher(ids, past_key_values=cache).past_key_values is cache
    assert cache.patcher[0].keys.shape[-2] == PATCHER_WINDOW - 1


# Training through a cache.


@pytest.mark.parametrize(
    "rule", [{}, {"patching_mode": "space"}, {"local_attention_window_len": None}], ids=["entropy", "space", "full"]
)
def test_gradients_through_chunks_are_those_of_the_whole(ids, rule):
    model = make_model(tiny_config(**rule), seed=5)
    weight = torch.randn(ids.shape[1], 260)

    def gradients(logits):
        model.zero_grad()
        (logits[0] * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model(ids, use_cache=False).logits)
    cache, logits = None, []
    for chunk in ids.split([17, 1, 1, 30, 2, 1, ids.shape[1] - 52], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    actual = gradients(torch.cat(logits, dim=1))
    assert set(actual) == set(expected) and not any("patcher" in name for name in actual)
    for name in expected:
        scale = expected[name].abs().max().clamp_min(1.0)
        torch.testing.assert_close(actual[name] / scale, expected[name] / scale, atol=2e-5, rtol=1e-4, msg=name)
