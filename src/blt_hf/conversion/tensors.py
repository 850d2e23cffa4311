"""Meta's tensor names, and the tensors of ours that they hold."""

import copy
from dataclasses import dataclass

import torch

from ..model.configuration_blt import BltConfig
from ..model.modeling_blt import BltForCausalLM


# Parts of our names and of Meta's; other parts have the same name.
_META_NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn": "attention",
    "mlp": "feed_forward",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
    "lm_head": "output",
}
_HASHES = "model.encoder_hash_tok_embedding.weight"
_PATCHER = "model.patcher."


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of ours and Meta's tensor that holds it, or several that follow each other along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    in_patcher: bool = False

    @property
    def source_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // max(len(self.sources), 1), *self.shape[1:])


def tensor_specs(config: BltConfig) -> list[TensorSpec]:
    """Returns every tensor of a checkpoint, with its shape and its name in Meta's files.

    Names and shapes are those of a model without weights. Meta has no mask embedding (Fast BLT).
    """
    with torch.device("meta"):
        state = BltForCausalLM(copy.deepcopy(config)).state_dict()
    num_tables = config.encoder_hash_byte_group_nb_functions * len(config.encoder_hash_byte_group_size)
    specs = []
    for name, tensor in state.items():
        if name == "mask_embedding.weight":
            continue
        sources = (_meta_name(name),)
        if name == _HASHES:
            sources = tuple(f"encoder_hash_tok_embedding.{table}.weight" for table in range(num_tables))
        specs.append(TensorSpec(name, tuple(tensor.shape), sources, name.startswith(_PATCHER)))
    return specs


def _meta_name(name: str) -> str:
    if name == "lm_head.weight":
        return "local_decoder.output.weight"
    name = name.removeprefix(_PATCHER).removeprefix("model.")
    return ".".join(_META_NAMES.get(part, part) for part in name.split("."))


__all__ = ["TensorSpec", "tensor_specs"]
