"""Arguments of a forward that are refused, and what the errors say."""

import pytest
import torch

from helpers.models import make_model, tiny_config


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


@pytest.mark.parametrize("part", ["model", "patcher"])
def test_wrong_inputs_are_named(request, part, ids):
    model = request.getfixturevalue(part)
    embeds = torch.zeros(1, 5, 16)
    cases = [
        ({}, ["`input_ids`", "`inputs_embeds`", "none of them" if part == "model" else "neither"]),
        (
            {"input_ids": ids, "inputs_embeds": embeds},
            ["`input_ids`", "`inputs_embeds`", "the same bytes" if part == "model" else "both"],
        ),
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
        model(byte_embeds=torch.zeros(1, 8, 16), patch_lengths=torch.tensor([[1, 8]]))
