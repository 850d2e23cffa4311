"""Linear attention against the dense masks that it replaces, and proof that no dense mask is ever made."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blt_hf import BltForCausalLM
from blt_hf.model.attention_blt import (
    AttentionSpan,
    SlotSpan,
    gathered_attention,
    segment_attention,
)
from helpers.models import make_model, tiny_config


SCALING = 0.35


def dense_attention(query, key, value, visible):
    """Masked softmax, queries that see nothing give 0. `(..., S, D)`, `(..., T, D)`, bool `(..., S, T)`."""
    scores = (query @ key.transpose(-1, -2) * SCALING).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    return weights @ value


def assert_same_gradients(actual, expected, inputs, atol=1e-5):
    """Equal values, and equal gradients of a random linear function of them."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((actual * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=10 * atol, rtol=1e-4)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


@given(data=st.data(), rows=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), latents=st.integers(1, 3))
def test_segment_attention_is_softmax_over_each_patch(data, rows, heads, latents):
    num_keys, num_patches = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 10))  # some patches read nothing
    segments = data.draw(
        st.lists(
            st.lists(st.integers(-1, num_patches - 1), min_size=num_keys, max_size=num_keys),
            min_size=rows,
            max_size=rows,
        )
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    segment = torch.tensor(segments)
    query, key, value = (
        leaf(rows, num_patches, latents, heads, 4),
        leaf(rows, num_keys, heads, 4),
        leaf(rows, num_keys, heads, 4),
    )
    actual = segment_attention(query, key, value, segment, SCALING)
    visible = segment[:, None, :] == torch.arange(num_patches)[:, None]  # (B, P, T)
    visible = visible[:, None, :, None].expand(-1, heads, -1, latents, -1).flatten(2, 3)
    expected = dense_attention(
        query.permute(0, 3, 1, 2, 4).flatten(2, 3), key.transpose(1, 2), value.transpose(1, 2), visible
    )
    expected = expected.unflatten(2, (num_patches, latents)).permute(0, 2, 3, 1, 4)
    assert_same_gradients(actual, expected, (query, key, value))
    reads_nothing = ~(segment[:, None, :] == torch.arange(num_patches)[:, None]).any(-1)
    assert (actual[reads_nothing] == 0).all()
    with torch.no_grad():  # few patches read under a mask then
        again = segment_attention(query, key, value, segment, SCALING)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    assert (again[reads_nothing] == 0).all()


@pytest.mark.parametrize("pooling", ["max", "min", "mean"])
@pytest.mark.parametrize("window", [None, 3])
def test_few_patches_are_made_alike_under_a_mask(pooling, window):
    """Without gradients, few patches pool and read their bytes under a mask; many, and those in training, do not."""
    config = tiny_config(encoder_config={"patch_pooling": pooling, "cross_attn_window": window})
    encoder = make_model(config).model.local_encoder
    states = [torch.randn(3, 20, config.encoder_config.hidden_size) for _ in encoder.cross_attn_layers]
    segment = torch.randint(-2, 7, (3, 20))
    segment[segment == 4] = 5  # which makes a patch without bytes
    made = encoder.make_latents(states, segment, 6)
    with torch.no_grad():
        torch.testing.assert_close(encoder.make_latents(states, segment, 6), made, atol=1e-5, rtol=1e-5)


def test_segment_attention_survives_large_scores():
    query = torch.full((1, 2, 1, 1, 2), 300.0)
    key = torch.tensor([300.0, -300.0, -300.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2).contiguous()
    value = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2).contiguous()
    output = segment_attention(query, key, value, torch.tensor([[0, 0, 1]]), 1.0)
    assert output[0, :, 0, 0].tolist() == [[1.0, 1.0], [3.0, 3.0]]


@given(
    data=st.data(),
    rows=st.integers(1, 3),
    latents=st.integers(1, 3),
    window=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
)
def test_gathered_attention_is_softmax_over_a_window_of_patches(data, rows, latents, window, heads):
    (num_heads, num_kv_heads), length, num_patches = heads, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    patch = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, num_patches - 1), min_size=length, max_size=length),
                min_size=rows,
                max_size=rows,
            )
        )
    )
    first = (patch - data.draw(st.integers(0, 5))).clamp_min(0)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query = leaf(rows, length, num_heads, 4)
    key, value = leaf(rows, num_patches, latents, num_kv_heads, 4), leaf(rows, num_patches, latents, num_kv_heads, 4)
    index = patch[..., None] - torch.arange(window)
    hidden = index < first[..., None] if window > 1 else None
    actual = gathered_attention(query, key, value, index.clamp_min(0), hidden, SCALING)
    patches = torch.arange(num_patches)
    visible = (patches <= patch[..., None]) & (patches > patch[..., None] - window)
    if window > 1:
        visible = visible & (patches >= first[..., None])
    visible = visible.repeat_interleave(latents, dim=-1)[:, None]
    wide_key, wide_value = (
        states.flatten(1, 2).transpose(1, 2).repeat_interleave(num_heads // num_kv_heads, dim=1)
        for states in (key, value)
    )
    expected = dense_attention(query.transpose(1, 2), wide_key, wide_value, visible).transpose(1, 2)
    assert_same_gradients(actual, expected, (query, key, value))


def module_with(groups: int):
    return types.SimpleNamespace(num_key_value_groups=groups, scaling=SCALING, training=False, is_causal=True)


def span_case(num_past, length, window, first_key, implementation, groups=1):
    """Attention through a span, and through a dense mask written down from its description."""
    rows, kv_heads, size = 2, 2, 4
    query = leaf(rows, kv_heads * groups, length, size)
    key, value = leaf(rows, kv_heads, num_past + length, size), leaf(rows, kv_heads, num_past + length, size)
    span = AttentionSpan(num_past, length, window, first_key, implementation)
    actual, _ = span.attend(module_with(groups), query, key, value)
    keys = torch.arange(num_past + length)
    own = (num_past + torch.arange(length)).expand(rows, -1)
    visible = keys <= own[..., None]
    if window is not None:
        visible = visible & (keys > own[..., None] - window)
    if first_key is not None:
        visible = visible & (keys >= first_key[..., None])
    expected = dense_attention(
        query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), visible[:, None]
    )
    assert_same_gradients(actual, expected.transpose(1, 2), (query, key, value))


implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@implementations
@pytest.mark.parametrize("window", [None, 1, 2, 5, 64, 70])
@pytest.mark.parametrize("length", [1, 2, 11, 63, 64, 65, 128, 141, 192])
def test_spans_equal_dense_masks(implementation, window, length):
    torch.manual_seed(0)
    for num_past in {0, 1, (window or 9) - 1}:
        span_case(num_past, length, window, None, implementation)


@given(
    data=st.data(),
    implementation=st.sampled_from(["eager", "sdpa"]),
    window=st.sampled_from([None, 1, 2, 5, 20]),
    length=st.sampled_from([1, 3, 40, 64, 65, 130]),
    groups=st.sampled_from([1, 2]),
)
def test_spans_with_a_first_key_equal_dense_masks(data, implementation, window, length, groups):
    num_past = data.draw(st.integers(0, 4 if window is None else window - 1), label="num_past")
    # A row that is shorter in the cache, and documents that begin somewhere.
    starts = [
        torch.tensor(
            sorted(data.draw(st.lists(st.integers(0, num_past + length - 1), min_size=length, max_size=length)))
        )
        for _ in range(2)
    ]
    own = num_past + torch.arange(length)
    first_key = torch.stack([torch.minimum(start, own) for start in starts])
    span_case(num_past, length, window, first_key, implementation, groups)


@given(
    data=st.data(),
    implementation=st.sampled_from(["eager", "sdpa", "flex_attention"]),
    window=st.sampled_from([None, 1, 2, 5]),
    length=st.sampled_from([1, 3]),
)
def test_keys_in_slots_equal_dense_masks(data, implementation, window, length):
    """A ring, rows that stand at different positions, some with slots not used yet, and documents that begin somewhere."""
    rows, size, num_slots = 2, 4, 9
    # What is older than the ring is seen by nobody: a row is no longer than it, or the window leaves room for the chunk.
    last = num_slots - 1 if window is None or window - 1 + length > num_slots else 30
    own = torch.tensor([data.draw(st.integers(0, last + 1 - length)) for _ in range(rows)])[:, None]
    own = own + torch.arange(length)
    newest = own[:, -1:]
    positions = newest - (newest - torch.arange(num_slots)) % num_slots
    start = None
    if data.draw(st.booleans()):
        start = torch.minimum(torch.tensor([[data.draw(st.integers(0, 4))] for _ in range(rows)]), own)
    query = leaf(rows, 2, length, size)
    key, value = leaf(rows, 2, num_slots, size), leaf(rows, 2, num_slots, size)
    span = SlotSpan(num_slots, own, window, start, implementation)
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(implementation != "flex_attention"):
        inputs = (
            (query, key, value) if implementation != "flex_attention" else (t.detach() for t in (query, key, value))
        )
        actual, _ = span.attend(module_with(1), *inputs)
    visible = (positions[:, None] <= own[..., None]) & (positions[:, None] >= 0)
    if window is not None:
        visible = visible & (positions[:, None] > own[..., None] - window)
    if start is not None:
        visible = visible & (positions[:, None] >= start[..., None])
    expected = dense_attention(query, key, value, visible[:, None]).transpose(1, 2)
    if implementation == "flex_attention":
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    else:
        assert_same_gradients(actual, expected, (query, key, value))


def test_long_pasts_are_cut_to_the_window():
    """A recording cache gives back more keys than the window needs."""
    torch.manual_seed(0)
    span_case(30, 64, 5, None, "sdpa")
    span_case(30, 64, 5, torch.arange(64).clamp_min(20).expand(2, -1), "sdpa")


@pytest.mark.parametrize(
    "num_past, length, window, has_mask",
    [(7, 1, None, False), (7, 1, 8, False), (7, 1, 7, True), (0, 9, None, False), (0, 9, 9, False), (0, 9, 8, True)],
)
def test_no_mask_where_none_is_needed(monkeypatch, num_past, length, window, has_mask):
    """One byte, or plain causality from the beginning: the kernel gets no mask and picks its fastest way."""
    masks = []

    def spy(query, key, value, attn_mask=None, *args, **kwargs):
        masks.append(attn_mask)
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    query, key = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, num_past + length, 2)
    AttentionSpan(num_past, length, window, None, "sdpa").attend(module_with(1), query, key, key)
    assert [mask is not None for mask in masks] == [has_mask]


def test_eager_weights_are_those_of_the_output():
    query, key, value = torch.randn(2, 4, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    output, weights = AttentionSpan(2, 3, None, None, "eager").attend(module_with(2), query, key, value)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
    assert (weights.masked_select(~mask) == 0).all()
    torch.testing.assert_close(output, (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2))


def test_a_registered_kernel_gets_a_mask_of_bools(monkeypatch):
    masks = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "users_own", kernel)
    states = torch.randn(1, 1, 3, 2)
    AttentionSpan(0, 3, 2, None, "users_own").attend(module_with(1), states, states, states)
    assert masks[0].tolist() == [[[[True, False, False], [True, True, False], [False, True, True]]]]


# The whole model.


def random_ids(num_bytes: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 260, (rows, num_bytes), generator=generator)
    ids[:, 0] = 1
    return ids


@pytest.mark.parametrize(
    "rule", [{}, {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}}]
)
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_implementations_agree_on_the_whole_model(rule, implementation):
    """Long and short inputs, padding, packed rows and cached chunks (flex_attention without its compiler)."""
    config = tiny_config(**rule)
    model = make_model(config)
    ids, mask = random_ids(90, rows=2), torch.ones(2, 90, dtype=torch.int64)
    mask[1, :30] = 0
    positions = torch.arange(90)[None] % 41

    def answers():
        first = model(ids[:, :50], use_cache=True)
        return [
            model(ids, attention_mask=mask).logits[mask == 1],
            model(ids, position_ids=positions).logits,
            torch.cat([first.logits, model(ids[:, 50:], past_key_values=first.past_key_values).logits], dim=1),
            model(ids[:, :7]).logits,
        ]

    model.set_attn_implementation("sdpa")
    expected = answers()
    model.set_attn_implementation(implementation)
    assert model.model.local_decoder.config._attn_implementation == implementation
    assert model.model.patcher.config._attn_implementation == implementation
    with torch.compiler.set_stance("force_eager"):
        actual = answers()
    for one, wanted in zip(actual, expected):
        torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)


def last_reached(model, ids, sizes: list[int], name: str) -> int:
    """The last byte whose values differ if byte 20 differs, in chunks of `sizes`."""
    other, found = ids.clone(), []
    other[0, 20] = 4 + ord("q")
    for row in (ids, other):
        values, cache, begin = [], None, 0
        for size in sizes:
            chunk = row[:, begin : begin + size]
            out = model(chunk, past_key_values=cache, use_cache=len(sizes) > 1, output_patches=name == "entropies")
            values.append(out[name][0].view(size, -1))
            cache, begin = out.past_key_values, begin + size
        assert begin == row.shape[1]
        found.append(torch.cat(values))
    return int(((found[0] - found[1]).abs().amax(1) > 1e-7).nonzero().max())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [[110], [15, 60, 35], [40] + [1] * 70], ids=["whole", "chunks", "bytes"])
@torch.no_grad()
def test_a_byte_is_seen_as_far_as_the_windows_reach(implementation, sizes):
    """Each layer sees `window - 1` bytes back, to the byte; a model without windows would see 20 from everywhere."""
    ids = random_ids(110)
    model = make_model(tiny_config())
    model.set_attn_implementation(implementation)
    assert last_reached(model, ids, sizes, "entropies") == 20 + 2 * (12 - 1)
    # Without a space all is one open patch, which no latents tell of; the hashes look 7 bytes back.
    model = make_model(tiny_config(patching_mode="space"))
    model.set_attn_implementation(implementation)
    letters = 4 + ord("a") + ids % 26
    letters[:, 0] = 1
    assert last_reached(model, letters, sizes, "logits") == 20 + (1 + 2) * (10 - 1) + 7
    model = make_model(tiny_config(patching_mode="space", local_attention_window_len=None))
    assert last_reached(model, letters, sizes, "logits") == 109


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation, in elements of storage, and what made it."""

    def __init__(self):
        super().__init__()
        self.size, self.made_by = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.size:
                self.size, self.made_by = leaf.numel(), (func, tuple(leaf.shape))
        return result


def largest_tensor(model, ids, **kwargs) -> LargestTensor:
    with LargestTensor() as largest:
        loss = model(ids, labels=ids, **kwargs).loss
        if model.training:
            loss.backward()
    return largest


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_no_tensor_grows_faster_than_the_text(implementation, training):
    """With short windows nothing has bytes x bytes or bytes x patches elements, forward or backward.

    The global transformer's own attention is over patches x patches, as it should be; patches of 32 bytes and a
    narrow model keep it, and everything that is linear, below the quadratic things that are looked for.
    """
    config = tiny_config(
        patching_mode="static", patch_size=32, local_attention_window_len=8, encoder_hash_byte_group_vocab=11
    )
    torch.manual_seed(0)
    model = BltForCausalLM._from_config(config, attn_implementation=implementation).train(training)
    sizes = {}
    for num_bytes in (1200, 2400):
        largest = largest_tensor(model, random_ids(num_bytes))
        sizes[num_bytes] = largest.size
        assert largest.size < num_bytes * num_bytes / 4, largest.made_by
    assert sizes[2400] <= 2.1 * sizes[1200], sizes


@pytest.mark.parametrize("packed", ["padded", "documents"])
def test_padding_and_documents_stay_linear(packed):
    config = tiny_config(patching_mode="static", patch_size=32, local_attention_window_len=8)
    torch.manual_seed(0)
    model = BltForCausalLM(config).train()
    sizes = {}
    for num_bytes in (1200, 2400):
        ids, kwargs = random_ids(num_bytes, rows=2), {}
        if packed == "padded":
            kwargs["attention_mask"] = torch.ones_like(ids)
            kwargs["attention_mask"][1, : num_bytes // 3] = 0
        else:
            kwargs["position_ids"] = (torch.arange(num_bytes) % 100)[None].expand(2, -1)
        sizes[num_bytes] = largest_tensor(model, ids, **kwargs).size
    assert sizes[2400] <= 2.1 * sizes[1200], sizes


def test_cross_attention_never_sees_bytes_times_patches():
    """One patch a byte is the worst case for a [bytes x patches] mask; only the global part may be quadratic."""
    config = tiny_config(patching_mode="byte", local_attention_window_len=8)
    torch.manual_seed(0)
    model = BltForCausalLM(config).train()
    sizes = {}
    for num_bytes in (600, 1200):
        ids = random_ids(num_bytes)
        sizes[num_bytes] = {}
        for name in ("local_encoder", "local_decoder"):
            part, largest = getattr(model.model, name), LargestTensor()
            forward = part.forward

            def measured(*args, forward=forward, largest=largest, **kwargs):
                with largest:
                    return forward(*args, **kwargs)

            part.forward = measured
            model(ids)
            part.forward = forward
            sizes[num_bytes][name] = largest.size
            assert largest.size < num_bytes * num_bytes / 4, largest.made_by
    for name, size in sizes[1200].items():
        assert size <= 2.1 * sizes[600][name], sizes


def test_decoding_does_not_grow_with_the_text():
    """The largest tensor of a step is the same after 100 and after 1000 bytes, but for the patches' keys."""
    config = tiny_config(patching_mode="static", patch_size=100, local_attention_window_len=8)
    torch.manual_seed(0)
    model = BltForCausalLM(config).eval()
    sizes = []
    with torch.no_grad():
        for num_bytes in (100, 1000):
            cache = model(random_ids(num_bytes), use_cache=True).past_key_values
            model(random_ids(2)[:, 1:], past_key_values=cache)  # buffers are made here
            with LargestTensor() as largest:
                model(random_ids(2)[:, 1:], past_key_values=cache)
            sizes.append(largest.size)
    assert sizes[1] <= 1.5 * sizes[0], sizes
