"""The language models: loss, logits, patches that the caller gives; and the classifiers."""

import copy

import pytest
import torch
from torch import nn

from blt_hf import BltForSequenceClassification, BltForTokenClassification
from helpers.checks import assert_same
from helpers.models import make_model, tiny_config


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


# Classifiers.


def make_classifier(model_class, num_labels: int):
    """A classifier on the base of a language model whose threshold is known."""
    language_model = make_model(seed=7)
    config = copy.deepcopy(language_model.config)
    config.num_labels = num_labels
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.model.load_state_dict(language_model.model.state_dict())
    return model


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
