"""Input that cannot be honoured: each row of the table is a case, the error that it raises, and what the error says."""

import copy
import fnmatch
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.blt.configuration_blt import BltConfig as InTreeConfig

from blt_hf import (
    BltConfig,
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltPatcher,
)
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.model.cache_blt import BltCache
from blt_hf.model.checks_blt import has_free_values
from blt_hf.training.calibration import calibrate_threshold
from blt_hf.training.data import read_texts
from helpers.bad_inputs import WRONG_INPUTS
from helpers.models import make_model, tiny_config


IDS = torch.tensor([[1, 70, 80, 90, 100, 110], [1, 71, 81, 91, 101, 111]])
CLASSES = {"num_labels": 3}


@pytest.fixture(scope="module")
def models():
    """One of each class; the classifiers have three labels."""
    config = tiny_config(**CLASSES)
    lm = make_model(config)
    return {
        "lm": lm,
        "model": lm.model,
        "patcher": make_model(tiny_config().patcher_config, BltPatcher),
        "rows": BltForSequenceClassification(config).eval(),
        "bytes": BltForTokenClassification(config).eval(),
    }


def cache_of(**overrides) -> BltCache:
    """The cache of another model, which has read two rows of `IDS`."""
    return make_model(tiny_config(**overrides))(IDS, use_cache=True).past_key_values


def forward(kind="lm", ids=IDS, **arguments):
    return lambda models: models[kind](ids, **arguments)


def forwards(name, *cases, kinds=("lm", "patcher")):
    """The same bad argument for several models."""
    return {
        f"{name}: {case}, {kind}": (forward(kind, **arguments), words)
        for kind in kinds
        for case, arguments, words in cases
    }


INPUTS = {
    **forwards(
        "ids",
        ("a list", {"ids": [[1, 70, 80]]}, "`input_ids` must be a tensor, .*got list"),
        ("an array", {"ids": np.array([[1, 70, 80]])}, "`input_ids` must be a tensor, .*got ndarray"),
        ("a text", {"ids": "some text"}, "`input_ids` must be a tensor, .*got str.*return_tensors"),
        ("floats", {"ids": IDS.float()}, "`input_ids` must hold int64 or int32; got torch.float32"),
        ("bytes", {"ids": IDS.to(torch.uint8)}, "`input_ids` must hold int64 or int32; got torch.uint8"),
        ("booleans", {"ids": IDS > 70}, "`input_ids` must hold int64 or int32; got torch.bool"),
        ("one row without its dimension", {"ids": IDS[0]}, r"`input_ids` must be two-dimensional .*\(6,\)"),
        ("no rows", {"ids": IDS[:0]}, r"`input_ids` has no rows.*\(0, 6\)"),
        ("no columns", {"ids": IDS[:, :0]}, "`input_ids` has no columns"),
        ("above the vocabulary", {"ids": IDS + 200}, "`input_ids` holds 311; .*0 to 259"),
        ("negative", {"ids": IDS - 100}, "`input_ids` holds -99; .*0 to 259"),
        ("none", {"ids": None}, "`input_ids`.*`inputs_embeds`.* is needed; got n"),
        ("and embeddings of others", {"inputs_embeds": torch.zeros(2, 5, 16)}, "same bytes|got both"),
        kinds=("lm", "model", "patcher", "rows", "bytes"),
    ),
    **forwards(
        "embeddings",
        ("a list", {"ids": None, "inputs_embeds": [[0.0]]}, "`inputs_embeds` must be a tensor, .*got list"),
        ("integers", {"ids": None, "inputs_embeds": torch.zeros(2, 6, 16).long()}, "`inputs_embeds` must hold floats"),
        ("two dimensions", {"ids": None, "inputs_embeds": torch.zeros(2, 16)}, r"`inputs_embeds` must be of shape"),
        ("another width", {"ids": None, "inputs_embeds": torch.zeros(2, 6, 8)}, r"must be 16 wide; got shape \(2, 6, 8\)"),
    ),
    **forwards(
        "mask",
        ("zeros", {"attention_mask": torch.zeros(2, 6)}, "`attention_mask` leaves no text in any row"),
        ("zeros, cached", {"attention_mask": torch.zeros(2, 6), "use_cache": True}, "`attention_mask` leaves no text"),
        ("a list", {"attention_mask": [[1] * 6] * 2}, "`attention_mask` must be a tensor, .*got list"),
        ("four dimensions", {"attention_mask": torch.ones(2, 1, 6, 6)}, r"`attention_mask` has shape \(2, 1, 6, 6\)"),
        ("another length", {"attention_mask": torch.ones(2, 5)}, r"`attention_mask` has shape \(2, 5\)"),
    ),
    **forwards(
        "positions",
        ("a list", {"position_ids": [[0, 1, 2, 3, 4, 5]]}, "`position_ids` must be a tensor, .*got list"),
        ("descending", {"position_ids": torch.arange(5, -1, -1)[None]}, "goes from 5 to 4"),
        ("equal", {"position_ids": torch.full((1, 6), 3)}, "goes from 3 to 3"),
        ("a gap", {"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, "goes from 2 to 7.*begin anew at 0"),
        ("floats", {"position_ids": torch.arange(6.0)[None]}, "`position_ids` must hold int64 .*got torch.float32"),
        ("another length", {"position_ids": torch.arange(5)[None]}, r"`position_ids` has shape \(1, 5\)"),
    ),
    **forwards(
        "labels",
        ("a list", {"labels": IDS.tolist()}, "`labels` must be a tensor, .*got list"),
        ("floats", {"labels": IDS.float()}, "`labels` must hold int64; got torch.float32"),
        ("bytes", {"labels": IDS.to(torch.uint8)}, "`labels` must hold int64; got torch.uint8"),
        ("one a row", {"labels": IDS[:, 0]}, r"`labels` has shape \(2,\).*\(2, 6\)"),
        ("another length", {"labels": IDS[:, :4]}, r"`labels` has shape \(2, 4\).*\(2, 6\)"),
        ("too large", {"labels": IDS + 200}, r"`labels` holds 311; .*-100"),
        ("too small", {"labels": IDS - 100}, r"`labels` holds -99; .*-100"),
        ("for bytes without logits", {"labels": IDS, "logits_to_keep": 2}, r"`labels` has shape \(2, 6\).*\(2, 2\)"),
    ),
    **forwards(
        "labels",
        ("one a row", {"labels": torch.tensor([0, 1])}, r"`labels` has shape \(2,\).*\(2, 6\)"),
        ("too large", {"labels": torch.full((2, 6), 3)}, "`labels` holds 3; .*0 to 2"),
        ("floats", {"labels": torch.ones(2, 6)}, "`labels` must hold int64; got torch.float32"),
        kinds=("bytes",),
    ),
    **forwards(
        "labels",
        ("one a byte", {"labels": IDS}, r"`labels` has shape \(2, 6\).*\(2,\)"),
        ("too large", {"labels": torch.tensor([0, 3])}, "`labels` holds 3; .*0 to 2"),
        ("floats for classes", {"labels": torch.tensor([0.0, 1.0])}, r"multi_label.*floats of shape \(2, 3\)"),
        ("small integers", {"labels": torch.tensor([0, 1], dtype=torch.int8)}, "torch.int8.*int64 of shape"),
        ("a list", {"labels": [0, 1]}, "`labels` must be a tensor, .*got list"),
        kinds=("rows",),
    ),
    "cache: a list": (forward(past_key_values=[]), "`past_key_values` must be a BltCache .*got list"),
    "cache: of other rows": (
        lambda models: models["lm"](IDS[:1], past_key_values=models["lm"](IDS).past_key_values),
        "`past_key_values` holds 2 rows and the input has 1",
    ),
    "patches: floats": (forward(patch_lengths=torch.ones(2, 3)), "`patch_lengths` has shape .*torch.float32"),
    "patches: another sum": (forward(patch_lengths=torch.ones(2, 3).long()), "row 0 of `patch_lengths` is"),
    "generate: a list": (lambda models: models["lm"].generate([[1, 70]]), "`input_ids` must be a tensor, .*got list"),
    "generate: a text": (lambda models: models["lm"].generate("text"), "`input_ids` must be a tensor, .*got str"),
    "calibrate: one str": (lambda models: calibrate_threshold(models["lm"], "one text"), "`texts` must be .*got one str"),
    "calibrate: one bytes": (lambda models: calibrate_threshold(models["lm"], b"text"), "`texts` must be .*got one bytes"),
    "measure: one str": (lambda models: measure_bits_per_byte(models["lm"], "one text"), "`texts` must be .*got one str"),
    "read: one path": (lambda models: read_texts("docs"), "`paths` must be .*got one str: docs"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(INPUTS))
def test_bad_input_is_named(case, models):
    call, words = INPUTS[case]
    with pytest.raises(ValueError, match=words):
        call(models)


OTHER_MODELS = {
    "fewer layers": {"decoder_config": {"num_hidden_layers": 1}},
    "more layers": {"global_config": {"num_hidden_layers": 3}},
    "other heads": {"encoder_config": {"num_attention_heads": 4}},
    "grouped heads": {"decoder_config": {"num_key_value_heads": 1}},
    "another window": {"local_attention_window_len": 9},
    "another patcher": {"patcher_config": {"num_hidden_layers": 1}},
    "no patcher": {"patching_mode": "space"},
    "more latents": {"cross_attn_k": 1, "global_config": {"hidden_size": 16, "num_attention_heads": 2},
                     "decoder_config": {"hidden_size_global": 16}},
    "shorter hashes": {"encoder_hash_byte_group_size": [3, 4]},
}  # fmt: skip


@pytest.mark.parametrize("case", list(OTHER_MODELS))
def test_cache_of_another_model_is_refused(case, models):
    cache = cache_of(**OTHER_MODELS[case])
    with pytest.raises(ValueError, match="`past_key_values` was made by another model: .*differ"):
        models["lm"](IDS[:, -1:], past_key_values=cache)


def test_cache_of_an_entropy_model_is_refused(models):
    for owner, user in (("patcher", "lm"), ("lm", "patcher")):
        cache = models[owner](IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="`past_key_values` was made by another model: model type"):
            models[user](IDS[:, -1:], past_key_values=cache)


def test_cache_of_an_equal_model_is_taken(models):
    """The same configuration in another object, and a copy of a cache, are no other model."""
    twin = make_model(tiny_config(**CLASSES))
    with torch.no_grad():
        cache = copy.deepcopy(models["lm"](IDS, use_cache=True).past_key_values)
        expected = models["lm"](torch.cat([IDS, IDS[:, -1:]], dim=1)).logits[:, -1:]
        torch.testing.assert_close(twin(IDS[:, -1:], past_key_values=cache).logits, expected)


CONFIGS = {
    "threshold": (BltConfig, {"patching_threshold": float("nan")}, "`patching_threshold` must be a number .*got nan"),
    "rise": (BltConfig, {"patching_threshold_add": float("nan")}, "`patching_threshold_add` must be .*got nan"),
    "no vocabulary": (BltConfig, {"vocab_size": 0}, "`BltConfig.vocab_size` must be at least 260 .*got 0"),
    "small vocabulary": (BltConfig, {"vocab_size": 100}, "`BltConfig.vocab_size` must be at least 260 .*got 100"),
    "entropy model": (
        BltConfig, {"patcher_config": {"vocab_size": 256}}, "`BltPatcherConfig.vocab_size` must be .*got 256",
    ),
    "dropout": (BltConfig, {"global_config": {"dropout": 2.0}}, "`BltGlobalTransformerConfig.dropout` .*got 2.0"),
    "negative dropout": (BltConfig, {"encoder_config": {"dropout": -0.5}}, "`BltLocalEncoderConfig.dropout`"),
    "activation": (
        BltConfig, {"decoder_config": {"hidden_act": "foo"}}, "`BltLocalDecoderConfig.hidden_act` .*silu.*got 'foo'",
    ),
    "rotation": (
        BltConfig, {"global_config": {"rope_parameters": {"rope_type": "foo"}}}, "rope_type.*llama3.*got 'foo'",
    ),
    "older rotation": (BltConfig, {"encoder_config": {"rope_scaling": {"type": "foo"}}}, "rope_type.*got 'foo'"),
    "rotation at the top": (BltConfig, {"rope_parameters": {"rope_type": "foo"}}, "`BltConfig.rope_par.*got 'foo'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CONFIGS))
def test_bad_configuration_is_named(case):
    config_class, values, words = CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        config_class(**values)


@pytest.fixture
def warnings_of(monkeypatch):
    """What a call warns of; transformers keeps its loggers from pytest, and a warning once given is not repeated."""

    def collect(call) -> str:
        logger = logging.getLogger("blt_hf.unknown_fields")
        said = []
        monkeypatch.setattr(logger, "warning_once", lambda message, *_: said.append(message), raising=False)
        call()
        return "\n".join(said)

    return collect


UNKNOWN = {
    "a component": ({"encoder_config": {"hidden_sise": 100}}, r"`BltLocalEncoderConfig`.* `hidden_sise`.*`hidden_size`\?"),
    "nothing like it": ({"global_config": {"zzz": 1}}, "`BltGlobalTransformerConfig`.* `zzz`.*fields are .*hidden_size"),
    "the top": ({"patching_treshold": 2.0}, r"`BltConfig` has no field `patching_treshold`.*`patching_threshold`\?"),
    "of a component": ({"dropout": 0.1}, "`BltConfig` has no field `dropout`.*belongs into .*`global_config`"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(UNKNOWN))
def test_unknown_field_is_told(case, warnings_of):
    values, words = UNKNOWN[case]
    assert re.search(words, warnings_of(lambda: BltConfig(**values)))


def test_known_fields_are_not_told(warnings_of, tmp_path):
    """Files of both classes, what older releases wrote, and somebody's own field at the top."""

    def load():
        BltConfig(my_own_note="kept", torch_dtype="bfloat16", num_labels=3)
        for config in (BltConfig(), InTreeConfig(), tiny_config()):
            config.save_pretrained(tmp_path)
            BltConfig.from_pretrained(tmp_path)
            BltConfig(**config.to_dict())
        legacy = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default"}, "num_beams": 1, "torchscript": False}
        BltConfig(patcher_config={"norm_eps": 1e-5, **legacy}, decoder_config={"head_dim": 64, **legacy})

    assert warnings_of(load) == ""


def test_text_after_a_gap_in_the_mask(models):
    """Positions count text, so they rise by 1 across padding; restarts at 0 begin a text, as ever."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = models["lm"](IDS, attention_mask=mask).logits
        torch.testing.assert_close(models["lm"](IDS, attention_mask=mask, position_ids=positions).logits, plain)
        packed = models["lm"](IDS, position_ids=torch.tensor([[3, 4, 5, 0, 1, 2]])).logits
        torch.testing.assert_close(packed[:, 3:], models["lm"](IDS[:, 3:]).logits)


def test_values_are_left_alone_where_they_cost():
    """No look at values of another device, in a graph or in a trace: there it would wait, or break the graph."""
    assert has_free_values(IDS)
    assert not has_free_values(IDS.to("meta"))
    seen = []

    class Noting(torch.nn.Module):
        def forward(self, ids):
            seen.append(has_free_values(ids))
            return ids + 1

    note = Noting()
    torch.compile(note, backend="eager", fullgraph=True)(IDS)
    torch.jit.trace(note, IDS, check_trace=False)
    torch.export.export(note, (IDS,))
    with torch._subclasses.FakeTensorMode() as mode:
        note(mode.from_tensor(IDS))
    assert len(seen) >= 4 and not any(seen)


def test_one_more_label_than_the_vocabulary_was():
    """Ids are checked against the vocabulary as it is now."""
    model = make_model()
    model.resize_token_embeddings(261)
    ids = torch.tensor([[1, 260]])
    assert torch.isfinite(model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="holds 261; the vocabulary has ids from 0 to 260"):
        model(ids + 1)
    assert isinstance(model, BltForCausalLM)


# The rows of the table in docs/reliability.md, and the cases that hold each: names (with `*`) of the cases above, of the
# tokenizer's, or of whole tests.
ROWS = {
    "`input_ids` as a list, an array or a str": ["ids: a list*", "ids: an array*", "ids: a text*", "generate: *"],
    "`input_ids` of floats, uint8 or booleans": ["ids: floats*", "ids: bytes*", "ids: booleans*"],
    "`input_ids` of one dimension, without rows, without columns": ["ids: one row*", "ids: no rows*", "ids: no columns*"],
    "an id outside of the vocabulary": ["ids: above*", "ids: negative*"],
    "neither ids nor embeddings, or embeddings of other bytes than the ids": ["ids: none*", "ids: and embeddings*"],
    "`inputs_embeds` as a list, of integers, of another shape or width": ["embeddings: *"],
    "`attention_mask` of zeros alone": ["mask: zeros*"],
    "`attention_mask` as a list, of another shape or of four dimensions": [
        "mask: a list*", "mask: four dimensions*", "mask: another length*",
    ],
    "`position_ids` that descend, stay or jump": ["positions: descending*", "positions: equal*", "positions: a gap*"],
    "`position_ids` as a list, of floats, of another length": [
        "positions: a list*", "positions: floats*", "positions: another length*",
    ],
    "`labels` as a list, of another shape or type, or outside of the classes": ["labels: *"],
    "a cache of another model, of other rows, a list": [
        "another model: *", "cache: *", "test_cache_of_an_entropy_model_is_refused",
    ],
    "`patch_lengths` of another shape or type, or that do not sum to the text": ["patches: *"],
    "`patching_threshold` NaN, `vocab_size` below 260, `dropout` 2.0, an unknown `hidden_act` or `rope_type`": [
        "configuration: *",
    ],
    "an unknown field of the configuration or of a part of it": ["unknown field: *"],
    "`calibrate_threshold`, `measure_bits_per_byte`, `read_texts` with one str for a list": [
        "calibrate: *", "measure: *", "read: *",
    ],
    "a text that is a number or None": ["tokenizer, a text: *"],
    "pairs of unequal lengths, words that are one text": ["tokenizer, a pair: *", "tokenizer, words: *"],
    "offsets, words or pairs of bytes that are no UTF-8": ["test_only_ids_and_masks_of_what_is_no_text"],
    "`stride` that leaves no room, `max_length` below the special tokens": ["tokenizer, room: *"],
    "rows of different lengths with `return_tensors`, a padding that there is not": ["tokenizer, padding: *"],
    "an unknown argument of the tokenizer, or value of it": ["tokenizer, arguments: *"],
    "ids to decode that are none, a tokenizer of other bytes": ["test_wrong_ids_and_files_are_named"],
}  # fmt: skip


def test_the_table_of_the_docs_has_these_cases():
    """Each row of the page is tested, and each case that is tested is in a row."""
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    table = page.split("## Bad input")[1].split("## ")[0]
    rows = [line.strip("| ").split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "given" and rows[1:] == list(ROWS)
    cases = {
        *INPUTS,
        *(f"another model: {case}" for case in OTHER_MODELS),
        *(f"configuration: {case}" for case in CONFIGS),
        *(f"unknown field: {case}" for case in UNKNOWN),
        *(f"tokenizer, {case}" for case in WRONG_INPUTS),
    }
    files = Path(__file__).parents[1].rglob("test_*.py")
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    held = {pattern: set(fnmatch.filter(cases | tests, pattern)) for row in ROWS.values() for pattern in row}
    assert not [pattern for pattern, found in held.items() if not found]
    assert cases - set().union(*held.values()) == set()
