"""Arguments and outputs of the models, training, precision, and every refusal."""

import copy
import warnings

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
from blt_hf.model.embedding_blt import HASH_PRIMES, ngram_hashes
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config
from helpers.texts import encode


TEXT = "The quick brown fox, jumps over 13 lazy dogs!\nZażółć gęślą jaźń — naïve café über 速い狐."


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([encode(TEXT)])


@pytest.fixture
def padded():
    """Two texts of unequal length, left-padded with an id that is not the pad id."""
    rows = [encode(TEXT)[:50], encode("速い狐 and more, words")]
    ids, mask = torch.full((2, 50), 3), torch.zeros(2, 50, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 50 - len(row) :], mask[index, 50 - len(row) :] = torch.tensor(row), 1
    return rows, ids, mask


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(seed=7)


@pytest.fixture
def patcher() -> BltPatcher:
    return make_model(tiny_config().patcher_config, BltPatcher, seed=9)


def make_classifier(model_class, num_labels: int):
    """A classifier on the base of a language model whose threshold is known."""
    language_model = make_model(seed=7)
    config = copy.deepcopy(language_model.config)
    config.num_labels = num_labels
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.model.load_state_dict(language_model.model.state_dict())
    return model


def cross_entropy(logits, labels, reduction="mean"):
    """Shifted by hand."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


# Labels and logits.


@pytest.mark.parametrize("part", ["model", "patcher"])
@torch.no_grad()
def test_loss_is_shifted_cross_entropy(request, part, ids):
    model = request.getfixturevalue(part)
    labels = ids.clone()
    out = model(ids, labels=labels)
    assert out.loss.dim() == 0
    assert_same(out.loss, cross_entropy(out.logits, labels))
    labels[:, 5:40] = -100
    assert_same(model(ids, labels=labels).loss, cross_entropy(out.logits, labels))
    assert abs(float(model(ids, labels=labels).loss - out.loss)) > 1e-4
    total = cross_entropy(out.logits, labels, reduction="sum")
    assert_same(model(ids, labels=labels, num_items_in_batch=torch.tensor(1000)).loss, total / 1000)
    assert torch.equal(labels[:, :5], ids[:, :5]), "labels are not written to"


@pytest.mark.parametrize("part", ["model", "patcher"])
@torch.no_grad()
def test_logits_to_keep(request, part, ids):
    model = request.getfixturevalue(part)
    full = model(ids).logits
    assert full.shape == (*ids.shape, 260) and full.dtype == torch.float32
    assert_same(model(ids, logits_to_keep=1).logits, full[:, -1:])
    assert_same(model(ids, logits_to_keep=7).logits, full[:, -7:])
    assert_same(model(ids, logits_to_keep=10**6).logits, full)
    index = torch.tensor([3, 0, 9])
    assert_same(model(ids, logits_to_keep=index).logits, full[:, index])
    rows = ids[:, :40].repeat(2, 1)
    per_row = torch.tensor([[3, 4], [8, 1]])
    assert_same(
        model(rows, logits_to_keep=per_row).logits,
        full[:, :40].repeat(2, 1, 1).gather(1, per_row[..., None].expand(-1, -1, 260)),
    )


@torch.no_grad()
def test_return_dict_false_gives_tuples(model, ids):
    out = model(ids, labels=ids, return_dict=False, use_cache=True)
    assert isinstance(out, tuple) and len(out) == 3
    expected = model(ids, labels=ids)
    assert_same(out[0], expected.loss)
    assert_same(out[1], expected.logits)
    assert isinstance(model.model(ids, return_dict=False, use_cache=False), tuple)


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


# Hidden states, attentions, patches.


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


# Patches and embeddings that the caller gives.


@torch.no_grad()
def test_own_patch_lengths_change_nothing(model, padded):
    _, ids, mask = padded
    expected = model(ids, attention_mask=mask, output_patches=True)
    given = model(ids, attention_mask=mask, patch_lengths=expected.patch_lengths, output_patches=True, use_cache=False)
    assert_same(given.logits, expected.logits)
    assert torch.equal(given.patch_lengths, expected.patch_lengths)
    assert given.entropies is None
    cached = model(ids, attention_mask=mask, patch_lengths=expected.patch_lengths, use_cache=True)
    tail = ids[:, 20:40]
    full_cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert_same(
        model(tail, past_key_values=cached.past_key_values).logits, model(tail, past_key_values=full_cache).logits
    )


@torch.no_grad()
def test_other_patch_lengths_are_used(model, ids):
    num_bytes = ids.shape[1]
    by_fours = torch.tensor([[1] + [4] * 30])
    by_fours[0, -1] = 0
    while int(by_fours.sum()) > num_bytes + 1:
        by_fours[0, (by_fours[0] > 0).nonzero()[-1]] -= 1
    out = model(ids, patch_lengths=by_fours, output_patches=True)
    static = make_model(tiny_config(patching_mode="static", patch_size=4), seed=7)
    assert_same(out.logits, static(ids).logits)
    assert not torch.allclose(out.logits, model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_patch_lengths_without_the_next_byte_leave_the_patch_open(model, ids):
    num_bytes = 8
    open_end = model(ids[:, :num_bytes], patch_lengths=torch.tensor([[1, 3, 4]])).logits
    still_open = model(ids[:, :num_bytes], patch_lengths=torch.tensor([[1, 3, 5]])).logits
    closed = model(ids[:, :num_bytes], patch_lengths=torch.tensor([[1, 3, 4, 1]])).logits
    assert_same(open_end, still_open)
    assert_same(open_end[:, :-1], closed[:, :-1])
    assert not torch.allclose(open_end[:, -1], closed[:, -1], atol=1e-2)


@pytest.mark.parametrize(
    "lengths, words",
    [
        ([[1, 3]], ["row 0", "[1, 3]", "8 bytes", "sum"]),
        ([[1, 9]], ["row 0", "[1, 9]"]),
        ([[1, -1, 8]], ["row 0", "negative"]),
        ([[1, 0, 8]], ["row 0", "zeros on the right"]),
        ([[1.0, 8.0]], ["float"]),
        ([[4, 4]], ["row 0", "begin with a patch of 1 byte"]),
        ([[1, 7], [1, 7]], ["(2, 2)", "1 rows"]),
        ([1, 7], ["(2,)"]),
        ([[]], ["row"]),
    ],
)
def test_wrong_patch_lengths(model, ids, lengths, words):
    with pytest.raises(ValueError) as caught:
        model(ids[:, :8], patch_lengths=torch.tensor(lengths))
    assert "`patch_lengths`" in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_patch_lengths_after_a_cache_are_refused(model, ids):
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`patch_lengths` describe whole texts.*cache that holds bytes"):
        model(ids[:, 8:12], past_key_values=cache, patch_lengths=torch.tensor([[1, 3]]))


@torch.no_grad()
def byte_and_hash_embeddings(model, ids):
    config = model.config
    hashes = ngram_hashes(
        ids,
        None,
        torch.arange(ids.shape[1]).expand(ids.shape),
        config.encoder_hash_byte_group_size,
        config.encoder_hash_byte_group_nb_functions,
        config.encoder_hash_byte_group_vocab,
    )
    return model.get_input_embeddings()(ids) + model.model.encoder_hash_tok_embedding(hashes)


@pytest.mark.parametrize(
    "rule", [{"patching_mode": "byte"}, {"patching_mode": "static", "patch_size": 3}, {}, {"patching_mode": "space"}]
)
@torch.no_grad()
def test_inputs_embeds(rule, padded):
    """Sum of byte and hash embeddings; the rules that read bytes need patch lengths."""
    model = make_model(tiny_config(**rule))
    rows, ids, mask = padded
    embeds = torch.randn(2, 50, 16)
    for index, row in enumerate(rows):
        embeds[index, 50 - len(row) :] = byte_and_hash_embeddings(model, torch.tensor([row]))[0]
    expected = model(ids, attention_mask=mask, output_patches=True)
    if model.config.patching_mode in ("entropy", "space"):
        with pytest.raises(ValueError, match=f"`inputs_embeds`.*'{model.config.patching_mode}'.*`patch_lengths`"):
            model(inputs_embeds=embeds, attention_mask=mask)
        out = model(inputs_embeds=embeds, attention_mask=mask, patch_lengths=expected.patch_lengths)
    else:
        out = model(inputs_embeds=embeds, attention_mask=mask)
    assert_same(out.logits, expected.logits)


@pytest.mark.parametrize("rule", [{"patching_mode": "byte"}, {}], ids=["byte", "entropy"])
@torch.no_grad()
def test_ids_after_inputs_embeds(rule, ids):
    """Hashes and entropies of later bytes need the ids before them, which embeddings hide: right, or refused."""
    model = make_model(tiny_config(**rule))
    expected = model(ids, output_patches=True)
    lengths = None if rule else model(ids[:, :30], output_patches=True).patch_lengths
    first = model(inputs_embeds=byte_and_hash_embeddings(model, ids[:, :30]), patch_lengths=lengths, use_cache=True)
    assert_same(first.logits, expected.logits[:, :30])
    try:
        out = model(ids[:, 30:], past_key_values=first.past_key_values)
    except ValueError as error:
        assert "`inputs_embeds`" in str(error)
    else:
        assert_same(out.logits, expected.logits[:, 30:])


# Refusals.


@pytest.mark.parametrize("part", ["model", "patcher"])
def test_wrong_inputs_are_named(request, part, ids):
    model = request.getfixturevalue(part)
    embeds = torch.zeros(1, 5, 16)
    cases = [
        ({}, ["`input_ids`", "`inputs_embeds`", "neither"]),
        ({"input_ids": ids, "inputs_embeds": embeds}, ["`input_ids`", "`inputs_embeds`", "both"]),
        ({"input_ids": ids[0]}, ["`input_ids`", "two-dimensional", str(tuple(ids[0].shape))]),
        ({"input_ids": ids[:, :0]}, ["`input_ids`", "no columns"]),
        (
            {"input_ids": ids, "attention_mask": torch.ones(1, 1, 9, 9)},
            ["`attention_mask`", "(1, 1, 9, 9)", "two-dimensional"],
        ),
        (
            {"input_ids": ids, "attention_mask": torch.ones(1, 3)},
            ["`attention_mask`", "(1, 3)", f"{ids.shape[1]} columns"],
        ),
        ({"input_ids": ids, "attention_mask": torch.ones(2, ids.shape[1])}, ["`attention_mask`", "1 rows"]),
        ({"input_ids": ids, "position_ids": torch.zeros(1, 3)}, ["`position_ids`", "(1, 3)", str(ids.shape[1])]),
        ({"input_ids": ids, "position_ids": torch.zeros(3, *ids.shape)}, ["`position_ids`"]),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError) as caught:
            model(**arguments)
        assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_batch_without_text_is_refused(model, ids):
    with pytest.raises(ValueError, match="`attention_mask` leaves no text in any row"):
        model(ids, attention_mask=torch.zeros_like(ids), use_cache=False)


def test_packed_rows_with_wide_cross_attention_are_refused(ids):
    model = make_model(tiny_config(encoder_config={"cross_attn_window": 2}))
    with pytest.raises(ValueError, match="`position_ids` restart.*`cross_attn_window`"):
        model(ids, position_ids=(torch.arange(ids.shape[1]) % 20)[None])


def test_documents_in_inputs_embeds_are_refused(ids):
    model = make_model(tiny_config(mask_documents=True))
    with pytest.raises(ValueError, match="`input_ids`.*`inputs_embeds`.*`position_ids`"):
        model(inputs_embeds=torch.zeros(1, 8, 16), patch_lengths=torch.tensor([[1, 8]]))


# The entropy model inside a BLT.


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


# Precision and memory.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, ids):
    """Given the same patches, logits are close; entropies are fp32 sums over what the half-precision head says."""
    model = make_model(seed=7)
    expected = model(ids, output_patches=True)
    model.to(dtype)
    out = model(ids, patch_lengths=expected.patch_lengths)
    assert out.logits.dtype == torch.float32
    assert (out.logits - expected.logits).abs().mean() < (0.1 if dtype == torch.bfloat16 else 0.02)
    own = model(ids, output_patches=True)
    assert own.entropies.dtype == torch.float32
    assert (own.entropies - expected.entropies).abs().mean() < 0.05
    logits = model.model.patcher(ids).logits
    assert_same(own.entropies, torch.distributions.Categorical(logits=logits).entropy())
    first = model(ids[:, :30], use_cache=True)
    second = model(ids[:, 30:], past_key_values=first.past_key_values)
    assert first.past_key_values.log.entropies.values.dtype == torch.float32
    assert (torch.cat([first.logits, second.logits], dim=1) - own.logits).abs().mean() < 0.1
    text = model.generate(ids[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 32)


def test_half_precision_trains(ids):
    model = make_model().to(torch.bfloat16).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_autocast_is_close(ids):
    model = make_model(seed=7)
    expected = model(ids, output_patches=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, patch_lengths=expected.patch_lengths, labels=ids)
    assert (out.logits - expected.logits).abs().mean() < 0.1
    out.loss.backward()


def gradients_of(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", ["model", "patcher"])
def test_gradient_checkpointing_changes_nothing(part, use_reentrant, padded):
    _, ids, mask = padded
    config = tiny_config(encoder_config={"num_hidden_layers": 2, "cross_attn_all_layers": True})
    parts = {"model": (config, BltForCausalLM), "patcher": (config.patcher_config, BltPatcher)}
    model = make_model(*parts[part]).train()
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        calls = []
        layer = model.layers[0] if part == "patcher" else model.model.local_decoder.layers[0]
        hook = layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        hook.remove()
        results.append(
            (loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(calls))
        )
    (loss, gradients, once), (other_loss, other_gradients, twice) = results
    assert (once, twice) == (1, 2), "checkpointing did recompute"
    assert_same(other_loss, loss)
    assert set(gradients) == set(other_gradients)
    for name in gradients:
        assert_same(other_gradients[name], gradients[name])


def test_gradient_checkpointing_and_a_cache_exclude_each_other(ids):
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with (
        warnings.catch_warnings()
    ):  # transformers blames its own file for what we call, so the suite's filter is blind
        warnings.simplefilter("error", FutureWarning)
        assert model(ids, use_cache=True).past_key_values is None
    model.eval()
    assert model(ids, use_cache=True).past_key_values is not None


def test_training_makes_no_cache_unless_asked(ids):
    model = make_model().train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.eval()
    assert model(ids).past_key_values is not None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_dropout_acts_in_training_alone(ids):
    parts = {
        name: {"dropout": 0.3} for name in ("encoder_config", "decoder_config", "global_config", "patcher_config")
    }
    model = make_model(tiny_config(**parts))
    assert_same(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-2)
    entropies = [model(ids, output_patches=True).entropies for _ in range(2)]
    assert torch.equal(*entropies), "the entropy model never drops anything"


# The entropy model as a language model.


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


# Classifiers.


@pytest.fixture(scope="module")
def row_classifier():
    return make_classifier(BltForSequenceClassification, num_labels=3)


@torch.no_grad()
def test_sequence_classification_does_not_see_padding(row_classifier, padded):
    rows, left, left_mask = padded
    right, right_mask = torch.full_like(left, 3), torch.zeros_like(left_mask)
    for index, row in enumerate(rows):
        right[index, : len(row)], right_mask[index, : len(row)] = torch.tensor(row), 1
    alone = torch.cat([row_classifier(torch.tensor([row])).logits for row in rows])
    assert alone.shape == (2, 3)
    assert_same(row_classifier(left, attention_mask=left_mask).logits, alone)
    assert_same(row_classifier(right, attention_mask=right_mask).logits, alone)
    states = row_classifier.model(torch.tensor([rows[0]])).last_hidden_state
    assert_same(row_classifier.score(states[:, -1]), alone[:1])


@pytest.mark.parametrize(
    "num_labels, labels, problem, loss",
    [
        (3, torch.tensor([2, 0]), "single_label_classification", nn.functional.cross_entropy),
        (
            3,
            torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
            "multi_label_classification",
            nn.functional.binary_cross_entropy_with_logits,
        ),
        (
            1,
            torch.tensor([0.5, -1.0]),
            "regression",
            lambda logits, labels: nn.functional.mse_loss(logits.squeeze(-1), labels),
        ),
    ],
)
def test_sequence_classification_losses(padded, num_labels, labels, problem, loss):
    _, ids, mask = padded
    model = make_classifier(BltForSequenceClassification, num_labels)
    out = model(ids, attention_mask=mask, labels=labels)
    assert_same(out.loss, loss(out.logits, labels))
    assert model.config.problem_type == problem
    out.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_token_classification(padded):
    rows, ids, mask = padded
    model = make_classifier(BltForTokenClassification, num_labels=4)
    labels = (ids % 4).masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert out.logits.shape == (2, 50, 4) and model.score.bias is not None
    for index, row in enumerate(rows):
        assert_same(out.logits[index][mask[index] == 1], model(torch.tensor([row])).logits[0])
    assert_same(out.loss, nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    assert len(out.hidden_states) == 3


@torch.no_grad()
def test_classifiers_pass_arguments_on(row_classifier, ids):
    lengths = torch.tensor([[1] * (ids.shape[1] + 1)])
    assert not torch.allclose(row_classifier(ids, patch_lengths=lengths).logits, row_classifier(ids).logits, atol=1e-3)
    first = row_classifier(ids[:, :20], use_cache=True)
    second = row_classifier(ids[:, 20:], past_key_values=first.past_key_values)
    assert_same(second.logits, row_classifier(ids).logits)
    assert isinstance(row_classifier(ids, return_dict=False), tuple)


# Initialisation, saving, embeddings.


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


def test_gradient_accumulation_matches_one_batch(ids):
    """`num_items_in_batch` makes the sum over parts the loss of the whole."""
    model = make_model(seed=7)
    rows = torch.cat([ids[:, :40], ids[:, 20:60]])
    items = torch.tensor(2 * 39)
    _, whole = gradients_of(model, rows)
    parts = [gradients_of(model, row[None], num_items_in_batch=items)[1] for row in rows]
    for name in whole:
        assert_same(parts[0][name] + parts[1][name], whole[name])
