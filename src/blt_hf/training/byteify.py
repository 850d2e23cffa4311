"""From a token model to a BLT: the global transformer starts from the layers of a pretrained Llama.

Source: arXiv 2412.09871, section 6.2 ("byteifying" Llama 3): the global transformer from the token model's weights, with
a tenth of the learning rate of the local models, which have random weights.
"""

import copy
import math

import torch
from torch import Tensor, nn

from ..model.configuration_blt import BltConfig
from ..model.layers_blt import NO_SPELLING, BltLexicon, prefix_hashes
from ..model.modeling_blt import BltForCausalLM, BltPatcher
from ..model.patching_blt import BOS_TOKEN_ID, PatchingRule
from ..tokenizer.encoding import byte_ids
from .token_models import TokenAlphabet


GLOBAL_LEARNING_RATE_SCALE = 0.1
_TOKEN_MODEL_TYPES = ("llama", "mistral")

_SAMPLE = (
    "A text of some length, with words of many letters and of few. In 1871, 3.5 million people lived there; how many were "
    "they in 1901?\n\n    for index, name in enumerate(names):\n        print(index, name)  # one line each\n"
)

_LAYER_TENSORS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_REFUSED_TENSORS = {
    "bias": "biases (BLT's layers have none)",
    "q_norm": "norms of queries and keys (`q_norm`, `k_norm`)",
    "k_norm": "norms of queries and keys (`q_norm`, `k_norm`)",
}


def byteify(
    token_model: nn.Module,
    config: BltConfig | None = None,
    patcher: BltPatcher | None = None,
    alphabet: TokenAlphabet | None = None,
    **overrides,
) -> BltForCausalLM:
    """Makes a BLT whose global transformer has the layers of `token_model`; the rest is new.

    Queries and keys are reordered: Llama rotates the two halves of a head, BLT pairs of neighbours. Embeddings and head
    are not used. BLT's global transformer has no final norm. The weight of the token model's final norm is multiplied
    into the columns of the decoder's patch projection; its normalisation is not needed, because every latent is
    normalised when it is read.

    With `lexicon_size`, the entries of the decoder's lexicon are the tokens: its keys are the rows of the head, and its
    norm is the final norm. So the entries that it ranks first are what the token model would write. With `lexicon_reads`,
    for which the head must hold the token embeddings, a patch that is a token enters the layers as that token's embedding.

    Patches reach the layers at the scale of the token embeddings that they replace: the weights that make them are
    multiplied so that both have the same root mean square. At a larger scale they would drown the layers' results.

    Args:
        token_model: a model of type llama or mistral, with or without its head.
        config: of the new BLT; None: [`byteify_config`] with `overrides`.
        patcher: the entropy model; None with patching modes that need none.
        alphabet: how tokens are spelled; a lexicon needs it.
        overrides: fields of [`BltConfig`] for [`byteify_config`]; not together with `config`.
    Returns:
        [`BltForCausalLM`] in the dtype of `token_model` and on its device.
    Raises:
        ValueError: the token model has a part that a BLT cannot hold, the shapes differ, or an entropy model is
            missing.
    """
    base = _base_model(token_model)
    if config is not None and overrides:
        raise ValueError(f"pass either `config` or single fields of it; got both, with {', '.join(overrides)}.")
    if config is None:
        config = byteify_config(base.config, patcher=patcher, **overrides)
    config = copy.deepcopy(config)
    _check_shapes(_global_fields(base.config), config)
    if config.uses_patcher and patcher is None:
        raise ValueError(
            "`patching_mode='entropy'` needs a trained entropy model: pass `patcher`, or another mode, such as "
            "patching_mode='space'."
        )
    weights = _layer_weights(base)
    if patcher is not None and config.uses_patcher:
        config.patcher_config = copy.deepcopy(patcher.config)
    reference = base.layers[0].input_layernorm.weight
    model = BltForCausalLM(config).to(device=reference.device, dtype=reference.dtype)
    if patcher is not None and config.uses_patcher:
        model.set_patcher(copy.deepcopy(patcher))  # in its own dtype, so that its patches stay
    with torch.no_grad():
        model.model.global_transformer.layers.load_state_dict(weights)
        # Each column of the projection reads one channel of the state, so scaling columns is scaling channels.
        model.model.local_decoder.patch_embedding_projection.weight.mul_(base.norm.weight)
    if (lexicon := model.model.local_decoder.lexicon) is not None:
        _fill_lexicon(lexicon, token_model, alphabet)
    _scale_patches(model, base.embed_tokens.weight)
    return model


@torch.no_grad()
def _fill_lexicon(lexicon: BltLexicon, token_model: nn.Module, alphabet: TokenAlphabet | None) -> None:
    """Makes the tokens of a token model the entries of a lexicon; without a head, tokens are ranked by its embeddings."""
    if alphabet is None:
        raise ValueError("`lexicon_size` needs `alphabet`, which says how the tokens are spelled; got None.")
    base, head = _base_model(token_model), token_model.get_output_embeddings()
    keys, size = (base.embed_tokens if head is None else head).weight, lexicon.keys.num_embeddings
    for name, count in (("token_model", len(keys)), ("alphabet", len(alphabet.ids))):
        if size != count:
            raise ValueError(f"`lexicon_size` must be 0 or the number of tokens of `{name}`, {count}; got {size}.")
    if hasattr(lexicon, "index") and not torch.equal(keys, base.embed_tokens.weight):
        raise ValueError(
            "`lexicon_reads` must be False for a `token_model` whose head does not hold its embeddings; got True."
        )
    lexicon.keys.weight.copy_(keys)
    lexicon.norm.weight.copy_(base.norm.weight)
    spell_lexicon(lexicon, alphabet.table(lexicon.spellings.shape[1] + 1))


@torch.no_grad()
def spell_lexicon(lexicon: BltLexicon, spellings: Tensor) -> None:
    """Gives the entries of a lexicon their spellings, ids `(size, N)` padded with -1.

    What is longer than `lexicon_length` is cut, and no patch is read by it.
    """
    length = lexicon.spellings.shape[1]
    spellings = nn.functional.pad(spellings, (0, max(length + 1 - spellings.shape[1], 0)), value=-1).long()
    lexicon.spellings.copy_(spellings[:, :length])
    if not hasattr(lexicon, "index"):
        return
    lengths = (spellings >= 0).sum(dim=1, keepdim=True)
    hashes = prefix_hashes(spellings[:, :length], length).gather(1, (lengths - 1).clamp(0, length - 1))
    hashes = hashes.masked_fill((lengths < 1) | (lengths > length), NO_SPELLING)[:, 0]
    for buffer, values in zip((lexicon.index.hashes, lexicon.index.entries), hashes.sort(stable=True)):
        buffer.copy_(values)


@torch.no_grad()
def _scale_patches(model: BltForCausalLM, embeddings: Tensor) -> None:
    """Gives the input of the global transformer the root mean square of `embeddings`."""
    if embeddings.is_meta:
        return
    was_training = model.training
    model.eval()
    ids = torch.tensor([[BOS_TOKEN_ID, *byte_ids(_SAMPLE)]], device=embeddings.device)
    states = model.model(ids, output_hidden_states=True, use_cache=False).global_hidden_states[0]
    model.train(was_training)
    ratio = embeddings.float().square().mean().sqrt() / states.float().square().mean().sqrt()
    encoder, projection = model.model.local_encoder, model.model.global_transformer.token_embedding_projection
    if isinstance(projection, nn.Linear):
        projection.weight.mul_(ratio)
        return
    # Queries of the cross attention are normed, so latents grow with these two alone.
    encoder.patch_embedding_projection.weight.mul_(ratio)
    for cross in encoder.cross_attn_layers:
        cross.o_proj.weight.mul_(ratio)


def byteify_config(token_config, patcher: BltPatcher | None = None, **overrides) -> BltConfig:
    """Makes the config of a BLT around the layers of a token model.

    The local models have a quarter of the width, 4 latents a patch, one encoder layer, and one decoder layer for every
    five layers of the token model. These proportions are near those of the released 7B.

    Args:
        token_config: of a model of type llama or mistral.
        patcher: the entropy model; its config becomes `patcher_config`.
        overrides: fields of [`BltConfig`] to set; a dict for a component sets single fields of it.
    Raises:
        ValueError: the token model has a part that a BLT cannot hold.
    """
    shape = _global_fields(token_config)
    head_size = shape["hidden_size"] // shape["num_attention_heads"]
    latents = overrides.get("cross_attn_k", 4)
    width = max(shape["hidden_size"] // 4 // head_size, 1) * head_size
    local = {
        "hidden_size": width,
        "num_attention_heads": width // head_size,
        "intermediate_size": 64 * math.ceil(8 * width / 3 / 64),
        "rms_norm_eps": shape["rms_norm_eps"],
        "cross_attn_k": latents,
        "hidden_size_global": shape["hidden_size"],
    }
    fields = {
        "cross_attn_k": latents,
        "encoder_config": {**local, "num_hidden_layers": 1},
        "decoder_config": {**local, "num_hidden_layers": math.ceil(shape["num_hidden_layers"] / 5)},
        "global_config": shape,
    }
    if patcher is not None:
        fields["patcher_config"] = copy.deepcopy(patcher.config)
    elif not PatchingRule(overrides.get("patching_mode", "entropy")).uses_entropies:
        fields["patch_in_forward"] = False
    for name, value in overrides.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return BltConfig(**fields)


def byteify_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    global_scale: float = GLOBAL_LEARNING_RATE_SCALE,
    weight_decay: float = 0.1,
) -> list[dict]:
    """Makes parameter groups for an optimizer: layers from the token model learn `global_scale` times as fast.

    These are the layers of the global transformer; its input projection is new and learns as the local models do.
    Norms and biases get no weight decay. Frozen parameters, such as the entropy model's, are in no group.

    Returns:
        groups with `params`, `lr`, `weight_decay` and `name`, empty ones left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "global" if "global_transformer.layers." in name else "local"
        decays = parameter.dim() > 1 and "norm" not in name
        groups.setdefault((part, decays), []).append(parameter)
    if not any(part == "global" for part, _ in groups):
        raise ValueError("`model` has no global transformer that trains.")
    rates = {"global": learning_rate * global_scale, "local": learning_rate}
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{part}{'' if decays else ', no decay'}",
        }
        for (part, decays), parameters in groups.items()
    ]


def byteify_optimizer(
    model: nn.Module,
    learning_rate: float,
    global_scale: float = GLOBAL_LEARNING_RATE_SCALE,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> tuple[type[torch.optim.Optimizer], dict]:
    """Returns AdamW with [`byteify_parameter_groups`], for `Trainer(optimizer_cls_and_kwargs=...)`.

    The schedule of `TrainingArguments` then scales the rate of each group.
    """
    groups = byteify_parameter_groups(model, learning_rate, global_scale, weight_decay)
    return torch.optim.AdamW, {"params": groups, "lr": learning_rate, "betas": betas, "eps": eps}


def interleave_rotary_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders the rows of a query or key projection for BLT's rotation, `(H * D, W)` -> `(H * D, W)`.

    Llama rotates row `i` of a head with row `i + D / 2`, BLT row `2i` with row `2i + 1`, by the same angle. Queries and
    keys are reordered in the same way, so their products stay the same.

    Example: heads of 4 rows, `0 1 2 3 -> 0 2 1 3`.
    """
    halves = weight.view(num_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _base_model(token_model: nn.Module) -> nn.Module:
    kind = getattr(getattr(token_model, "config", None), "model_type", None)
    base = getattr(token_model, "base_model", token_model)
    if kind is None or not hasattr(base, "layers") or not hasattr(base, "norm"):
        raise ValueError(f"`token_model` must be a Llama-style model; got {type(token_model).__name__}.")
    _check_tensors(base)  # first, since the names of wrong tensors say more than the model type
    return base


def _check_tensors(base: nn.Module) -> None:
    for name in base.layers.state_dict():
        for part, what in _REFUSED_TENSORS.items():
            if part in name:
                raise ValueError(f"`token_model` has {what}: layers.{name}. A BLT cannot hold them.")


def _global_fields(config) -> dict:
    """Translates the config of a token model to the fields of the global transformer's config."""
    kind = getattr(config, "model_type", None)
    if kind not in _TOKEN_MODEL_TYPES:
        raise ValueError(
            f"`token_model` is of type {kind!r}; accepted are {', '.join(_TOKEN_MODEL_TYPES)}, whose layers compute "
            "what BLT's do."
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise ValueError(f"`token_model` has biases (`{field}=True`); BLT's layers have none.")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"`token_model` has a sliding window of {config.sliding_window} tokens; BLT's global transformer sees all "
            "patches. Set `token_model.config.sliding_window = None` if you accept that."
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"`token_model` has {config.num_attention_heads} heads of size {head_size}, which is not its width, "
            f"{config.hidden_size}; BLT's heads are the width divided by their number."
        )
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"`token_model` rotates a part of each head (`partial_rotary_factor` {rope['partial_rotary_factor']}); "
            "BLT rotates all of it."
        )
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
    }


def _check_shapes(shape: dict, config: BltConfig) -> None:
    given = config.global_config
    different = [
        f"`{name}` {getattr(given, name)} (token model: {value})"
        for name, value in shape.items()
        if name not in ("max_position_embeddings", "rope_parameters") and getattr(given, name) != value
    ]
    rope = {name: value for name, value in given.rope_parameters.items() if value is not None}
    if rope != {name: value for name, value in shape["rope_parameters"].items() if value is not None}:
        different.append(f"`rope_parameters` {given.rope_parameters} (token model: {shape['rope_parameters']})")
    if different:
        raise ValueError(f"`config.global_config` does not fit the token model: {', '.join(different)}.")


def _layer_weights(base: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of the global transformer's layers by name."""
    config, state = base.config, base.layers.state_dict()
    expected = {f"{index}.{name}" for index in range(config.num_hidden_layers) for name in _LAYER_TENSORS}
    if state.keys() != expected:
        wrong = sorted(state.keys() ^ expected)
        raise ValueError(f"the layers of `token_model` are not those of a Llama; see {', '.join(wrong[:4])}.")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return {
        name: interleave_rotary_rows(weight, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else weight
        for name, weight in state.items()
    }


__all__ = [
    "GLOBAL_LEARNING_RATE_SCALE",
    "byteify",
    "byteify_config",
    "byteify_optimizer",
    "byteify_parameter_groups",
    "interleave_rotary_rows",
]
