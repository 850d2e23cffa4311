"""Checkpoints travel between transformers' in-tree class and ours, in both directions, with equal logits (law 2).

The in-tree class is called with `use_cache=False`, the only mode in which it runs, and with right padding, the only
side on which it is right. It splits no text at its documents and has no rule but entropy thresholds and single bytes.
"""

import json

import pytest
import torch
from transformers.models.blt import modeling_blt as in_tree
from transformers.models.blt.configuration_blt import BltConfig as InTreeConfig

from blt_hf import BltConfig, BltForCausalLM, BltModel, BltPatcher
from helpers.models import make_model, tiny_config
from helpers.texts import encode


# Local windows came into the in-tree class after 5.17; before, all its attention is full.
HAS_WINDOWS = "local_attention_window_len" in InTreeConfig().to_dict()
FULL = {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}}

CASES = {
    "like_1b": {},
    "like_7b": {"cross_attn_k": 4},
    "two_hash_functions": {"encoder_hash_byte_group_nb_functions": 2, "encoder_hash_byte_group_size": [2, 3, 9]},
    "encoder_layers": {"encoder_config": {"num_hidden_layers": 3}},
    "max_patch_length": {"max_patch_length": 3},
    "grouped_kv_heads": {
        "patcher_config": {"num_key_value_heads": 1},
        "encoder_config": {"num_key_value_heads": 1},
        "decoder_config": {"num_key_value_heads": 1},
        "global_config": {"num_key_value_heads": 2},
    },
    "bytes": {"patching_mode": "byte"},
    "bytes_max_patch_length": {"patching_mode": "byte", "max_patch_length": 4},
    "first_layer_decoder": {"decoder_config": {"cross_attn_all_layers": False, "num_hidden_layers": 3}},
    "other_rope_and_norms": {
        "encoder_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rms_norm_eps": 1e-2},
        "decoder_config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 999.0, "factor": 2.0}},
        "global_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 55.0}, "hidden_act": "gelu"},
        "patcher_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
    },
}
if HAS_WINDOWS:
    CASES["short_windows"] = {"local_attention_window_len": 3, "patcher_config": {"sliding_window": 4}}
    CASES["window_of_one"] = {"local_attention_window_len": 1, "patcher_config": {"sliding_window": 1}}

TEXT = "Some text, with 2 lines\nand words of many lengths; é速 naïve — café. "


def config_of(case: str) -> BltConfig:
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in CASES[case].items()}
    if not HAS_WINDOWS:
        values.update(local_attention_window_len=None)
        values["patcher_config"] = {**values.get("patcher_config", {}), **FULL["patcher_config"]}
    return tiny_config(**values)


@pytest.fixture(params=sorted(CASES))
def case(request) -> str:
    return request.param


def right_padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    return ids, mask


@torch.no_grad()
def in_tree_logits(model, row: list[int]) -> torch.Tensor:
    return model(torch.tensor([row]), use_cache=False).logits[0]


@torch.no_grad()
def our_logits(model, row: list[int]) -> torch.Tensor:
    return model(torch.tensor([row]), use_cache=False).logits[0]


def knows_last_byte(config) -> bool:
    """With `max_patch_length` the in-tree class is not causal: it does not count the next byte, so it does not know
    that a full patch ends at the last byte. Ours follows the reference, which counts it; the last position differs."""
    return config.max_patch_length is None or config.patching_mode == "byte"


def assert_same_logits(theirs, ours, config, row):
    expected, actual = in_tree_logits(theirs, row), our_logits(ours, row)
    if not knows_last_byte(config):
        expected, actual = expected[:-1], actual[:-1]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


ROWS = [encode(TEXT * 2), encode("速"), encode(""), encode("ab, cd"), [1, 2, 3, 0, 259, 4] + encode("after specials")]


def test_ours_loads_there(case, tmp_path):
    """Saved by us: no code of ours is needed, the tensors have their names, and the logits are equal."""
    ours = make_model(config_of(case), seed=1)
    ours.save_pretrained(tmp_path)
    theirs, info = in_tree.BltForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert list(theirs.state_dict()) and set(theirs.state_dict()) == set(ours.state_dict())
    for row in ROWS:
        assert_same_logits(theirs.eval(), ours, ours.config, row)


def test_theirs_loads_here(case, tmp_path):
    """Saved by the in-tree class, with its own random weights; then back again, sharded."""
    source = make_model(config_of(case), seed=2)
    source.save_pretrained(tmp_path / "source")
    theirs = in_tree.BltForCausalLM.from_pretrained(tmp_path / "source").eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours, info = BltForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert type(ours.config) is BltConfig
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert set(theirs.state_dict()) == set(ours.state_dict())
    for row in ROWS:
        assert_same_logits(theirs, ours.eval(), ours.config, row)
    ours.save_pretrained(tmp_path / "back", max_shard_size="40KB")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    back = in_tree.BltForCausalLM.from_pretrained(tmp_path / "back").eval()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    torch.testing.assert_close(in_tree_logits(back, ROWS[0]), in_tree_logits(theirs, ROWS[0]), atol=0, rtol=0)


def pair(case: str, tmp_path, model_class=BltForCausalLM):
    ours = make_model(config_of(case), model_class, seed=3)
    ours.save_pretrained(tmp_path)
    return ours, getattr(in_tree, model_class.__name__).from_pretrained(tmp_path).eval()


def test_texts_fill_several_patches():
    """Otherwise the cases above would not tell one rule from another."""
    for case in CASES:
        lengths = make_model(config_of(case), seed=1)(torch.tensor([ROWS[0]]), output_patches=True).patch_lengths[0]
        assert (lengths > 0).sum() > 20
        assert config_of(case).patching_mode == "byte" or (lengths > 1).sum() > 10


def test_right_padded_batch(case, tmp_path):
    ours, theirs = pair(case, tmp_path)
    rows = [ROWS[0], ROWS[3], ROWS[4]]
    ids, mask = right_padded(rows)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, use_cache=False).logits
        actual = ours(ids, attention_mask=mask, use_cache=False).logits
    for index, row in enumerate(rows):
        stop = len(row) if knows_last_byte(ours.config) or index > 0 else len(row) - 1
        torch.testing.assert_close(actual[index, :stop], expected[index, :stop], atol=1e-4, rtol=1e-4)


def test_base_model_and_entropies(tmp_path):
    ours, theirs = pair("like_1b", tmp_path / "base", BltModel)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        mine, other = ours(ids, output_patches=True), theirs(ids, use_cache=False)
        torch.testing.assert_close(mine.last_hidden_state, other.last_hidden_state, atol=1e-4, rtol=1e-4)
        entropies, lengths, logits = theirs.patcher(ids, patch_size=4, threshold=ours.config.patching_threshold)
        torch.testing.assert_close(mine.entropies, entropies, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.patcher(ids).logits, logits, atol=1e-4, rtol=1e-4)
    # The in-tree lengths leave out the next byte, and with it a patch that it begins.
    mine = mine.patch_lengths[0].tolist()
    mine[-1] -= 1
    assert lengths[0].tolist() == [length for length in mine if length]


def test_patcher_alone(tmp_path):
    patcher = make_model(config_of("like_1b").patcher_config, BltPatcher, seed=5)
    patcher.save_pretrained(tmp_path)
    theirs = in_tree.BltPatcher.from_pretrained(tmp_path).eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        torch.testing.assert_close(patcher(ids).logits, theirs(ids)[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["like_7b", "grouped_kv_heads"])
def test_gradients(rule, tmp_path):
    ours, theirs = pair(rule, tmp_path)
    ids, mask = right_padded([ROWS[0], ROWS[3]])
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for model in (ours.train(), theirs.train()):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert set(gradients) == set(expected) and gradients
    for name in expected:
        torch.testing.assert_close(
            gradients[name], expected[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_tied_embeddings(tmp_path):
    """The in-tree class ties the head to the byte embeddings when the config says so, and then stores one of them."""
    values = config_of("like_1b").to_dict()
    values.update(tie_word_embeddings=True, patching_threshold=4.0)
    torch.manual_seed(0)
    theirs = in_tree.BltForCausalLM(InTreeConfig.from_dict(values)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = BltForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_logits(theirs, ours.eval(), ours.config, ROWS[3])
    ours.save_pretrained(tmp_path / "ours")
    back = in_tree.BltForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(back, ours, ours.config, ROWS[3])


def test_weights_in_half_precision(tmp_path):
    """A bf16 checkpoint of one package has the same bits in the other."""
    ours = make_model(config_of("like_1b"), seed=4).to(torch.bfloat16)
    ours.save_pretrained(tmp_path)
    theirs = in_tree.BltForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight)


@pytest.mark.skipif(HAS_WINDOWS, reason="this transformers' in-tree class has windows; `short_windows` compares them")
def test_older_in_tree_classes_have_no_windows(tmp_path):
    """5.17's class attends to everything: equal to ours without windows, and unequal with them."""
    config = tiny_config(**FULL)
    ours = make_model(config, seed=1)
    ours.save_pretrained(tmp_path)
    theirs = in_tree.BltForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, config, ROWS[0])
    ours.config.local_attention_window_len = 4
    assert (our_logits(ours, ROWS[0]) - in_tree_logits(theirs, ROWS[0])).abs().max() > 0.1
