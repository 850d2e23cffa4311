"""Configuration: the in-tree format in both directions, legacy files, validation, no field that nothing reads."""

import ast
import dataclasses
import json
import pathlib

import pytest
import transformers
from transformers import AutoConfig
from transformers.models.blt import configuration_blt as in_tree

import blt_hf
from blt_hf import (
    BltConfig,
    BltGlobalTransformerConfig,
    BltLocalDecoderConfig,
    BltLocalEncoderConfig,
    BltPatcherConfig,
)
from helpers.models import tiny_config


# Fields that the in-tree class of the newest transformers does not have.
CROSS_ATTENTION_FIELDS = {"num_cross_attention_heads", "num_cross_key_value_heads", "cross_attn_window"}
EXTRA_FIELDS = {
    BltConfig: {
        "monotonicity",
        "patching_threshold_add",
        "patching_newline_reset",
        "mask_documents",
        "diffusion_block_size",
        "diffusion_loss_weight",
    },
    BltPatcherConfig: {"use_cache", "mask_documents", "pad_token_id", "bos_token_id", "eos_token_id"},
    BltLocalEncoderConfig: {*CROSS_ATTENTION_FIELDS, "patch_pooling"},
    BltLocalDecoderConfig: {
        *CROSS_ATTENTION_FIELDS,
        "lexicon_size",
        "lexicon_top_k",
        "lexicon_length",
        "lexicon_reads",
    },
    BltGlobalTransformerConfig: set(),
}
# Fields that in-tree classes got after 5.17, and `head_dim`, which the in-tree encoder derives in its attention.
LATER_FIELDS = {"local_attention_window_len", "sliding_window", "head_dim"}
SUB_CONFIGS = {
    "patcher_config": BltPatcherConfig,
    "encoder_config": BltLocalEncoderConfig,
    "decoder_config": BltLocalDecoderConfig,
    "global_config": BltGlobalTransformerConfig,
}
config_classes = pytest.mark.parametrize("config_class", list(EXTRA_FIELDS), ids=lambda c: c.__name__)


def in_tree_class(config_class):
    return getattr(in_tree, config_class.__name__)


def field_defaults(config_class) -> dict:
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def without_extra(config: dict, config_class, in_tree_keys) -> dict:
    """What the in-tree class knows of a dict that ours wrote."""
    known = {}
    for name, value in config.items():
        if name in EXTRA_FIELDS[config_class] or (name in LATER_FIELDS and name not in in_tree_keys):
            continue
        if name in SUB_CONFIGS:
            value = without_extra(value, SUB_CONFIGS[name], in_tree_class(SUB_CONFIGS[name])().to_dict())
        known[name] = value
    return known


@config_classes
def test_every_in_tree_field_has_its_default(config_class):
    theirs, ours = field_defaults(in_tree_class(config_class)), field_defaults(config_class)
    assert {name: ours.get(name, "missing") for name in theirs} == theirs
    allowed = EXTRA_FIELDS[config_class] | LATER_FIELDS
    assert set(ours) - set(theirs) <= allowed
    assert config_class.model_type == in_tree_class(config_class).model_type


@config_classes
def test_default_dicts_are_equal(config_class):
    theirs = in_tree_class(config_class)().to_dict()
    assert without_extra(config_class().to_dict(), config_class, theirs) == theirs


@config_classes
def test_extra_fields_are_documented(config_class):
    for name in EXTRA_FIELDS[config_class] - {"pad_token_id", "bos_token_id", "eos_token_id"}:
        assert (
            f"`{name}`" in config_class.__doc__
            or f"{name}:" in config_class.__doc__
            or f"{name} (" in config_class.__doc__
        )


@pytest.mark.parametrize(
    "values", [{}, {"patching_mode": "byte", "max_patch_length": 3, "cross_attn_k": 4}], ids=["plain", "other"]
)
def test_files_travel_in_both_directions(tmp_path, values):
    ours = tiny_config(**values)
    ours.save_pretrained(tmp_path / "ours")
    theirs = in_tree.BltConfig.from_pretrained(tmp_path / "ours")
    as_theirs = theirs.to_dict()
    for name, value in without_extra(ours.to_dict(), BltConfig, in_tree.BltConfig().to_dict()).items():
        if name in SUB_CONFIGS:
            assert {key: as_theirs[name][key] for key in value} == value
        else:
            assert as_theirs[name] == value
    theirs.save_pretrained(tmp_path / "theirs")
    back = BltConfig.from_pretrained(tmp_path / "theirs")
    assert back.to_dict() == {**ours.to_dict(), "_name_or_path": back._name_or_path}


@config_classes
def test_dict_and_file_round_trips(tmp_path, config_class):
    config = config_class()
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_extra_fields_survive_a_round_trip(tmp_path):
    config = tiny_config(
        patching_threshold_add=0.5,
        patching_newline_reset=True,
        mask_documents=True,
        max_patch_length=7,
        local_attention_window_len=None,
        encoder_config={"cross_attn_window": 2, "patch_pooling": "mean", "num_cross_attention_heads": 4},
        decoder_config={"num_cross_key_value_heads": 1},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is BltConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert loaded.patcher_config.mask_documents and loaded.encoder_config.sliding_window is None


# `config.json` as released conversions have it (FACTS): old names, and keys of Meta's arguments.
LEGACY_FILE = {
    "model_type": "blt",
    "architectures": ["BltForCausalLM"],
    "vocab_size": 260,
    "patch_in_forward": True,
    "patching_mode": "entropy",
    "patching_threshold": 1.335442066192627,
    "patching_threshold_add": None,
    "monotonicity": False,
    "patching_batch_size": 1,
    "patching_device": "cuda",
    "patching_model_device": "cuda",
    "patch_size": 4.5,
    "pm_size": 0,
    "realtime_patching": True,
    "attn_impl": "sdpa",
    "attn_bias_type": "causal",
    "device": "cuda",
    "max_patch_length": None,
    "cross_attn_k": 2,
    "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
    "encoder_hash_byte_group_vocab": 500002,
    "encoder_hash_byte_group_nb_functions": 1,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "default"},
    "tie_word_embeddings": False,
    "patcher_config": {
        "model_type": "blt_patcher",
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "norm_eps": 2e-5,
        "rope_theta": 11111.0,
        "rope_scaling": {"rope_type": "default"},
        "attn_impl": "sdpa",
        "attn_bias_type": "local_block_causal",
    },
    "encoder_config": {
        "model_type": "blt_local_encoder",
        "norm_eps": 3e-5,
        "rope_theta": 22222.0,
        "rope_scaling": {"rope_type": "default"},
        "intermediate_size": 2816,
    },
    "decoder_config": {
        "model_type": "blt_local_decoder",
        "norm_eps": 4e-5,
        "rope_theta": 33333.0,
        "rope_scaling": {"rope_type": "default"},
    },
    "global_config": {
        "model_type": "blt_global_transformer",
        "norm_eps": 5e-5,
        "rope_theta": 44444.0,
        "rope_scaling": {"rope_type": "default"},
    },
}


def test_legacy_keys_of_real_files_load(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LEGACY_FILE))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is BltConfig
    epsilons = {name: getattr(config, name).rms_norm_eps for name in SUB_CONFIGS}
    thetas = {name: getattr(config, name).rope_parameters["rope_theta"] for name in SUB_CONFIGS}
    names = ["patcher_config", "encoder_config", "decoder_config", "global_config"]
    assert epsilons == dict(zip(names, [2e-5, 3e-5, 4e-5, 5e-5]))
    assert thetas == dict(zip(names, [11111.0, 22222.0, 33333.0, 44444.0]))
    # In real files nothing says what the windows are.
    assert config.local_attention_window_len == config.encoder_config.sliding_window == 512
    assert config.patcher_config.sliding_window == 512
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)
    written = json.loads(config.to_json_string())
    for name in (
        "pm_size",
        "realtime_patching",
        "patching_device",
        "attn_impl",
        "attn_bias_type",
        "device",
        "norm_eps",
    ):
        assert name not in written
    config.save_pretrained(tmp_path / "again")
    assert {**BltConfig.from_pretrained(tmp_path / "again").to_dict(), "_name_or_path": ""} == {
        **config.to_dict(),
        "_name_or_path": "",
    }


def test_legacy_rules_are_read(tmp_path):
    for rule in ({"monotonicity": True}, {"patching_threshold_add": 0.25}):
        (tmp_path / "config.json").write_text(json.dumps({**LEGACY_FILE, **rule}))
        config = AutoConfig.from_pretrained(tmp_path)
        assert {name: getattr(config, name) for name in rule} == rule


WRONG = {
    "cross_attn_k": (BltConfig, {"cross_attn_k": 4}, ["`cross_attn_k`", "4", "2", "encoder_config", "decoder_config"]),
    "cross_attn_k none": (BltConfig, {"cross_attn_k": None}, ["`cross_attn_k`", "None"]),
    "mode": (BltConfig, {"patching_mode": "bpe"}, ["`patching_mode`", "'bpe'", "entropy", "space", "static", "byte"]),
    "mode none": (BltConfig, {"patching_mode": None}, ["`patching_mode`", "None"]),
    "threshold": (BltConfig, {"patching_threshold": None}, ["`patching_threshold`", "None"]),
    "two rules": (
        BltConfig,
        {"monotonicity": True, "patching_threshold_add": 0.5},
        ["`monotonicity`", "`patching_threshold_add`", "0.5"],
    ),
    "monotonicity off entropy": (
        BltConfig,
        {"patching_mode": "space", "monotonicity": True},
        ["`monotonicity`", "'space'", "True"],
    ),
    "add off entropy": (
        BltConfig,
        {"patching_mode": "byte", "patching_threshold_add": 0.0},
        ["`patching_threshold_add`", "'byte'", "0.0"],
    ),
    "reset off entropy": (
        BltConfig,
        {"patching_mode": "static", "patching_newline_reset": True},
        ["`patching_newline_reset`", "'static'"],
    ),
    "patch size": (BltConfig, {"patching_mode": "static", "patch_size": 2.5}, ["`patch_size`", "2.5"]),
    "patch size 0": (BltConfig, {"patching_mode": "static", "patch_size": 0}, ["`patch_size`", "0"]),
    "max patch": (BltConfig, {"max_patch_length": 0}, ["`max_patch_length`", "0"]),
    "window": (BltConfig, {"local_attention_window_len": 0}, ["`local_attention_window_len`", "0"]),
    "hash sizes": (BltConfig, {"encoder_hash_byte_group_size": [3, 0]}, ["`encoder_hash_byte_group_size`", "[3, 0]"]),
    "hash rows": (BltConfig, {"encoder_hash_byte_group_vocab": 0}, ["`encoder_hash_byte_group_vocab`", "0"]),
    "hash functions": (
        BltConfig,
        {"encoder_hash_byte_group_nb_functions": -1},
        ["`encoder_hash_byte_group_nb_functions`", "-1"],
    ),
    "widths": (
        BltConfig,
        {"encoder_config": {"hidden_size": 512}},
        ["`encoder_config.hidden_size`", "`decoder_config.hidden_size`", "512", "1024"],
    ),
    "global width": (
        BltConfig,
        {"global_config": {"hidden_size": 512}},
        ["`decoder_config.hidden_size_global`", "`global_config.hidden_size`", "2048", "512"],
    ),
    "wrong component": (
        BltConfig,
        {"patcher_config": BltLocalEncoderConfig()},
        ["`patcher_config`", "BltLocalEncoderConfig"],
    ),
    "head size": (BltPatcherConfig, {"hidden_size": 770}, ["hidden_size", "770", "12"]),
    "no heads": (BltPatcherConfig, {"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    "kv heads": (BltGlobalTransformerConfig, {"num_key_value_heads": 5}, ["num_key_value_heads", "16", "5"]),
    "odd head": (BltPatcherConfig, {"hidden_size": 36}, ["even", "36", "12", "3"]),
    "patcher window": (BltPatcherConfig, {"sliding_window": 0}, ["sliding_window", "0"]),
    "pooling": (BltLocalEncoderConfig, {"patch_pooling": "sum"}, ["`patch_pooling`", "'sum'", "max", "mean", "min"]),
    "cross heads": (BltLocalEncoderConfig, {"num_cross_attention_heads": 3}, ["cross-attention heads", "3", "1024"]),
    "cross kv heads": (
        BltLocalDecoderConfig,
        {"num_cross_attention_heads": 4, "num_cross_key_value_heads": 3},
        ["cross-attention heads", "4", "3"],
    ),
    "cross window": (BltLocalDecoderConfig, {"cross_attn_window": 0}, ["cross_attn_window", "0"]),
    "latents": (BltLocalDecoderConfig, {"cross_attn_k": 0}, ["cross_attn_k", "0"]),
    "no encoder layer": (BltLocalEncoderConfig, {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
    "vocabularies": (
        BltConfig,
        {"encoder_config": {"vocab_size": 300}},
        ["`vocab_size`", "260", "300", "`encoder_config"],
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_values_are_named(case):
    config_class, values, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        config_class(**values)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_top_level_sizes_answer_and_are_not_written():
    config = tiny_config(decoder_config={"num_hidden_layers": 5, "num_key_value_heads": 1})
    expected = {
        "hidden_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    for written in (config.to_dict(), json.loads(config.to_json_string()), json.loads(config.to_json_string(False))):
        assert not set(expected) & set(written)
    # A file that has them says nothing that the sub-configs do not say.
    assert BltConfig.from_dict({**config.to_dict(), "hidden_size": 999, "num_hidden_layers": 999}).hidden_size == 16


def test_values_are_derived_once():
    config = tiny_config(cross_attn_k=4)
    assert config.global_config.encoder_cross_output_size == 4 * 16
    assert tiny_config().global_config.encoder_cross_output_size is None
    assert config.encoder_config.sliding_window == config.local_attention_window_len
    assert config.encoder_config.head_dim == 8
    assert config.uses_patcher and not tiny_config(patching_mode="byte").uses_patcher


def test_sub_configs_may_be_objects_of_either_package():
    values = tiny_config().to_dict()
    objects = {name: SUB_CONFIGS[name].from_dict(values[name]) for name in SUB_CONFIGS}
    theirs = {name: in_tree_class(SUB_CONFIGS[name]).from_dict(values[name]) for name in SUB_CONFIGS}
    plain = {name: value for name, value in values.items() if name not in SUB_CONFIGS and name != "model_type"}
    for sub_configs in (objects, theirs):
        config = BltConfig(**plain, **sub_configs)
        assert all(type(getattr(config, name)) is SUB_CONFIGS[name] for name in SUB_CONFIGS)
        assert config.encoder_config.hidden_size == 16 and config.patcher_config.num_hidden_layers == 2


def test_registered_over_in_tree():
    assert type(AutoConfig.for_model("blt")) is BltConfig
    assert type(AutoConfig.for_model("blt_patcher")) is BltPatcherConfig
    assert transformers.BltConfig is BltConfig is not in_tree.BltConfig


# Fields that only exist because in-tree files have them.
FORMAT_ONLY = {
    "initializer_range": "the reference's initialisation follows fan-in; in-tree classes write the field",
    "patching_batch_size": "the entropy model sees the batch that the model sees; in-tree classes write the field",
}
# Fields that transformers reads, by what does it.
READ_BY_TRANSFORMERS = {
    "rope_parameters": "rotary embeddings, and the config's own standardisation",
    "max_position_embeddings": "rotary embeddings (`LlamaRotaryEmbedding`)",
    "bos_token_id": "`GenerationConfig.from_model_config`",
    "tie_word_embeddings": "`PreTrainedModel.tie_weights`",
}


def names_read_in_source() -> set[str]:
    """Attributes read in the modules that make up the model, and names given to `getattr`."""
    names, package = set(), pathlib.Path(blt_hf.__file__).parent
    for path in (path for folder in ("model", "patches", "fast_blt") for path in (package / folder).glob("*.py")):
        # Special ids there are the tokenizer's and the generation configuration's.
        if path.name == "generation_blt.py":
            continue
        tree = ast.parse(path.read_text())
        if path.name == "configuration_blt.py":  # there, reading a field to check it does not count
            properties = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
                and any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            ]
            tree = ast.Module(body=properties, type_ignores=[])
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
            if is_getattr and isinstance(node.args[1], ast.Constant):
                names.add(node.args[1].value)
    return names


def test_every_field_is_read():
    read = names_read_in_source()
    fields = set()
    for config_class in EXTRA_FIELDS:
        for owner in (cls for cls in config_class.__mro__ if cls.__module__ == config_class.__module__):
            fields |= {name for name, base in vars(owner).get("__annotations__", {}).items() if base is not None}
    assert {"patching_threshold", "cross_attn_window", "hidden_act"} <= fields
    unread = fields - read
    assert unread == set(FORMAT_ONLY) | set(READ_BY_TRANSFORMERS)
