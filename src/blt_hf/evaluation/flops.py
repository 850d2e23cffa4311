"""Floating point operations for a byte of text, by the equations of the BLT paper (arXiv 2412.09871, eq. 13-17)."""

from dataclasses import dataclass, fields, replace

from ..model.configuration_blt import BltConfig


DEFAULT_CONTEXT_BYTES = 8192
DEFAULT_PATCH_BYTES = 4.5
DEFAULT_BYTES_PER_TOKEN = 4.4
"""Of Llama 3's tokenizer on the paper's training data."""

# Transformers with gated feed-forward layers and nothing else that multiplies matrices.
_TOKEN_MODEL_TYPES = (
    "gemma", "gemma2", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """Operations for a byte; a multiplication and an addition are two.

    Attributes:
        matmul: in matrix products with weights.
        attention: of queries with keys, and of attention weights with values.
    """

    matmul: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.matmul * factor, self.attention * factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class FlopsPerByte:
    """Operations for a byte, by part.

    Attributes:
        encoder, decoder: layers over bytes.
        global_transformer: layers over patches; of a token model, over tokens.
        encoder_cross, decoder_cross: cross attentions.
        head: logits.
        projections: pooled bytes to queries, latents to the global transformer, its states to latents, and to the
            entries of a lexicon. The paper leaves them out.
        patcher: the entropy model. The paper leaves it out.
    """

    encoder: Flops = Flops()
    global_transformer: Flops = Flops()
    decoder: Flops = Flops()
    encoder_cross: Flops = Flops()
    decoder_cross: Flops = Flops()
    head: Flops = Flops()
    projections: Flops = Flops()
    patcher: Flops = Flops()

    @property
    def parts(self) -> dict[str, Flops]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def paper(self) -> float:
        """The total of the paper's equations: all parts but `projections` and `patcher`."""
        return self.without_patcher - self.projections.total

    @property
    def without_patcher(self) -> float:
        """The total without the entropy model, as in training with precomputed patches."""
        return self.total - self.patcher.total

    @property
    def total(self) -> float:
        return sum(part.total for part in self.parts.values())

    def training(self) -> "FlopsPerByte":
        """Counts forward and backward, which costs twice a forward. The frozen entropy model runs forward only."""
        return replace(self, **{name: 3 * part for name, part in self.parts.items() if name != "patcher"})


def _self_attention_layers(config, positions: float, window: int | None) -> Flops:
    """Counts all layers of a stack for one position among `positions`.

    A position sees half of the others on average, itself included: `(m + 1) / 2` keys. So the paper counts windows
    too, though beyond the first window each position sees the whole of it.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries = config.num_attention_heads * head_size
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size
    projections = 2 * width * (2 * queries + 2 * keys)
    feed_forward = 3 * 2 * width * config.intermediate_size
    seen = positions if window is None else min(window, positions)
    return Flops(layers * (projections + feed_forward), layers * 4 * queries * (seen + 1) / 2)


def _cross_attention_layers(config, queries: float, keys: float, seen: float) -> Flops:
    """Counts all cross attentions of a local model for one byte.

    Args:
        queries, keys: how many a byte; `seen`: keys of each query.
    """
    width = config.hidden_size
    layers = config.num_hidden_layers if config.cross_attn_all_layers else 1
    heads, kv_heads = config.cross_attention_heads
    projections = 2 * width * (2 * width * queries + 2 * (width // heads * kv_heads) * keys)
    return Flops(layers * projections, layers * 4 * width * seen * queries)


def flops_per_byte(
    config,
    patch_bytes: float = DEFAULT_PATCH_BYTES,
    context_bytes: float = DEFAULT_CONTEXT_BYTES,
    bytes_per_token: float = DEFAULT_BYTES_PER_TOKEN,
) -> FlopsPerByte:
    """Counts the operations of a forward for each byte of a text.

    Feed-forward layers are counted with the three matrices that they have. The paper writes two matrices of width
    `4 h`; three of width `8 h / 3` cost the same.

    Args:
        config: a [`BltConfig`], a [`BltPatcherConfig`], or the config of a Llama-like token model.
        patch_bytes: mean bytes of a patch, as `blt-hf calibrate` and `blt-hf evaluate` print it for a text.
        context_bytes: bytes of the text; a token model gets `context_bytes / bytes_per_token` tokens.
        bytes_per_token: of a token model.
    Returns:
        [`FlopsPerByte`]; its method `training` adds the backward.
    Raises:
        ValueError: the config is of another kind of model, or a number is below 1.
    """
    given = {"patch_bytes": patch_bytes, "context_bytes": context_bytes, "bytes_per_token": bytes_per_token}
    for name, value in given.items():
        if not value >= 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    kind = getattr(config, "model_type", None)
    if kind == "blt":
        return _blt_flops(config, patch_bytes, context_bytes)
    if kind == "blt_patcher":
        layers = _self_attention_layers(config, context_bytes, config.sliding_window)
        return FlopsPerByte(decoder=layers, head=_head(config, config.vocab_size))
    if kind not in _TOKEN_MODEL_TYPES:
        raise ValueError(
            f"`config` is of type {kind!r}; FLOPs are known for 'blt', 'blt_patcher' and the token models "
            f"{', '.join(_TOKEN_MODEL_TYPES)}."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if window is not None and kinds and len(set(kinds)) > 1:
        raise ValueError("`config.layer_types` mixes layers with and without windows, which is not supported.")
    if window is not None and kinds and kinds[0] == "full_attention":
        window = None
    layers = _self_attention_layers(config, context_bytes / bytes_per_token, window)
    per_byte = 1 / bytes_per_token
    return FlopsPerByte(global_transformer=per_byte * layers, head=per_byte * _head(config, config.vocab_size))


def _head(config, vocab_size: int) -> Flops:
    return Flops(2 * config.hidden_size * vocab_size)


def _blt_flops(config: BltConfig, patch_bytes: float, context_bytes: float) -> FlopsPerByte:
    encoder, decoder, global_config = config.encoder_config, config.decoder_config, config.global_config
    patches, latents, window = 1 / patch_bytes, config.cross_attn_k, config.local_attention_window_len
    pooled = latents * encoder.hidden_size
    projections = 2 * encoder.hidden_size * pooled + 2 * global_config.hidden_size * latents * decoder.hidden_size
    if pooled != global_config.hidden_size:
        projections += 2 * pooled * global_config.hidden_size
    projections *= patches
    if decoder.lexicon_size:
        projections += 2 * global_config.hidden_size * decoder.lexicon_size * patches
        projections += 2 * decoder.hidden_size * (config.vocab_size + 2)
    patcher = Flops()
    if config.uses_patcher:
        patcher = _self_attention_layers(config.patcher_config, context_bytes, config.patcher_config.sliding_window)
        patcher = patcher + _head(config.patcher_config, config.patcher_config.vocab_size)
    # Each byte is a key of its own patch's queries, and of those of as many patches after it as the window says.
    encoder_seen = patch_bytes * (encoder.cross_attn_window or 1)
    decoder_seen = latents * (decoder.cross_attn_window or 1)
    return FlopsPerByte(
        encoder=_self_attention_layers(encoder, context_bytes, window),
        global_transformer=patches * _self_attention_layers(global_config, context_bytes * patches, None),
        decoder=_self_attention_layers(decoder, context_bytes, window),
        encoder_cross=_cross_attention_layers(encoder, latents * patches, 1, encoder_seen),
        decoder_cross=_cross_attention_layers(decoder, 1, latents * patches, decoder_seen),
        head=_head(decoder, config.vocab_size),
        projections=Flops(projections),
        patcher=patcher,
    )


def _blt_1b() -> BltConfig:
    return BltConfig(encoder_config={"intermediate_size": 2816})  # the defaults are the rest of its shape


def _blt_7b() -> BltConfig:
    local = {"hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 3584, "hidden_size_global": 4096}
    local["cross_attn_k"] = 4
    return BltConfig(
        cross_attn_k=4,
        encoder_config={**local, "num_hidden_layers": 1},
        decoder_config={**local, "num_hidden_layers": 6},
        global_config={
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "intermediate_size": 11008,
        },
    )


def _llama(**values):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **values)


PRESETS = {
    "blt-1b": _blt_1b,
    "blt-7b": _blt_7b,
    "llama-3-8b": lambda: _llama(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336),
    "llama-3.2-1b": lambda: _llama(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192),
}
"""Shapes by name: functions that make the config. `blt-7b` is the released model that the paper calls BLT-8B."""


def preset_config(name: str):
    """Makes the config of one of `PRESETS`.

    Raises:
        ValueError: there is no such name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]()


__all__ = ["PRESETS", "Flops", "FlopsPerByte", "flops_per_byte", "preset_config"]
