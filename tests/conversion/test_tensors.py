"""Names of tensors: ours are the model's own, Meta's those of its files (test_checkpoints.py converts both ways)."""

import pytest
import torch

from blt_hf import BltForCausalLM
from blt_hf.conversion import tensor_specs
from helpers.models import tiny_config


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"encoder_config": {"num_cross_attention_heads": 4, "num_hidden_layers": 2, "cross_attn_all_layers": True}},
        {"decoder_config": {"num_key_value_heads": 1, "cross_attn_all_layers": False}, "cross_attn_k": 3},
        {"patch_in_forward": False, "encoder_hash_byte_group_nb_functions": 2},
        {"encoder_hash_byte_group_nb_functions": 0},
    ],
)
def test_specs_are_the_models_own_tensors(config):
    config = tiny_config(**config)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in BltForCausalLM(config).state_dict().items()}
    assert {spec.name: spec.shape for spec in tensor_specs(config)} == expected


def test_names_in_metas_files():
    sources = {spec.name: spec.sources for spec in tensor_specs(tiny_config(diffusion_block_size=4))}
    assert "mask_embedding.weight" not in sources
    wanted = {
        "model.patcher.layers.0.mlp.gate_proj.weight": "layers.0.feed_forward.w1.weight",
        "model.patcher.lm_head.weight": "output.weight",
        "model.local_encoder.embed_tokens.weight": "local_encoder.tok_embeddings.weight",
        "model.local_decoder.cross_attn_layers.0.q_proj.weight": "local_decoder.cross_attn_layers.0.wq.weight",
        "model.global_transformer.layers.0.input_layernorm.weight": "global_transformer.layers.0.attention_norm.weight",
        "lm_head.weight": "local_decoder.output.weight",
    }
    assert {name: sources[name] for name in wanted} == {name: (source,) for name, source in wanted.items()}
    tables = sources["model.encoder_hash_tok_embedding.weight"]
    assert tables[0] == "encoder_hash_tok_embedding.0.weight" and len(tables) > 1
