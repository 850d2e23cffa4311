"""Configuration of the Byte Latent Transformer: model types, fields and defaults of transformers' in-tree classes."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .names_blt import add_architectures, add_tasks, architecture_name, import_where_installed
from .patching_blt import PATCHING_MODES, VOCAB_SIZE, PatchingRule, find_rule


PATCH_POOLING_MODES = ("max", "mean", "min")

# Keys of real files that carry no information for us. `norm_eps` is not here: it is renamed to `rms_norm_eps`.
_LEGACY_KEYS = (
    # No released checkpoint has such a model; the model itself finds patches, on the device of the input.
    "pm_size", "realtime_patching", "patching_device", "patching_model_device", "device",
    # `attn_implementation` chooses the kernel when a model is loaded; masks follow from windows and `mask_documents`.
    "attn_impl", "attn_bias_type",
    # Those of `decoder_config`.
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
)  # fmt: skip


def _split_heads(attention: str) -> dict[str, str]:
    return {f"{attention}.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}


# Tensor-parallel plans: heads and feed-forward channels are split, everything between layers is whole.
_LAYERS_TP_PLAN = {
    **_split_heads("layers.*.self_attn"),
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _warn_of_unknown_fields(config: PreTrainedConfig, given: dict) -> None:
    """Warns of likely mistakes in `given`, the further arguments of a constructor, where `blt_hf` is installed."""
    module = import_where_installed("unknown_fields")
    if module is not None:
        module.warn_of_unknown_fields(config, given, _LEGACY_KEYS)


def _check_least(name: str, value: float | None, accepted: str, least: int = 1, or_none: bool = False) -> None:
    """Raises a `ValueError` unless `value` is at least `least`, which `accepted` says with its unit; or None."""
    is_enough = or_none if value is None else value >= least
    _check(is_enough, f"`{name}` must be {'None or ' if or_none else ''}at least {accepted}; got {value}.")


def _check_vocabulary(name: str, size: int) -> None:
    _check_least(f"{name}.vocab_size", size, f"{VOCAB_SIZE} (4 special ids and 256 bytes)", VOCAB_SIZE)


def _check_rope(name: str, rope_parameters: dict | None) -> None:
    kind = (rope_parameters or {}).get("rope_type", "default")
    accepted = ("default", *ROPE_INIT_FUNCTIONS)
    _check(kind in accepted, f"`{name}.rope_parameters['rope_type']` must be one of {sorted(accepted)}; got {kind!r}.")


class _SavedConfig(PreTrainedConfig):
    """Saves a file that names architectures which transformers does not have, where code travels along."""

    def save_pretrained(self, *args, **kwargs):
        if self._auto_class is not None and self.architectures:
            self.architectures = [architecture_name(name) for name in self.architectures]
        return super().save_pretrained(*args, **kwargs)


class _BltComponentConfig(_SavedConfig):
    """Holds the fields of all four transformer stacks, the sizes that follow from them, and their validation."""

    base_model_tp_plan = _LAYERS_TP_PLAN

    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    dropout: float | int | None = 0.0
    rope_parameters: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if (norm_eps := kwargs.pop("norm_eps", None)) is not None:
            self.rms_norm_eps = norm_eps
        name = type(self).__name__
        _check(
            self.hidden_size > 0 and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0,
            f"`{name}.hidden_size` must be a positive multiple of `num_attention_heads`; got "
            f"{self.hidden_size} and {self.num_attention_heads}.",
        )
        _check_least(f"{name}.num_hidden_layers", self.num_hidden_layers, "1")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or int(8 * self.hidden_size / 3)
        self.tie_word_embeddings = False
        kwargs.pop("head_dim", None)
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"`{name}.num_attention_heads` must be a multiple of `num_key_value_heads`; got "
            f"{self.num_attention_heads} and {self.num_key_value_heads}.",
        )
        _check(
            self.head_dim % 2 == 0,
            f"`{name}`: rotary embeddings rotate pairs, so the head size must be even; got {self.head_dim} "
            f"(`hidden_size` {self.hidden_size} / `num_attention_heads` {self.num_attention_heads}).",
        )
        _check_least(f"{name}.sliding_window", getattr(self, "sliding_window", None), "1 byte", or_none=True)
        if hasattr(self, "vocab_size"):
            _check_vocabulary(name, self.vocab_size)
        _check(
            self.dropout is None or 0 <= self.dropout < 1,
            f"`{name}.dropout` must be a probability, from 0 to less than 1; got {self.dropout}.",
        )
        _check(
            self.hidden_act in ACT2FN,
            f"`{name}.hidden_act` must be one of {sorted(ACT2FN)}; got {self.hidden_act!r}.",
        )
        _warn_of_unknown_fields(self, kwargs)
        super().__post_init__(**kwargs)
        _check_rope(name, self.rope_parameters)


class _BltLocalConfig(_BltComponentConfig):
    """Adds the fields of the two stacks over bytes, which have cross attention."""

    base_model_tp_plan = {**_LAYERS_TP_PLAN, **_split_heads("cross_attn_layers.*")}
    default_theta = 500000.0

    vocab_size: int = VOCAB_SIZE
    cross_attn_k: int | None = 2
    hidden_size_global: int | None = 2048
    hidden_size: int = 1024
    num_attention_heads: int = 16
    max_position_embeddings: int = 24576
    hidden_act: str = "silu"
    num_cross_attention_heads: int | None = None
    num_cross_key_value_heads: int | None = None
    cross_attn_window: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        name, (heads, kv_heads) = type(self).__name__, self.cross_attention_heads
        _check_least(f"{name}.cross_attn_k", self.cross_attn_k, "1 latent a patch")
        _check(
            heads > 0 and self.hidden_size % heads == 0 and kv_heads > 0 and heads % kv_heads == 0,
            f"`{name}`: the cross-attention heads must divide `hidden_size` and be a multiple of their key/value "
            f"heads; got {heads} heads and {kv_heads} key/value heads for width {self.hidden_size}.",
        )
        _check_least(f"{name}.cross_attn_window", self.cross_attn_window, "1 patch", or_none=True)

    @property
    def cross_attention_window(self) -> int:
        """Patches that a cross attention reads, after the default is applied."""
        return self.cross_attn_window or 1

    @property
    def num_cross_attention_layers(self) -> int:
        return self.num_hidden_layers if self.cross_attn_all_layers else 1

    @property
    def cross_attention_heads(self) -> tuple[int, int]:
        """`(heads, key/value heads)` of the cross attention, after the defaults are applied."""
        if self.num_cross_attention_heads is None:
            return self.num_attention_heads, self.num_cross_key_value_heads or self.num_key_value_heads
        return self.num_cross_attention_heads, self.num_cross_key_value_heads or self.num_cross_attention_heads


@strict
class BltLocalEncoderConfig(_BltLocalConfig):
    """Configures the stack that turns bytes into patches.

    Fields as in transformers' `BltLocalEncoderConfig`; in addition:
        num_cross_attention_heads: heads of the cross attention; None: `num_attention_heads`.
        num_cross_key_value_heads: its key/value heads; None: `num_key_value_heads`, or as many as
            `num_cross_attention_heads` when that is given.
        cross_attn_window: patches whose bytes a patch reads, itself and those before; None: 1.
        patch_pooling: how the bytes of a patch become its first query: `max`, `mean` or `min`.
    """

    model_type = "blt_local_encoder"

    cross_attn_all_layers: bool | None = False
    num_hidden_layers: int = 1
    intermediate_size: int | None = None
    sliding_window: int | None = None
    patch_pooling: str = "max"

    def __post_init__(self, **kwargs):
        _check(
            self.patch_pooling in PATCH_POOLING_MODES,
            f"`patch_pooling` must be one of {PATCH_POOLING_MODES}; got {self.patch_pooling!r}.",
        )
        super().__post_init__(**kwargs)


@strict
class BltLocalDecoderConfig(_BltLocalConfig):
    """Configures the stack that turns patches into bytes.

    Fields as in transformers' `BltLocalDecoderConfig`; in addition `num_cross_attention_heads`,
    `num_cross_key_value_heads` and `cross_attn_window` (patches a byte reads, the last closed one and those before),
    as in [`BltLocalEncoderConfig`], and:
        lexicon_size: entries of the decoder's lexicon ([`BltLexicon`]); 0: it has none.
        lexicon_top_k: entries that are kept for each patch, the most probable ones; four numbers each, which must fit into
            the keys and values of a patch for one cross attention.
        lexicon_length: ids of the longest spelling of an entry; longer spellings are cut.
        lexicon_reads: the lexicon reads patches, too; one that is an entry enters the global transformer as its key.
    """

    model_type = "blt_local_decoder"

    lexicon_size: int = 0
    lexicon_top_k: int = 32
    lexicon_length: int = 12
    lexicon_reads: bool = False
    cross_attn_all_layers: bool | None = True
    num_hidden_layers: int = 9
    intermediate_size: int = 2816
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        limits = {"lexicon_size": (0, 256**3)}
        if self.lexicon_size:
            heads, kv_heads = self.cross_attention_heads
            # A patch's top-k entries, four numbers each, are cached like one more cross attention's keys and values.
            most = self.cross_attn_k * kv_heads * (self.hidden_size // heads) // 2
            limits["lexicon_top_k"] = 1, min(most, self.lexicon_size)
            limits["lexicon_length"] = 1, 2**15
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            is_allowed = least <= value <= most
            _check(is_allowed, f"`BltLocalDecoderConfig.{name}` must be from {least} to {most}; got {value}.")
        _check(
            not self.lexicon_reads or self.lexicon_size,
            "`BltLocalDecoderConfig.lexicon_reads` must be False without a lexicon (`lexicon_size` 0); got True.",
        )

    @property
    def lexicon_history(self) -> int:
        """How many ids before a byte the lexicon looks back at."""
        return 0 if not self.lexicon_size else self.lexicon_length * (1 + self.lexicon_reads)


@strict
class BltGlobalTransformerConfig(_BltComponentConfig):
    """Configures the transformer over patches; fields as in transformers' `BltGlobalTransformerConfig`."""

    model_type = "blt_global_transformer"
    default_theta = 500000.0

    hidden_size: int = 2048
    num_attention_heads: int = 16
    num_hidden_layers: int = 25
    max_position_embeddings: int = 4096
    hidden_act: str = "silu"
    intermediate_size: int = 5632
    tie_word_embeddings: bool = False


@strict
class BltPatcherConfig(_BltComponentConfig):
    """Configures the entropy model, a causal byte LM.

    Fields as in transformers' `BltPatcherConfig`; in addition `use_cache` (for its own generation),
    `mask_documents` (an `eos` ends a document, later bytes do not see it) and the special ids.
    """

    model_type = "blt_patcher"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 768
    num_hidden_layers: int = 14
    num_attention_heads: int = 12
    max_position_embeddings: int = 8192
    intermediate_size: int = 2048
    tie_word_embeddings: bool = False
    sliding_window: int | None = 512
    use_cache: bool = True
    mask_documents: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.hidden_act = "silu"
        kwargs.pop("hidden_act", None)
        super().__post_init__(**kwargs)


def _of_decoder(name: str) -> property:
    """Makes a property that answers with the local decoder's value."""
    return property(lambda self: getattr(self.decoder_config, name))


@strict
class BltConfig(_SavedConfig):
    """Configures a Byte Latent Transformer.

    Fields, defaults and file format are those of transformers' in-tree `BltConfig`. Some belong to that format alone:
    nothing here computes with `initializer_range`, `patching_batch_size` and the `rope_parameters` at the top. Fields
    that the in-tree class lacks default to its behaviour:

        patching_mode (default `"entropy"`): `"entropy"`, `"space"`, `"static"` (every `patch_size` bytes), `"byte"`, or
            the name of a rule that was given to [`register_patching_rule`].
        monotonicity (default False): a patch starts where the entropy rises by more than `patching_threshold`.
        patching_threshold_add (default None): nats; a patch starts where the entropy is above `patching_threshold` and
            rises by more than this.
        max_patch_length (default None): bytes; longer patches are split.
        patching_newline_reset (default False): the entropy model forgets the bytes before each newline.
        mask_documents (default False): an `eos` inside a row ends a document; attention does not cross it, while
            hashes and patch starts run on (as Meta's reference does in training).
        diffusion_block_size (default None): bytes of a block that the decoder learns to fill in at once (BLT-D, see
            `blt_hf.fast_blt`). None: there is no mask embedding, and only the next byte is learned.
        diffusion_loss_weight (default 1.0): factor of the masked loss; with 0, training reads no blocks.

    `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim` and
    `intermediate_size` are those of the local decoder, whose states a model returns. Files do not hold them.

    Raises:
        ValueError: at construction, for values and combinations that no model can be built from.
    """

    model_type = "blt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    default_theta = 500000.0
    # transformers 5.17 reads `sub_configs`, 5.23 `sub_configs_defaults`: alone, when that is the oldest supported.
    sub_configs = {
        "patcher_config": BltPatcherConfig,
        "encoder_config": BltLocalEncoderConfig,
        "decoder_config": BltLocalDecoderConfig,
        "global_config": BltGlobalTransformerConfig,
    }
    sub_configs_defaults = dict(sub_configs)

    vocab_size: int = VOCAB_SIZE
    max_position_embeddings: int = 4096
    patch_in_forward: bool | None = True
    patch_size: int | float | None = 4
    patching_mode: str | None = "entropy"
    patching_threshold: float | int | None = 1.335442066192627
    patching_batch_size: int | None = 1
    max_patch_length: int | None = None
    local_attention_window_len: int | None = 512
    cross_attn_k: int | None = 2
    encoder_hash_byte_group_size: list[int] | None = None
    encoder_hash_byte_group_vocab: int | None = 500002
    encoder_hash_byte_group_nb_functions: int | None = 1
    patcher_config: dict | PreTrainedConfig | None = None
    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    global_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    monotonicity: bool = False
    patching_threshold_add: float | int | None = None
    patching_newline_reset: bool = False
    mask_documents: bool = False
    diffusion_block_size: int | None = None
    diffusion_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        _check_vocabulary("BltConfig", self.vocab_size)
        for key in _LEGACY_KEYS:
            kwargs.pop(key, None)
        kwargs.pop("norm_eps", None)  # each component has its own `rms_norm_eps`
        for name, config_class in self.sub_configs.items():
            component = getattr(self, name)
            if component is None or isinstance(component, dict):
                inherited = {"initializer_range": self.initializer_range}
                if name in ("encoder_config", "decoder_config"):
                    inherited["vocab_size"] = self.vocab_size
                component = {**inherited, **(component or {})}
                component.pop("model_type", None)
                setattr(self, name, config_class(**component))
            elif not isinstance(component, config_class):
                # In-tree configuration objects hold the same fields.
                if getattr(component, "model_type", None) != config_class.model_type:
                    raise ValueError(f"`{name}` must be a dict or a {config_class.__name__}; got {type(component)}.")
                setattr(self, name, config_class.from_dict(component.to_dict()))
        self.encoder_hash_byte_group_size = self.encoder_hash_byte_group_size or [3, 4, 5, 6, 7, 8]
        self.encoder_config.sliding_window = self.local_attention_window_len
        _check_least("cross_attn_k", self.cross_attn_k, "1 latent a patch")
        pooled_size = self.encoder_config.hidden_size * self.cross_attn_k
        is_projected = pooled_size != self.global_config.hidden_size
        self.global_config.encoder_cross_output_size = pooled_size if is_projected else None
        self.patcher_config.mask_documents = self.mask_documents
        _warn_of_unknown_fields(self, kwargs)
        super().__post_init__(**kwargs)
        _check_rope("BltConfig", self.rope_parameters)
        self._validate_components()
        self.validate_patching()
        size, window = self.diffusion_block_size, self.local_attention_window_len
        _check(
            size is None or (size >= 1 and (window is None or size <= window)),
            "`diffusion_block_size` must be None or at least 1 byte, and at most `local_attention_window_len`; got "
            f"{size} and a window of {window} bytes.",
        )
        _check(
            size is None or not self.decoder_config.lexicon_size,
            "`diffusion_block_size` must be None with a lexicon (`decoder_config.lexicon_size`), which reads bytes that "
            f"blocks hide; got {size} and a lexicon of {self.decoder_config.lexicon_size} entries.",
        )
        _check(
            self.diffusion_loss_weight >= 0,
            f"`diffusion_loss_weight` must be 0 or more; got {self.diffusion_loss_weight}.",
        )

    def _validate_components(self) -> None:
        encoder, decoder = self.encoder_config, self.decoder_config
        _check(
            self.cross_attn_k == encoder.cross_attn_k == decoder.cross_attn_k,
            "`cross_attn_k` must be the same in the three places that hold it; got "
            f"{self.cross_attn_k} at the top, {encoder.cross_attn_k} in `encoder_config` and "
            f"{decoder.cross_attn_k} in `decoder_config`.",
        )
        _check(
            encoder.vocab_size == self.vocab_size,
            f"`vocab_size` must be the same at the top and in `encoder_config`; got {self.vocab_size} and "
            f"`encoder_config.vocab_size={encoder.vocab_size}`.",
        )
        _check(
            encoder.hidden_size == decoder.hidden_size,
            "the local decoder starts from the encoder's byte states, so `encoder_config.hidden_size` and "
            f"`decoder_config.hidden_size` must agree; got {encoder.hidden_size} and {decoder.hidden_size}.",
        )
        _check(
            decoder.hidden_size_global == self.global_config.hidden_size,
            "`decoder_config.hidden_size_global` must equal `global_config.hidden_size`; got "
            f"{decoder.hidden_size_global} and {self.global_config.hidden_size}.",
        )
        _check_least("local_attention_window_len", self.local_attention_window_len, "1 byte", or_none=True)
        sizes = self.encoder_hash_byte_group_size
        _check(
            all(isinstance(size, int) and size >= 1 for size in sizes),
            f"`encoder_hash_byte_group_size` must hold n-gram sizes of at least 1; got {sizes}.",
        )
        _check_least("encoder_hash_byte_group_vocab", self.encoder_hash_byte_group_vocab, "1 row")
        _check(
            self.encoder_hash_byte_group_nb_functions is not None and self.encoder_hash_byte_group_nb_functions >= 0,
            "`encoder_hash_byte_group_nb_functions` must be 0 (no hash embeddings) or more; got "
            f"{self.encoder_hash_byte_group_nb_functions}.",
        )

    def validate_patching(self) -> None:
        """Checks the patching rule.

        Raises:
            ValueError: names the field, its value and the accepted ones.
        """
        if self.patching_mode not in PATCHING_MODES:
            find_rule(self.patching_mode)
        for name in ("patching_threshold", "patching_threshold_add"):
            value = getattr(self, name)
            _check(
                value is None or not math.isnan(value),
                f"`{name}` must be a number of nats; got {value}, with which no comparison is ever true.",
            )
        if self.patching_mode == "entropy":
            _check(
                self.patching_threshold is not None,
                "`patching_mode='entropy'` needs `patching_threshold` (nats); got None.",
            )
            _check(
                not (self.monotonicity and self.patching_threshold_add is not None),
                "`monotonicity` and `patching_threshold_add` are two different rules; set one of them, got "
                f"monotonicity=True and patching_threshold_add={self.patching_threshold_add}.",
            )
        else:
            self._check_is_off("monotonicity", False)
            self._check_is_off("patching_threshold_add", None)
        if not self.uses_patcher:
            self._check_is_off("patching_newline_reset", False)
        if self.patching_mode == "static":
            _check(
                self.patch_size is not None and self.patch_size >= 1 and int(self.patch_size) == self.patch_size,
                f"`patching_mode='static'` needs a whole `patch_size` of at least 1 byte; got {self.patch_size}.",
            )
        _check_least("max_patch_length", self.max_patch_length, "1 byte", or_none=True)

    def _check_is_off(self, name: str, off: bool | None) -> None:
        _check(
            getattr(self, name) == off,
            f"`{name}` belongs to `patching_mode='entropy'`; got {name}={getattr(self, name)} with "
            f"patching_mode={self.patching_mode!r}.",
        )

    def __setattr__(self, name, value):
        # Resizing a model's embeddings sets `vocab_size` here only; files hold the size in these parts as well.
        if name == "vocab_size":
            for part in (self.__dict__.get("encoder_config"), self.__dict__.get("decoder_config")):
                if isinstance(part, PreTrainedConfig) and part.vocab_size == self.vocab_size:
                    part.vocab_size = value
        super().__setattr__(name, value)

    @property
    def uses_patcher(self) -> bool:
        """Whether the patching rule reads entropies, which the entropy model computes."""
        return PatchingRule(self.patching_mode).uses_entropies

    @property
    def has_patcher(self) -> bool:
        """Whether the model has an entropy model of its own that the patching rule reads."""
        return bool(self.uses_patcher and self.patch_in_forward)

    hidden_size = _of_decoder("hidden_size")
    num_hidden_layers = _of_decoder("num_hidden_layers")
    num_attention_heads = _of_decoder("num_attention_heads")
    num_key_value_heads = _of_decoder("num_key_value_heads")
    head_dim = _of_decoder("head_dim")
    intermediate_size = _of_decoder("intermediate_size")


# Code of a checkpoint: TRL, Trainer and `transformers serve` look a class up by its name once the configuration is read.
if __name__.startswith("transformers_modules."):
    add_architectures()
    add_tasks()

__all__ = [
    "BltConfig",
    "BltGlobalTransformerConfig",
    "BltLocalDecoderConfig",
    "BltLocalEncoderConfig",
    "BltPatcherConfig",
]
