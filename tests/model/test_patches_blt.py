"""`get_patches` tells what a forward does, whatever form the text has; glyphs show every byte, and no control code."""

import json
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_hf import BltModel, BltPatches, BltTokenizer
from blt_hf.model.patching_blt import PatchingRule
from blt_hf.patches.data import BltPatchesList
from blt_hf.patches.display import PATCH_COLOURS, patches_html, split_glyphs
from helpers.models import make_model, tiny_config
from helpers.texts import encode


TEXTS = ["The quick brown fox, jumps!", "Zażółć gęślą jaźń\n速い狐 👩‍🚀", "a"]
RULES = {
    "global": {},
    "monotonic": {"monotonicity": True},
    "both": {"patching_threshold_add": 0.0},
    "longest": {"max_patch_length": 3},
    "newline": {"patching_newline_reset": True},
    "space": {"patching_mode": "space", "patch_in_forward": False},
    "static": {"patching_mode": "static", "patch_size": 4, "patch_in_forward": False},
    "byte": {"patching_mode": "byte", "patch_in_forward": False},
}


def check_against_forward(model, patches: BltPatches, ids: list[int]) -> None:
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_patches=True, use_cache=False)
    lengths = output.patch_lengths[0].tolist()
    assert patches.input_ids == ids
    assert sum(patches.patch_lengths) == len(ids) and 0 not in patches.patch_lengths
    assert [*patches.patch_lengths, 1] == lengths if patches.is_last_complete else lengths[-1] > 1
    assert sum(lengths) - 1 == sum(patches.patch_lengths)
    if output.entropies is None:
        assert patches.entropies is None and patches.limits == [None] * len(ids)
    else:
        torch.testing.assert_close(torch.tensor(patches.entropies), output.entropies[0])


@pytest.mark.parametrize("name", RULES)
def test_patches_are_those_of_the_forward(name):
    model = make_model(tiny_config(**RULES[name]))
    found = model.get_patches(TEXTS, batch_size=2)
    assert isinstance(found, BltPatchesList) and len(found) == len(TEXTS)
    for patches, text in zip(found, TEXTS):
        check_against_forward(model, patches, encode(text))
        assert patches.text == "<s>" + text
        assert b"".join(patch.bytes for patch in patches) == text.encode()
        assert patches.boundaries == [patch.start for patch in patches]
        if patches.rule.mode == "entropy" and patches.rule.max_patch_length is None:
            exceeds = [p for p in range(2, len(patches.input_ids)) if patches.entropies_before[p] > patches.limits[p]]
            explained = {*exceeds, 0, 1, 2} if name in ("monotonic", "both") else {*exceeds, 0, 1}
            assert set(patches.boundaries) <= explained
            if name in ("global", "newline"):
                assert set(patches.boundaries) == explained & set(range(len(patches.input_ids)))
        again = patches.recut()
        assert again == patches


def test_every_form_of_a_text(tiny_model):
    text = TEXTS[1]
    expected = tiny_model.get_patches(text)
    tokenizer = BltTokenizer()
    batch = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)  # on the left
    right = tokenizer(TEXTS[:2], return_tensors="pt", padding=True, padding_side="right")
    single = tokenizer(text)
    forms = {
        "bytes": tiny_model.get_patches(text.encode()),
        "ids": tiny_model.get_patches(encode(text)),
        "tensor": tiny_model.get_patches(torch.tensor(encode(text))),
        "encoding": tiny_model.get_patches(single),
        "keywords": tiny_model.get_patches(**batch)[1],
        "padded encoding": tiny_model.get_patches(batch)[1],
        "right padding": tiny_model.get_patches(**right)[1],
        "without a mask": tiny_model.get_patches(batch.input_ids)[1],
        "lists": tiny_model.get_patches([encode(TEXTS[0]), encode(text)])[1],
        "model without a head": BltModel.get_patches(tiny_model.model, text),
    }  # fmt: skip
    for name, found in forms.items():
        assert found.patch_lengths == expected.patch_lengths, name
        torch.testing.assert_close(torch.tensor(found.entropies), torch.tensor(expected.entropies)), name


def test_generated_text():
    model, tokenizer = make_model(), BltTokenizer()
    inputs = tokenizer(["ab", "some longer prompt"], return_tensors="pt", padding=True)
    model.generation_config.eos_token_id = None
    ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    ids = torch.cat([ids, torch.tensor([[2, 0, 0], [70, 71, 2]])], dim=1)  # the first row ended before
    found = model.get_patches(ids, inputs.attention_mask)
    pads = int((inputs.attention_mask[0] == 0).sum())
    for patches, row in zip(found, (ids[0, pads:-2], ids[1])):
        check_against_forward(model, patches, row.tolist())
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert [p.input_ids for p in model.get_patches(output)] == [
        p.input_ids for p in model.get_patches(output.sequences, inputs.attention_mask)
    ]


def test_a_model_in_training_mode_is_left_there(tiny_model):
    expected = tiny_model.get_patches(TEXTS[0])
    tiny_model.train()
    try:
        assert tiny_model.get_patches(TEXTS[0]) == expected
        assert tiny_model.training and not tiny_model.model.patcher.training
    finally:
        tiny_model.eval()


def test_entropy_model_alone(tiny_model):
    patcher, rule = tiny_model.model.patcher, PatchingRule.from_config(tiny_model.config)
    expected = tiny_model.get_patches(TEXTS[0])
    found = patcher.get_patches(TEXTS[0], rule=rule)
    assert found.patch_lengths == expected.patch_lengths and found.rule == rule
    assert patcher.get_patches(TEXTS[0]).rule == PatchingRule()


def test_another_rule_on_the_same_entropies(tiny_model):
    found = tiny_model.get_patches(TEXTS[1])
    for changes in (
        {"threshold": 4.9},
        {"monotonicity": True, "threshold": 0.01},
        {"mode": "space"},
        {"max_patch_length": 2},
    ):
        recut = found.recut(**changes)
        assert recut == tiny_model.get_patches(TEXTS[1], rule=recut.rule) or recut.rule.mode == "space"
        assert sum(recut.patch_lengths) == len(found.input_ids)
    assert found.recut(threshold=100.0).patch_lengths == [1, len(found.input_ids) - 1]
    assert found.recut(threshold=-1.0).num_patches == found.num_bytes
    with pytest.raises(ValueError, match="'thresholds'"):
        found.recut(thresholds=2.0)
    with pytest.raises(ValueError, match="got 'entropies'"):
        found.recut(mode="entropies")
    by_space = make_model(tiny_config(patching_mode="space", patch_in_forward=False)).get_patches("a b")
    with pytest.raises(ValueError, match="without"):
        by_space.recut(mode="entropy")


def test_counts_and_dictionary(tiny_model):
    found = tiny_model.get_patches("hé")
    assert (found.num_bytes, len(found)) == (3, len(found.patch_lengths))
    assert found.bytes_per_patch == 3 / found.num_patches and found[0].text == "<s>" and found[0].entropy is None
    assert found[-1] == list(found)[-1] and found[1:] == list(found)[1:]
    told = json.loads(json.dumps(found.to_dict()))
    assert told["text"] == "<s>hé" and told["entropies"] == found.entropies
    assert bytes.fromhex("".join(patch["bytes"] for patch in told["patches"])).decode() == "hé"
    assert [patch["start"] for patch in told["patches"]] == told["boundaries"] == found.boundaries
    cut = BltPatches(encode("hé"), [2, 1, 1], None, False, PatchingRule("byte"))
    assert cut.texts == ["<s>h", "\\xc3", "\\xa9"]
    assert tiny_model.get_patches([]) == [] and tiny_model.get_patches("").num_patches == 0
    assert tiny_model.get_patches("").bytes_per_patch == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either `inputs` or `input_ids`"),
        ((3.5,), "`inputs` must be a text"),
        (([[1, 999]],), "id 999"),
        (([["a"]],), "rows of ids"),
        (([[0, 0]],), "row without ids"),
        ((["a", "b"], [[1]]), "`attention_mask` has 1 rows"),
        ((["a"], [[1]]), "a text has no padding"),
        (([[1, 5]], [[1, 1, 1]]), "3 columns"),
    ],
)
def test_what_cannot_be_honoured(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.get_patches(*arguments)


def test_a_rule_that_the_model_cannot_apply():
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False))
    with pytest.raises(ValueError, match="no entropy model"):
        model.get_patches("a", rule=PatchingRule())
    with pytest.raises(ValueError, match="`batch_size`"):
        model.get_patches("a", batch_size=0)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("ab c", ["a", "b", " ", "c"]),
        ("e\u0301x", ["e\u0301", "x"]),
        ("\n\t\x1b\x7f", ["␊", "␉", "␛", "␡"]),
        ("\u202ea\u200b\x85\u00a0\ufeff", ["U+202E", "a", "U+200B", "U+0085", "U+00A0", "U+FEFF"]),
        ("👩‍🚀🇫🇷🇩🇪👍🏽", ["👩‍🚀", "🇫🇷", "🇩🇪", "👍🏽"]),
        ("नमस्ते한", ["न", "म", "स्", "ते", "한"]),
        ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"]),
        ("\u0301a", ["◌\u0301", "a"]),
        (" \u0301", [" ", "◌\u0301"]),
        (b"\xff\xc3a\xe2\x82", ["FF", "C3", "a", "E2", "82"]),
        (b"\xed\xa0\x80\xc0\xaf", ["ED", "A0", "80", "C0", "AF"]),
    ],
)
def test_glyphs(text, labels):
    data = text.encode() if isinstance(text, str) else text
    glyphs = split_glyphs(encode(data, bos=False))
    assert [glyph.label for glyph in glyphs] == labels
    assert glyphs[0].start == 0 and glyphs[-1].stop == len(data)


def test_glyphs_do_not_cross_boundaries():
    ids = encode("e\u0301é")
    assert [g.label for g in split_glyphs(ids, [2])] == ["<s>", "e", "◌\u0301", "é"]
    assert [g.label for g in split_glyphs(ids, [3, 5])] == ["<s>", "e", "CC", "81", "C3", "A9"]
    assert [g.label for g in split_glyphs([0, 1, 2, 3, 260])] == ["<boe>", "<s>", "</s>", "<bpe>", "<260>"]


@given(st.binary(max_size=60), st.sets(st.integers(0, 60)))
def test_glyphs_cover_every_byte_and_print_no_control_code(data, boundaries):
    ids = encode(data, bos=False)
    glyphs = split_glyphs(ids, boundaries)
    assert [p for glyph in glyphs for p in range(glyph.start, glyph.stop)] == list(range(len(ids)))
    assert not [g for g in glyphs if any(g.start < b < g.stop for b in boundaries)]
    shown = "".join(glyph.label for glyph in glyphs)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs", "Co", "Cn")]


def test_html_shows_patches_and_escapes(tiny_model):
    patches = tiny_model.get_patches('<b title="x">&\n速')
    shown = patches._repr_html_()
    assert shown.startswith("<style>") and patches.summary in shown
    assert "<b title=" not in shown and "&lt;" in shown and "&amp;" in shown and "速" in shown
    assert shown.count("<i>") == len(patches.input_ids)  # a bar for each byte
    assert shown.count('class="blt-g"') == len(split_glyphs(patches.input_ids))
    assert 'class="blt-break"' in shown
    for fill, _ in PATCH_COLOURS[: len(patches)]:
        assert fill in shown
    assert "//" not in shown.replace("</", "")  # nothing is loaded from elsewhere
    both = tiny_model.get_patches(["a", "b"])._repr_html_()
    assert both.count("<style>") == 1 and both.count('class="blt-patches"') == 2
    no_entropies = make_model(tiny_config(patching_mode="space", patch_in_forward=False)).get_patches("a b")
    assert "<i>" not in patches_html(no_entropies)
