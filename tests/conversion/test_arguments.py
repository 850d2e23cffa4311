"""Meta's arguments and ours: what is read, refused, noted, and goes back.

That the numbers are right is shown in `tests/conformance/test_meta_reference.py`.
"""

import pytest

from blt_hf.conversion import arguments as convert_arguments
from blt_hf.conversion import (
    config_from_meta_args,
    meta_args_from_config,
)
from helpers.meta_checkpoints import ARGS, ENTROPY_ARGS, PATCHER_ARGS


def test_every_argument_of_metas_is_read_or_has_a_reason_not_to_be():
    """Changing a key that is read changes the config or is refused; changing an ignored one does nothing."""
    other = {
        "encoder_hash_byte_group_size": [3, 5], "downsampling_by_pooling": "min", "attn_impl": "flex_attention",
        "patching_mode": "space", "patch_in_forward": True, "n_kv_heads": 1, "n_kv_heads_global": 1,
        "dim_local_encoder": 12, "dim_local_decoder": 12, "head_dim": 2, "dim_token": 2, "max_patch_length": 4,
        "patching_threshold_add": 0.5, "cross_attn_nheads": 4, "attn_bias_type": "prefix",
    }  # fmt: skip
    base = ARGS | {"patching_threshold": 2.0, "patching_mode": "static", "patch_size": 3}
    entropy_base = base | {"patching_mode": "entropy"}

    def outcome(args):
        files = {"args": args, "train_args": None, "entropy_params": None}
        try:
            patcher_args, notes = convert_arguments.choose_patcher_args(files, "args")
            config, more_notes = config_from_meta_args(args, patcher_args, ENTROPY_ARGS)
            return config.to_dict(), notes + more_notes
        except ValueError as error:
            return str(error)

    def changed(args, key):
        value = {**convert_arguments._MODEL_DEFAULTS, **args}[key]
        if key in other:
            value = other[key]
        elif isinstance(value, bool):
            value = not value
        else:
            value = "other" if isinstance(value, str) else (value or 0) + 1
        return outcome(args | {key: value}) != outcome(args)

    ignored = set(" ".join(convert_arguments._MODEL_IGNORED.values()).split())
    assert len(convert_arguments._MODEL_DEFAULTS) == 101
    assert set(convert_arguments._MODEL_CHECKED) <= convert_arguments._MODEL_DEFAULTS.keys() - ignored
    for key in convert_arguments._MODEL_DEFAULTS:
        assert (changed(base, key) or changed(entropy_base, key)) == (key not in ignored), key


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("cross_attn_encoder", False, "True"),
        ("cross_attn_decoder", False, "True"),
        ("cross_attn_init_by_pooling", False, "True"),
        ("cross_attn_k", None, "at least 1"),
        ("cross_attn_nheads", None, "at least 1"),
        ("local_attention_window_len", None, "at least 1"),
        ("downsampling_by_pooling", "max_mean", "'max', 'mean', 'avg', 'min'"),
        ("downsampling_by_pooling", None, "'max', 'mean', 'avg', 'min'"),
        ("encoder_hash_byte_group_nb_functions", 12, "at most 11"),
        ("encoder_enable_byte_ngrams", True, "False"),
        ("entropy_model_is_ngram_model", True, "False"),
        ("tokenize_with_bpe_delimiter", True, "False"),
        ("weight_tying", True, "False"),
        ("tie_local_encoder_decoder", True, "False"),
        ("tie_local_encoder_decoder_logits", True, "False"),
        ("norm_type", "layernorm", "'rmsnorm'"),
        ("norm_affine", False, "True"),
        ("pre_norm", False, "True"),
        ("non_linearity", "relu", "'swiglu'"),
        ("use_rope", False, "True"),
        ("alpha_depth", "current", "'disabled'"),
        ("architecture", "mamba", "'vanilla'"),
        ("conv_kernel_size", 3, "null"),
        ("global_local_decoder_residual_layer", "add", "null"),
        ("patching_thresholds_str", "1,2", "null"),
        ("attn_impl", "flex_attention", "'xformers'"),
        ("attn_bias_type", "prefix", "'block_causal', 'causal', null"),
        ("attn_to_keep", "none", "'all'"),
        ("use_local_encoder_transformer", False, "True"),
        ("vocab_size", 512, "260"),
        ("eos_id", 7, "2"),
        ("pm_size", 4, "0"),
        ("output_size", 300, "-1, 260"),
        ("head_dim", 16, "null or 4"),
        ("dim_token", 4, "null or `dim_local_encoder` (8)"),
        ("dim_global", 8, "patch projection"),
        ("patching_mode", "", "boe"),
        ("a_flag_of_a_fork", "on", "null or false"),
        ("n_layers_global", "8", "a number"),
        ("dim_global", None, "a number"),
        ("cross_attn_all_layers_encoder", "yes", "true or false"),
    ],
)
def test_an_unsupported_option_is_named_with_its_value(key, value, supported):
    with pytest.raises(ValueError) as error:
        config_from_meta_args({**ARGS, key: value}, PATCHER_ARGS, ENTROPY_ARGS)
    assert f"`args.{key}`" in str(error.value) and supported in str(error.value)
    assert (repr(value) if value is not None else "None") in str(error.value)


@pytest.mark.parametrize(
    ("where", "key", "value", "supported"),
    [
        ("patcher_args", "patching_mode", "bpe", "'entropy', 'space', 'static', 'byte'"),
        ("patcher_args", "threshold", None, "a threshold in nats"),
        ("patcher_args", "repetition_detection", True, "null or false"),
        ("entropy_model", "vocab_size", 300, "260"),
        ("entropy_model", "weight_tying", True, "False"),
        ("entropy_model", "head_dim", 16, "null or 4"),
        ("entropy_model", "mixture_of_experts", 8, "null or false"),
    ],
)
def test_an_unsupported_option_of_the_patcher_is_named(where, key, value, supported):
    arguments = {"patcher_args": dict(PATCHER_ARGS), "entropy_model": dict(ENTROPY_ARGS)}
    arguments[where][key] = value
    with pytest.raises(ValueError) as error:
        config_from_meta_args(ARGS, arguments["patcher_args"], arguments["entropy_model"])
    assert f"`{where}.{key}`" in str(error.value) and supported in str(error.value)


def test_a_value_of_the_wrong_type_is_a_value_error():
    with pytest.raises(ValueError, match="no valid config.*num_hidden_layers"):
        config_from_meta_args(ARGS | {"n_layers_global": 2.5}, PATCHER_ARGS, ENTROPY_ARGS)


def test_supported_options_reach_the_config():
    args = ARGS | {
        "downsampling_by_pooling": "avg",
        "n_kv_heads": 1,
        "n_kv_heads_global": 1,
        "cross_attn_nheads": 4,
        "cross_attn_window_encoder": 2,
        "cross_attn_window_decoder": 3,
        "cross_attn_all_layers_encoder": True,
        "cross_attn_all_layers_decoder": False,
        "encoder_hash_byte_group_size": "3,5",
        "encoder_hash_byte_group_nb_functions": 2,
        "ffn_dim_multiplier": 1.3,
        "dropout": 0.1,
        "norm_eps": 1e-6,
        "an_unknown_key_that_is_off": False,
    }
    patcher_args = PATCHER_ARGS | {"threshold_add": 0.5, "max_patch_length": 6}
    config, notes = config_from_meta_args(args, patcher_args, ENTROPY_ARGS | {"sliding_window": 32})
    encoder, decoder, global_ = config.encoder_config, config.decoder_config, config.global_config
    assert not notes
    assert encoder.patch_pooling == "mean"
    assert (encoder.num_key_value_heads, decoder.num_key_value_heads, global_.num_key_value_heads) == (1, 1, 1)
    assert encoder.cross_attention_heads == decoder.cross_attention_heads == (4, 4)
    assert (encoder.cross_attn_window, decoder.cross_attn_window) == (2, 3)
    assert (encoder.cross_attn_all_layers, decoder.cross_attn_all_layers) == (True, False)
    assert (config.encoder_hash_byte_group_size, config.encoder_hash_byte_group_nb_functions) == ([3, 5], 2)
    assert (encoder.intermediate_size, global_.intermediate_size) == (
        32,
        56,
    )  # int(1.3 * 21) -> 32, int(1.3 * 42) -> 56
    assert (encoder.dropout, global_.rms_norm_eps, decoder.max_position_embeddings) == (0.1, 1e-6, 128)
    assert (config.patching_threshold_add, config.max_patch_length) == (0.5, 6)
    assert config.mask_documents and config.patcher_config.mask_documents
    assert config.patcher_config.sliding_window == 32
    assert config.patcher_config.intermediate_size == 256  # Meta's loader fixes multiple_of 256
    assert config.patcher_config.rope_parameters["rope_theta"] == 10000.0


def test_monotonicity_comes_before_threshold_add_as_in_the_reference():
    config, _ = config_from_meta_args(ARGS, PATCHER_ARGS | {"monotonicity": True, "threshold_add": 0.5}, ENTROPY_ARGS)
    assert config.monotonicity and config.patching_threshold_add is None


@pytest.mark.parametrize("window", [None, "absent"])
def test_entropy_window_is_512_unless_the_file_says_otherwise(window):
    args = ENTROPY_ARGS | ({} if window == "absent" else {"sliding_window": window})
    assert config_from_meta_args(ARGS, PATCHER_ARGS, args)[0].patcher_config.sliding_window == 512


@pytest.mark.parametrize(
    ("args", "entropy_args", "note"),
    [
        ({"attn_bias_type": "causal"}, {}, "reads across documents"),
        ({}, {"rope_theta": 500000.0}, "`entropy_model.rope_theta` = 500000.0 is ignored"),
    ],
)
def test_what_the_reader_should_know_is_noted(args, entropy_args, note):
    notes = config_from_meta_args(ARGS | args, PATCHER_ARGS, ENTROPY_ARGS | entropy_args)[1]
    assert len(notes) == 1 and note in notes[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": 1, "cross_attn_nheads": 4, "cross_attn_window_encoder": 2},
        {"ffn_dim_multiplier": 1.3, "multiple_of": 16},
        {"ffn_dim_multiplier": 0.77, "multiple_of": 1},
        {"encoder_hash_byte_group_size": None},
        {"dim_global": 24, "cross_attn_all_layers_encoder": True, "n_layers_local_encoder": 2},
    ],
)
@pytest.mark.parametrize("rule", [{}, {"monotonicity": True}, {"patching_mode": "static", "patch_size": 5.0}])
def test_arguments_survive_config_and_back(overrides, rule):
    config, _ = config_from_meta_args(ARGS | overrides, PATCHER_ARGS | rule, ENTROPY_ARGS)
    again, _ = config_from_meta_args(*meta_args_from_config(config))
    assert again.to_dict() == config.to_dict()
