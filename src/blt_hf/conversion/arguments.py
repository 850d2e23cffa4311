"""Meta's arguments and the fields of a [`BltConfig`], in both directions."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from ..model.configuration_blt import BltConfig
from ..model.patching_blt import BOE_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, PATCHING_MODES


# ---- Meta's arguments. Every key is mapped to a config field, checked against the supported values, or ignored. ----

# Defaults of `ByteLatentTransformerArgs`, for keys that a file leaves out. `attn_impl` is the exception: files without
# it are older than that field and were run with xformers.
_MODEL_DEFAULTS = {
    "vocab_size": -1, "max_seqlen": 1024, "max_encoder_seq_length": None, "patch_in_forward": False,
    "dim_global": 512, "dim_local_encoder": 512, "dim_local_decoder": 512, "dim_token": None, "head_dim": None,
    "n_layers_global": 8, "n_layers_local_encoder": 8, "n_layers_local_decoder": 8,
    "n_heads_global": 8, "n_heads_local_encoder": 8, "n_heads_local_decoder": 8,
    "n_kv_heads": None, "n_kv_heads_global": None, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5, "rope_theta": 10000.0, "dropout": 0.0, "local_attention_window_len": None,
    "patch_size": None, "patching_mode": None, "patching_threshold": None, "patching_threshold_add": None,
    "monotonicity": False, "max_patch_length": None, "patching_batch_size": 1, "downsampling_by_pooling": None,
    "cross_attn_k": None, "cross_attn_nheads": None, "cross_attn_encoder": False, "cross_attn_decoder": False,
    "cross_attn_window_encoder": None, "cross_attn_window_decoder": None, "cross_attn_init_by_pooling": False,
    "cross_attn_all_layers_encoder": False, "cross_attn_all_layers_decoder": False,
    "encoder_hash_byte_group_size": None, "encoder_hash_byte_group_vocab": 30000,
    "encoder_hash_byte_group_nb_functions": 3, "eos_id": 2, "pm_size": 0, "output_size": -1,
    "use_local_encoder_transformer": False, "attn_impl": "xformers", "attn_bias_type": "causal", "attn_to_keep": "all",
    "weight_tying": False, "tie_local_encoder_decoder": False, "tie_local_encoder_decoder_logits": False,
    "encoder_enable_byte_ngrams": False, "entropy_model_is_ngram_model": False, "tokenize_with_bpe_delimiter": False,
    "non_linearity": "swiglu", "use_rope": True, "norm_type": "rmsnorm", "norm_affine": True, "pre_norm": True,
    "alpha_depth": "disabled", "architecture": "vanilla", "conv_kernel_size": None, "patching_thresholds_str": None,
    "global_local_decoder_residual_layer": None, "encoder_lm_loss": False,
    "encoder_preds_low_entropy_toks": None, "encoder_preds_random_toks": None,
    "dim": 512, "n_layers": 8, "n_heads": 8, "dim_token_emb": None, "dim_patch_emb": None,
    "share_encoder_decoder_emb": True, "encoder_ngram_table_dir": None, "encoder_ngram_to_size_str": None,
    "ngram_vocab_sizes": None, "encoder_enable_byte_group_hash": False, "cross_attn_use_flex_attention": True,
    "rope_use_fp32_in_outer_product": False, "patching_device": "cuda", "entropy_model_checkpoint_dir": None,
    "pad_to_max_length": False, "max_length": 2048, "seed": 42, "init_base_std": None, "init_std_factor": "disabled",
    "init_use_gaussian": True, "init_use_depth": "current", "recompute_fc1_out": False, "recompute_fc3_out": False,
    "recompute_attn": True, "custom_bwd": False, "layer_ckpt": "all", "sequence_parallel": False,
    "loss_parallel": False, "fuse_sequence_parallel": False, "use_fsdp": True, "log_patch_lengths": False,
    "full_logging_n_layers": 4,
}  # fmt: skip

# Keys with one accepted value.
_MODEL_FIXED = {
    "use_local_encoder_transformer": True, "attn_to_keep": "all", "weight_tying": False,
    "tie_local_encoder_decoder": False, "tie_local_encoder_decoder_logits": False, "non_linearity": "swiglu",
    "use_rope": True, "norm_type": "rmsnorm", "norm_affine": True, "pre_norm": True, "alpha_depth": "disabled",
    "architecture": "vanilla", "conv_kernel_size": None, "global_local_decoder_residual_layer": None,
}  # fmt: skip
# Accepted values, of which an export writes the first, and why there are no others.
_MODEL_CHECKED = {key: ((value,), "") for key, value in _MODEL_FIXED.items()} | {
    "vocab_size": ((260,), "256 bytes and 4 special ids."),
    "eos_id": ((2,), "Documents end at id 2."),
    "pm_size": ((0,), "Parameter mixing adds ids."),
    "output_size": ((-1, 260), ""),
    "cross_attn_encoder": ((True,), "Cross attention off is another architecture."),
    "cross_attn_decoder": ((True,), "Cross attention off is another architecture."),
    "cross_attn_init_by_pooling": ((True,), "Without it the reference has no first patch states."),
    # The reference concatenates the pools of a combination, which its own patch projection then rejects.
    "downsampling_by_pooling": (("max", "mean", "avg", "min"), "Combinations do not run in the reference either."),
    # The other kernels leave out the windows, the document masks or both.
    "attn_impl": (("xformers",), "If the model was trained with windows and document masks, set it so in the file."),
    "attn_bias_type": (("block_causal", "causal", None), ""),
    "encoder_enable_byte_ngrams": ((False,), "N-gram tables are not supported."),
    "entropy_model_is_ngram_model": ((False,), "The entropy model must be a transformer."),
    "tokenize_with_bpe_delimiter": ((False,), "There is no delimiter tokenizer here."),
    "patching_thresholds_str": ((None,), "One threshold, in nats."),
}

# Why each ignored key cannot change a number. All other keys are read by `config_from_meta_args`, or, for the patching
# settings, by `choose_patcher_args`.
_MODEL_IGNORED = {
    "overwritten by the reference when it builds each part": "dim n_layers n_heads dim_token_emb dim_patch_emb",
    "no effect: encoder and decoder are equally wide": "share_encoder_decoder_emb",
    "no effect without `encoder_enable_byte_ngrams`": "encoder_ngram_table_dir encoder_ngram_to_size_str "
    "ngram_vocab_sizes",
    "never read by the reference": "encoder_enable_byte_group_hash max_length",
    "the same numbers": "cross_attn_use_flex_attention rope_use_fp32_in_outer_product",
    "training only": "encoder_lm_loss encoder_preds_low_entropy_toks encoder_preds_random_toks seed init_base_std "
    "init_std_factor init_use_gaussian init_use_depth recompute_fc1_out recompute_fc3_out recompute_attn custom_bwd "
    "layer_ckpt sequence_parallel loss_parallel fuse_sequence_parallel use_fsdp log_patch_lengths "
    "full_logging_n_layers",
    "runtime only": "patching_device patching_batch_size entropy_model_checkpoint_dir pad_to_max_length init_device "
    "init_dtype realtime_patching data_loader_patching device",
}

# `LMTransformerArgs` and `PatcherArgs`. Meta's loader of `params.json` takes six values from the file; the rest is
# fixed there (`_ENTROPY_FIXED`), sliding window 512 included, which the file's value replaces here.
_ENTROPY_DEFAULTS = {
    "dim": 512, "n_layers": 8, "n_heads": None, "n_kv_heads": None, "head_dim": None, "ffn_dim_multiplier": None,
    "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seqlen": 1024, "vocab_size": -1,
    "sliding_window": None, "weight_tying": False, "eos_id": 2, "attn_impl": "xformers",
    "attn_bias_type": "local_block_causal", "seed": 42, "init_base_std": None, "init_std_factor": "disabled",
    "rope_use_fp32_in_outer_product": False,
}  # fmt: skip
_ENTROPY_FIXED = {
    "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, "attn_impl": "xformers",
    "attn_bias_type": "local_block_causal",
}  # fmt: skip
_ENTROPY_CHECKED = {key: _MODEL_CHECKED[key] for key in ("vocab_size", "eos_id", "weight_tying", "attn_impl")} | {
    "attn_bias_type": (("local_block_causal",), "")
}
_ENTROPY_IGNORED = "seed init_base_std init_std_factor rope_use_fp32_in_outer_product init_device init_dtype"
_PATCHER_DEFAULTS = {
    "patching_mode": "entropy", "threshold": 1.335442066192627, "threshold_add": None, "max_patch_length": None,
    "patch_size": 4.5, "patching_batch_size": 1, "monotonicity": False, "patching_device": "cuda", "device": "cuda",
    "entropy_model_checkpoint_dir": None, "realtime_patching": False, "log_time": False,
}  # fmt: skip
_PATCHER_CHECKED = {"patching_mode": (PATCHING_MODES, "")}
_PATCHER_IGNORED = (
    "patching_device device entropy_model_checkpoint_dir realtime_patching log_time data_loader_patching entropy_model"
)

# ---- Fields of ours, and the keys of Meta that hold the same value: read in both directions. ----

_SAME_NAMES = (
    "vocab_size", "local_attention_window_len", "cross_attn_k", "encoder_hash_byte_group_vocab",
    "encoder_hash_byte_group_nb_functions", "patching_mode", "patching_threshold", "patching_threshold_add",
    "monotonicity", "max_patch_length", "patch_size",
)  # fmt: skip
_MODEL_FIELDS = dict(zip(_SAME_NAMES, _SAME_NAMES))
_RULE_FIELDS = {
    "patching_mode": "patching_mode", "patching_threshold": "threshold", "patching_threshold_add": "threshold_add",
    "monotonicity": "monotonicity", "max_patch_length": "max_patch_length", "patch_size": "patch_size",
    "patching_batch_size": "patching_batch_size",
}  # fmt: skip
# `{}` is the name of a part; keys without it hold one value for all parts.
_STACK_FIELDS = {
    "hidden_size": "dim{}", "num_attention_heads": "n_heads{}", "num_hidden_layers": "n_layers{}",
    "rms_norm_eps": "norm_eps",
}  # fmt: skip
_LOCAL_FIELDS = {"cross_attn_all_layers": "cross_attn_all_layers{}", "cross_attn_window": "cross_attn_window{}"}
_ENTROPY_FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "max_seqlen", "sliding_window": "sliding_window",
}  # fmt: skip
_TOKEN_IDS = {"pad_token_id": BOE_TOKEN_ID, "bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID}


def _to_ours(fields: dict[str, str], args: dict, part: str = "") -> dict:
    return {name: args[key.format(part)] for name, key in fields.items()}


def _to_meta(fields: dict[str, str], config, part: str = "") -> dict:
    return {key.format(part): getattr(config, name) for name, key in fields.items()}


def _fill(given: dict, where: str, defaults: dict, checked: dict, ignored: str) -> dict:
    """Returns `defaults` with the values of `given` in their place, all of them checked.

    Raises:
        ValueError: names the key, its value and the supported ones.
    """
    for key in given.keys() - defaults.keys() - set(ignored.split()):
        if given[key] not in (None, False):
            raise ValueError(f"`{where}.{key}` = {given[key]!r} is not known here; supported: null or false.")
    for key in given.keys() & defaults.keys() - {"ffn_dim_multiplier", "threshold"}:  # these two may be null
        kind = bool if type(defaults[key]) is bool else (int, float) if type(defaults[key]) in (int, float) else object
        if key not in ignored.split() and key not in checked and not isinstance(given[key], kind):
            wanted = "true or false" if kind is bool else "a number"
            raise ValueError(f"`{where}.{key}` = {given[key]!r} is not supported; supported: {wanted}.")
    values = {**defaults, **given}
    for key, (accepted, why) in checked.items():
        if values[key] not in accepted:
            listed = ", ".join("null" if value is None else repr(value) for value in accepted)
            raise ValueError(
                f"`{where}.{key}` = {values[key]!r} is not supported; supported: {listed}. {why}".rstrip()
            )
    return values


def _ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    width = int((1 if multiplier is None else multiplier) * int(8 * dim / 3))
    return multiple_of * math.ceil(width / multiple_of)


def _stack(where: str, args: dict, part: str, kv_heads: int | None) -> dict:
    """Returns the fields that every stack of layers has."""
    dim, heads = args[f"dim{part}"], args[f"n_heads{part}"]
    if not heads:
        raise ValueError(f"`{where}`: the number of heads is needed; got {heads}.")
    if args["head_dim"] not in (None, dim // heads):
        raise ValueError(
            f"`{where}.head_dim` = {args['head_dim']} is not supported; supported: null or {dim // heads} "
            f"(width {dim} / {heads} heads)."
        )
    return _to_ours(_STACK_FIELDS, args, part) | {
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": _ffn_width(dim, args["multiple_of"], args["ffn_dim_multiplier"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args["rope_theta"])},
    }


def config_from_meta_args(
    args: dict, patcher_args: dict, entropy_args: dict | None, entropy_fixed: bool = True
) -> tuple[BltConfig, list[str]]:
    """Returns the [`BltConfig`] that Meta's arguments describe.

    Args:
        args: arguments of the byte latent transformer (`config.json`, key `args`).
        patcher_args: `data.patcher_args` of `train_args.json` or `params.json`.
        entropy_args: arguments of the entropy model; None: there is none, and the patching mode must not be `entropy`.
        entropy_fixed: multiple_of, epsilon, rope theta and masks are those that Meta's loader of `params.json` fixes,
            whatever `entropy_args` say.
    Returns:
        the config, and notes for the reader.
    Raises:
        ValueError: names the argument, its value and the supported ones.
    """
    notes = []
    a = _fill(args, "args", _MODEL_DEFAULTS, _MODEL_CHECKED, " ".join(_MODEL_IGNORED.values()))
    patcher = _fill(patcher_args, "patcher_args", _PATCHER_DEFAULTS, _PATCHER_CHECKED, _PATCHER_IGNORED)
    mode = patcher["patching_mode"]
    if a["patching_mode"] == "":
        raise ValueError("`args.patching_mode` = '' (patches that begin with boe ids) is not supported.")
    if mode == "entropy" and patcher["threshold"] is None:
        raise ValueError(
            "`patcher_args.threshold` = null (top-k patching, which needs the whole text) is not supported; "
            "supported: a threshold in nats."
        )
    for key in ("cross_attn_k", "cross_attn_nheads", "local_attention_window_len"):
        if not a[key]:
            raise ValueError(f"`args.{key}` = {a[key]!r} is not supported; supported: a whole number of at least 1.")
    if a["dim_token"] not in (None, a["dim_local_encoder"]):
        raise ValueError(
            f"`args.dim_token` = {a['dim_token']} is not supported; supported: null or `dim_local_encoder` "
            f"({a['dim_local_encoder']})."
        )
    if a["dim_global"] == a["dim_local_decoder"]:
        raise ValueError(
            f"`args.dim_global` = `args.dim_local_decoder` = {a['dim_global']} is not supported: the reference then "
            "has no patch projection in the decoder."
        )
    sizes = a["encoder_hash_byte_group_size"] or []
    if isinstance(sizes, str):
        sizes = [int(size) for size in sizes.split(",") if size]
    functions = a["encoder_hash_byte_group_nb_functions"] if sizes else 0
    if functions > 11:
        raise ValueError(
            f"`args.encoder_hash_byte_group_nb_functions` = {functions} is not supported; supported: at most 11."
        )
    if a["attn_bias_type"] != "block_causal":
        notes.append(
            f"`args.attn_bias_type` is {a['attn_bias_type']!r}: Meta's global transformer then reads across "
            "documents, its local parts do not. The converted model separates documents everywhere; rows without an "
            "`eos` inside have the same numbers."
        )
    if mode == "static":
        notes.append("Static patching: the first patch here is 1 byte, since Meta's model rejects any other length.")

    def stack(part: str, kv_heads: int | None, positions: int) -> dict:
        return _stack("args", a, part, kv_heads) | {"dropout": a["dropout"], "max_position_embeddings": positions}

    local_positions = a["max_encoder_seq_length"] or a["max_seqlen"]

    def local(side: str) -> dict:
        config = stack(f"_local{side}", a["n_kv_heads"], local_positions)
        heads = a["cross_attn_nheads"]
        same = heads == config["num_attention_heads"] == config["num_key_value_heads"]
        return (
            config
            | _to_ours(_LOCAL_FIELDS, a, side)
            | {
                "vocab_size": a["vocab_size"],
                "hidden_size_global": a["dim_global"],
                "cross_attn_k": a["cross_attn_k"],
                "num_cross_attention_heads": None if same else heads,
            }
        )

    pooling = {"avg": "mean"}.get(a["downsampling_by_pooling"], a["downsampling_by_pooling"])
    patch_size = patcher["patch_size"]
    # Read in static mode only. Elsewhere Meta's files say 4.5, which the in-tree config refuses to load.
    if patch_size is not None and (mode != "static" or int(patch_size) == patch_size):
        patch_size = int(patch_size)
    # The reference reads these two in entropy mode only, and `monotonicity` first.
    monotonic = mode == "entropy" and bool(patcher["monotonicity"])
    threshold = _PATCHER_DEFAULTS["threshold"] if patcher["threshold"] is None else patcher["threshold"]
    threshold_add = patcher["threshold_add"] if mode == "entropy" and not monotonic else None
    patcher_config = None
    if entropy_args is not None:
        patcher_config, entropy_notes = _patcher_config(entropy_args, entropy_fixed)
        notes += entropy_notes
    elif mode == "entropy":
        raise ValueError("`patcher_args.patching_mode` = 'entropy' needs an entropy model; none was found.")
    rule = _to_ours(_RULE_FIELDS, patcher) | {
        "patch_size": patch_size,
        "monotonicity": monotonic,
        "patching_threshold": threshold,
        "patching_threshold_add": threshold_add,
    }
    fields = _to_ours(_MODEL_FIELDS, a) | rule | _TOKEN_IDS | {"encoder_hash_byte_group_nb_functions": functions}
    with wrong_types_are_value_errors():
        config = BltConfig(
            **fields,
            max_position_embeddings=local_positions,
            patch_in_forward=patcher_config is not None,
            encoder_hash_byte_group_size=sizes,
            encoder_config=local("_encoder") | {"patch_pooling": pooling},
            decoder_config=local("_decoder"),
            global_config=stack("_global", a["n_kv_heads_global"], a["max_seqlen"]),
            patcher_config=patcher_config,
            mask_documents=True,
        )
    return config, notes


@contextmanager
def wrong_types_are_value_errors() -> Iterator[None]:
    """Turns the error of a field of the wrong type, which is none of Python's, into a ValueError."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"the arguments give no valid config: {error}") from error


def _patcher_config(entropy_args: dict, fixed: bool) -> tuple[dict, list[str]]:
    given = {**entropy_args, **_ENTROPY_FIXED} if fixed else entropy_args
    e = _fill(given, "entropy_model", _ENTROPY_DEFAULTS, _ENTROPY_CHECKED, _ENTROPY_IGNORED)
    notes = [
        f"`entropy_model.{key}` = {entropy_args[key]!r} is ignored, as in Meta's loader, which uses {value}."
        for key, value in _ENTROPY_FIXED.items()
        if fixed and isinstance(value, float) and entropy_args.get(key, value) != value
    ]
    config = _stack("entropy_model", e, "", e["n_kv_heads"]) | _to_ours(_ENTROPY_FIELDS, e) | _TOKEN_IDS
    config["sliding_window"] = config["sliding_window"] or 512
    return config, notes


_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def _ffn_args(widths: dict[int, int], multiples: tuple[int, ...]) -> tuple[int, float]:
    """Finds the `(multiple_of, ffn_dim_multiplier)` that give each `width -> intermediate size`, best multiplier 1."""
    for multiple_of in multiples:
        low = max((inner - multiple_of + 1) / int(8 * dim / 3) for dim, inner in widths.items())
        high = min((inner + 1) / int(8 * dim / 3) for dim, inner in widths.items())
        # Short decimals first: 1.3 reads better than the midpoint.
        candidates = [1.0] + [round((low + high) / 2, digits) for digits in range(1, 10)] + [(low + high) / 2]
        for multiplier in candidates:
            if all(_ffn_width(dim, multiple_of, multiplier) == inner for dim, inner in widths.items()):
                return multiple_of, multiplier
    raise ValueError(
        f"`intermediate_size`: no `multiple_of` of {multiples} and `ffn_dim_multiplier` of Meta's format give "
        f"{widths} (width: intermediate size)."
    )


def meta_args_from_config(config: BltConfig, entropy_fixed: bool = True) -> tuple[dict, dict, dict | None]:
    """Returns `(args, patcher_args, entropy_args)`, the inverse of [`config_from_meta_args`]: no ignored keys.

    Args:
        entropy_fixed: write the entropy model's arguments so that Meta's loader of `params.json` understands them.
    Raises:
        ValueError: names the field that Meta's format cannot express.
    """
    if config.patching_mode not in PATCHING_MODES:
        raise ValueError(
            f"`patching_mode` {config.patching_mode!r} is a rule of your own; Meta's format knows {PATCHING_MODES}."
        )
    encoder, decoder, global_ = config.encoder_config, config.decoder_config, config.global_config
    args = {key: accepted[0] for key, (accepted, _) in _MODEL_CHECKED.items()} | _to_meta(_MODEL_FIELDS, config)
    # The encoder comes last, so its value counts where all parts share a key.
    for part, name in ((global_, "_global"), (decoder, "_local_decoder"), (encoder, "_local_encoder")):
        args |= _to_meta(_STACK_FIELDS, part, name)
    for part, name in ((encoder, "_encoder"), (decoder, "_decoder")):
        args |= _to_meta(_LOCAL_FIELDS, part, name)
        args[f"cross_attn_all_layers{name}"] = bool(part.cross_attn_all_layers)
    has_hashes = config.encoder_hash_byte_group_nb_functions > 0
    args |= _shared_args([encoder, global_, decoder], _MULTIPLES) | {
        "n_kv_heads_global": _kv_heads(global_),
        "max_seqlen": global_.max_position_embeddings,
        "max_encoder_seq_length": encoder.max_position_embeddings,
        "dropout": encoder.dropout,
        "downsampling_by_pooling": encoder.patch_pooling,
        "cross_attn_nheads": encoder.cross_attention_heads[0],
        "encoder_hash_byte_group_size": list(config.encoder_hash_byte_group_size) if has_hashes else [],
    }
    entropy_args = None
    if config.patch_in_forward:
        patcher = config.patcher_config
        entropy_args = _to_meta(_STACK_FIELDS | _ENTROPY_FIELDS, patcher)
        entropy_args |= _shared_args([patcher], (256,) if entropy_fixed else _MULTIPLES)
        entropy_args |= {key: _ENTROPY_FIXED[key] for key in ("attn_impl", "attn_bias_type")}
    return args, _to_meta(_RULE_FIELDS, config), entropy_args


def _kv_heads(part) -> int | None:
    return None if part.num_key_value_heads == part.num_attention_heads else part.num_key_value_heads


def _shared_args(parts: list, multiples: tuple[int, ...]) -> dict:
    """Returns the arguments that Meta has once for several parts; those that no width says are of the first one."""
    multiple_of, multiplier = _ffn_args({part.hidden_size: part.intermediate_size for part in parts}, multiples)
    return {
        "n_kv_heads": _kv_heads(parts[0]),
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "rope_theta": parts[0].rope_parameters["rope_theta"],
    }


# The fields that the numbers of a model depend on, at the top and in the components.
_ESSENCE = {*_SAME_NAMES, "patch_in_forward", "patching_newline_reset", "encoder_hash_byte_group_size"}
_PART_ESSENCE = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size",
    "rms_norm_eps", "rope_parameters", "hidden_act", "sliding_window", "cross_attention_heads", "cross_attn_window",
    "cross_attn_all_layers", "cross_attn_k", "patch_pooling", "dropout", "lexicon_size",
)  # fmt: skip


def _essence(config: BltConfig) -> dict:
    """Returns the fields that the numbers of a model depend on, and their values."""
    unread = {"patch_size"} if config.patching_mode != "static" else set()
    if not config.encoder_hash_byte_group_nb_functions:
        unread |= {"encoder_hash_byte_group_size", "encoder_hash_byte_group_vocab"}
    essence = {name: getattr(config, name) for name in sorted(_ESSENCE - unread)}
    parts = ["encoder_config", "decoder_config", "global_config"]
    for part in parts + (["patcher_config"] if config.patch_in_forward else []):
        values = getattr(config, part)
        essence |= {f"{part}.{name}": getattr(values, name) for name in _PART_ESSENCE if hasattr(values, name)}
    return essence


def entropy_is_fixed(config: BltConfig) -> bool:
    """Tells whether Meta's loader of `params.json`, which fixes some values, can build the patcher."""
    patcher = config.patcher_config
    try:
        _ffn_args({patcher.hidden_size: patcher.intermediate_size}, (256,))
    except ValueError:
        return False
    theta, eps = patcher.rope_parameters["rope_theta"], patcher.rms_norm_eps
    return (theta, eps) == (_ENTROPY_FIXED["rope_theta"], _ENTROPY_FIXED["norm_eps"])


def argument_files(config: BltConfig, kept: dict | None) -> dict:
    """Returns Meta's argument files for `config`: `args`, `train_args`, `entropy_params` and `entropy_fixed`.

    Kept arguments stay as they are, except where the config now says something else than they do.
    """
    fixed = entropy_is_fixed(config) if kept is None else kept.get("entropy_fixed", True)
    args, patcher_args, entropy_args = meta_args_from_config(config, fixed)
    meta = _essence(config_from_meta_args(args, patcher_args, entropy_args, fixed)[0])
    for name, value in _essence(config).items():
        if meta[name] != value:
            raise ValueError(
                f"`{name}` = {value!r} has no counterpart in Meta's format, which would say {meta[name]!r}."
            )
    if kept is None:
        args = {**_MODEL_DEFAULTS, **args}
        data = {"patcher_args": {**_PATCHER_DEFAULTS, **patcher_args}, "tokenizer_args": {"name": "blt"}}
        params = None
        if entropy_args is not None:
            params = {"name": "entropy_model", "data": data, "entropy_model": {**_ENTROPY_DEFAULTS, **entropy_args}}
        train_args = {"name": "blt_hf", "data": data, "model": args}
        return {"args": args, "train_args": train_args, "entropy_params": params, "entropy_fixed": fixed}

    files = json.loads(json.dumps({key: kept.get(key) for key in ("args", "train_args", "entropy_params")}))
    train_args, params = files["train_args"] or {}, files["entropy_params"] or {}
    kept_entropy = params.get("entropy_model")
    kept_rule, _ = choose_patcher_args(files, kept.get("patching", "auto"))
    kept_config, _ = config_from_meta_args(files["args"], kept_rule, kept_entropy, fixed)
    old_args, old_patcher_args, old_entropy_args = meta_args_from_config(kept_config, fixed)

    def update(target: dict | None, new: dict | None, old: dict | None) -> None:
        if target is not None and new is not None:
            target |= {key: value for key, value in new.items() if old is None or old[key] != value}

    update(files["args"], args, old_args)
    update(train_args.get("model"), args, old_args)
    for file in (train_args, params):
        update((file.get("data") or {}).get("patcher_args"), patcher_args, old_patcher_args)
    update(kept_entropy, entropy_args, old_entropy_args)
    if entropy_args is not None and kept_entropy is None:
        raise ValueError("the kept arguments have no entropy model, and this model has one; leave `meta_args` out.")
    return files | {"entropy_fixed": fixed}


# ---- Which of the files counts ----


def check_tokenizer(train_args: dict | None) -> None:
    """Raises a ValueError if a checkpoint was trained with another tokenizer than that of bytes."""
    tokenizer = ((train_args or {}).get("data") or {}).get("tokenizer_args") or {}
    has_delimiters = bool((tokenizer.get("init_kwargs") or {}).get("bpe_delim"))
    for key, given, supported in (("name", tokenizer.get("name", "blt"), "blt"), ("bpe_delim", has_delimiters, False)):
        if given != supported:
            raise ValueError(f"`data.tokenizer_args` {key} = {given!r} is not supported; supported: {supported!r}.")


def choose_patcher_args(files: dict, choice: str) -> tuple[dict, list[str]]:
    """Returns the patching settings of a checkpoint, and notes where its files disagree about them."""
    found = {}
    for name, file in (("train_args", files["train_args"]), ("entropy_model", files["entropy_params"])):
        if patcher_args := ((file or {}).get("data") or {}).get("patcher_args"):
            found[name] = patcher_args
    args = {**_MODEL_DEFAULTS, **files["args"]}
    found["args"] = {key: args[name] for name, key in _RULE_FIELDS.items() if name in _MODEL_FIELDS}
    choice = next(iter(found)) if choice == "auto" else choice
    if choice not in found:
        raise ValueError(f"`patching` = {choice!r} is not there; this checkpoint has {', '.join(found)} (or 'auto').")

    def rule(patcher_args):
        given = {**_PATCHER_DEFAULTS, **patcher_args}
        keys = {"entropy": ["threshold", "threshold_add", "monotonicity"], "static": ["patch_size"]}
        return {
            key: given[key] for key in ["patching_mode", "max_patch_length", *keys.get(given["patching_mode"], [])]
        }

    used, notes = rule(found[choice]), []
    for other in sorted(found.keys() - {choice, "args"}):
        if rule(found[other]) != used:
            notes.append(
                f"Patching settings disagree: {choice} says {used} (used), {other} says {rule(found[other])}. Choose "
                f"with `--patching {choice}` or `--patching {other}`."
            )
    default = _PATCHER_DEFAULTS["threshold"]
    if args["patch_in_forward"] and used.get("threshold", default) != default:
        notes.append(
            f"With `args.patch_in_forward` Meta's model patches with its default threshold, {default}, whatever the "
            f"files say; the converted model uses {used['threshold']}."
        )
    return found[choice], notes


__all__ = [
    "argument_files",
    "check_tokenizer",
    "choose_patcher_args",
    "config_from_meta_args",
    "entropy_is_fixed",
    "meta_args_from_config",
    "wrong_types_are_value_errors",
]
