"""The cache: what it keeps and for how long, what may be done to it, and that training through it is exact."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from blt_hf import BltForCausalLM
from blt_hf.model.cache_blt import BltCache, RollingTensor
from conftest import make_model, tiny_config


TEXT = "The quick brown fox, jumps over 13 lazy dogs!\nZażółć gęślą jaźń — naïve café über 速い狐."
WINDOW, PATCHER_WINDOW = 10, 12  # of `tiny_config`


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[1] + [b + 4 for b in TEXT.encode()]])


def closed_patches(model, ids) -> list[int]:
    """Patches that each row has closed: all but the last one, which holds the next byte."""
    lengths = model(ids, output_patches=True, use_cache=False).patch_lengths
    return ((lengths > 0).sum(dim=1) - 1).tolist()


def log_ids(cache) -> torch.Tensor:
    return cache.log.last("input_id", len(cache.log))


@torch.no_grad()
def test_window_layers_stay_as_long_as_their_windows(model, ids):
    chunks = [ids[:, :3], ids[:, 3:9], ids[:, 9:60], *ids[:, 60:].split(1, dim=1)]
    cache, seen = None, 0
    for chunk in chunks:
        cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        seen += chunk.shape[1]
        for layer in (*cache.encoder, *cache.decoder):
            assert layer.keys.shape[-2] == layer.values.shape[-2] == min(seen, WINDOW - 1)
        for layer in cache.patcher:
            assert layer.keys.shape[-2] == min(seen, PATCHER_WINDOW - 1)
        assert len(cache.log) == min(seen, cache.num_hash_bytes) and cache.num_hash_bytes == 7
        assert log_ids(cache)[0].tolist() == ids[0, seen - len(cache.log) : seen].tolist()
        for tensor in cache.byte_states:
            assert len(tensor) == int(cache.log.last("open_bytes"))
        for pair in cache.latents:
            assert [len(tensor) for tensor in pair] == [1, 1]
    assert len(cache.patcher) == len(cache.decoder) == 2 and len(cache.encoder) == 1


@torch.no_grad()
def test_memory_of_the_byte_part_does_not_grow(model, ids):
    """Buffers too, not only the views on them."""

    def storage(cache):
        tensors = [t.values for t in cache._rolling_tensors()]
        tensors += [
            tensor
            for layer in (*cache.patcher, *cache.encoder, *cache.decoder)
            for tensor in (layer.keys, layer.values)
        ]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    cache, sizes = None, []
    for byte in ids.repeat(1, 8)[:, :700].split(1, dim=1):
        cache = model(byte, past_key_values=cache, use_cache=True).past_key_values
        sizes.append(storage(cache))
    assert max(sizes[400:]) <= max(sizes[150:300])


@torch.no_grad()
def test_global_layers_hold_the_closed_patches(model, ids):
    cache = None
    for cut in range(ids.shape[1]):
        cache = model(ids[:, cut : cut + 1], past_key_values=cache, use_cache=True).past_key_values
        count = closed_patches(model, ids[:, : cut + 1])[0]
        assert [layer.get_seq_length() for layer in cache.global_transformer] == [count] * 2
        assert int(cache.log.last("num_patches")) == count
        assert int(cache.num_bytes) == cache.get_seq_length() == cut + 1


class GlobalCalls:
    """What the global transformer's first layer is given: `(rows, patches)` a call."""

    def __init__(self, model):
        self.shapes = []
        layer = model.model.global_transformer.layers[0]
        self.hook = layer.register_forward_hook(
            lambda module, args, result: self.shapes.append(tuple(args[0].shape[:2]))
        )

    def __enter__(self):
        return self.shapes

    def __exit__(self, *exception):
        self.hook.remove()


@torch.no_grad()
def test_generation_runs_the_global_transformer_once_a_patch(model, ids):
    prompt = ids[:, :20]
    with GlobalCalls(model) as calls:
        text = model.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=None)
    seen = text[:, :-1]  # the last byte is never read
    assert calls[0] == (1, closed_patches(model, prompt)[0])
    assert calls[1:] == [(1, 1)] * (closed_patches(model, seen)[0] - closed_patches(model, prompt)[0])
    assert 2 <= len(calls) < 45


@torch.no_grad()
def test_only_rows_that_close_a_patch_are_run(model, ids):
    rows = torch.stack([ids[0, :40], ids[0, 30:70]])
    cache = model(rows[:, :10], use_cache=True).past_key_values
    for step in range(10, 40):
        before = closed_patches(model, rows[:, :step])
        with GlobalCalls(model) as calls:
            model(rows[:, step : step + 1], past_key_values=cache)
        closing = sum(after > count for after, count in zip(closed_patches(model, rows[:, : step + 1]), before))
        assert calls == ([(closing, 1)] if closing else [])
    assert sorted(set(cache.log.last("num_patches").tolist())) != [cache.global_transformer[0].length]


@torch.no_grad()
def test_sequence_length_counts_columns_and_num_bytes_counts_text(model, ids):
    rows = ids[:, :12].repeat(2, 1)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == cache.get_seq_length(3) == 12
    assert cache.num_bytes.tolist() == [12, 7]
    assert cache.get_mask_sizes(4, 0) == (16, 0)
    assert cache.batch_size == 2 and not cache.is_empty and cache.is_initialized
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
    torch.testing.assert_close(out.logits[0], model(both).logits[0, 12:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits[1], model(ids[:, :9]).logits[0], atol=1e-4, rtol=1e-4)


# What may be done to a cache.


@torch.no_grad()
def continues(model, cache, rows, tail) -> None:
    """Asserts that `tail` after the cache gives what it gives after `rows` without one."""
    out = model(tail.expand(len(rows), -1), past_key_values=cache)
    for index, row in enumerate(rows):
        full = model(torch.cat([row, tail[0]])[None], use_cache=False).logits[0, len(row) :]
        torch.testing.assert_close(out.logits[index], full, atol=1e-4, rtol=1e-4)


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
    assert cache.is_empty and cache.get_seq_length() == 0 and cache.min_bytes == 0 and not cache.record_past
    assert all(len(tensor) == 0 for tensor in cache._rolling_tensors())
    assert all(layer.get_seq_length() == 0 for layer in cache.layers)
    continues(model, cache, [ids[0, :0]], ids[:, :30])
    assert cache.encoder[0].keys.shape[-2] == WINDOW - 1  # nothing is recorded any more


@torch.no_grad()
def test_crop_after_recording(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 20:45], past_key_values=cache)
    assert cache.encoder[0].keys.shape[-2] == WINDOW - 1 + 25
    cache.crop(-7)
    assert cache.get_seq_length() == 38 and int(cache.num_bytes) == 38
    assert cache.encoder[0].keys.shape[-2] == WINDOW - 1, "what was kept to go back is forgotten"
    continues(model, cache, [ids[0, :38]], ids[:, 50:70])


@torch.no_grad()
def test_crop_of_nothing_ends_the_recording_of_the_past(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 20:45], past_key_values=cache)
    cache.crop(0)
    assert cache.get_seq_length() == 45
    assert cache.encoder[0].keys.shape[-2] == WINDOW - 1
    continues(model, cache, [ids[0, :45]], ids[:, 50:70])


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
def test_crop_that_cannot_be_done_says_so(model, ids):
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="cannot go back 3 bytes.*activate_past_recording"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="cannot remove 21 bytes from a cache that holds 20"):
        cache.crop(-21)
    assert cache.get_seq_length() == 20
    cache.activate_past_recording()
    model(ids[:, 20:25], past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot go back 18 bytes"):
        cache.crop(-18)
    cache.crop(-5)
    continues(model, cache, [ids[0, :20]], ids[:, 30:50])


@torch.no_grad()
def test_crop_does_not_reach_into_padding(model, ids):
    """Columns are removed from every row; a row whose last columns were padding would lose other bytes."""
    rows, mask = ids[:, :20].repeat(2, 1), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    cache = BltCache(model.config)
    cache.activate_past_recording()
    model(rows, attention_mask=mask, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot go back 2 bytes"):
        cache.crop(-2)
    model(ids[:, 20:26].repeat(2, 1), past_key_values=cache)
    cache.crop(-4)
    continues(model, cache, [ids[0, :22], torch.cat([ids[0, :15], ids[0, 20:22]])], ids[:, 30:50])


@torch.no_grad()
def test_a_cache_may_be_reused_from_a_copy(model, ids):
    """A shared prompt: continuing one copy leaves the other alone, even though buffers have room to write in place."""
    cache = model(ids[:, :20], use_cache=True).past_key_values
    model(ids[:, 20:21], past_key_values=cache)  # makes the buffers
    other = copy.deepcopy(cache)
    model(ids[:, 40:60], past_key_values=cache)
    continues(model, other, [ids[0, :21]], ids[:, 60:80])


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
def test_empty_foreign_caches_are_placeholders(model, ids):
    out = model(ids[:, :20], past_key_values=DynamicCache())
    assert type(out.past_key_values) is BltCache
    static = StaticCache(config=model.config.decoder_config, max_cache_len=4)
    assert type(model(ids[:, :20], past_key_values=static).past_key_values) is BltCache


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


def test_rolling_tensor_against_concatenation():
    """The one container under everything, against the obvious implementation."""
    generator = torch.Generator().manual_seed(0)
    for keep in (None, 0, 1, 4):
        rolling, plain = RollingTensor(), torch.zeros(2, 3, 0, 5)
        for step in range(300):
            new = torch.randn(2, 3, int(torch.randint(1, 9, (), generator=generator)), 5)
            plain = torch.cat(
                [plain if keep is None else plain[..., max(plain.shape[-2] - keep, 0) :, :], new], dim=-2
            )
            assert torch.equal(rolling.append(new, keep), plain)
            if step % 7 == 3:
                rolling.drop_last(2)
                plain = plain[..., : max(plain.shape[-2] - 2, 0), :]
            if step % 11 == 5:
                rolling.keep_last(6)
                plain = plain[..., max(plain.shape[-2] - 6, 0) :, :]
            if step % 13 == 7:
                index = torch.randint(0, 2, (2,), generator=generator)
                rolling.select_rows(index)
                plain = plain[index]
            if step % 97 == 60:
                rolling.clear()
                plain = torch.zeros(2, 3, 0, 5)
            assert len(rolling) == plain.shape[-2]
