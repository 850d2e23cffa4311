"""Building blocks: a projection is called as a module, so whoever changes what calling it does is honoured."""

from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM


BUNDLED = Path(__file__).parents[2] / "pretrained" / "blt-5m"
IDS = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(0))


def _logits(model, ids=IDS):
    """Logits of a whole forward, and of the last byte read by itself."""
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        output = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=output.past_key_values, use_cache=True).logits
    return whole, last


@pytest.mark.parametrize("offload", ["cpu", "disk", "device_map"])
def test_offloaded_weights_give_the_same_logits(offload, tmp_path):
    """accelerate keeps the weights of an offloaded module on `meta`, and loads them when the module is called."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    expected, text = _logits(model), model.generate(IDS, max_new_tokens=8, do_sample=False)
    if offload == "cpu":
        accelerate.cpu_offload(model)
    elif offload == "disk":
        accelerate.disk_offload(model, tmp_path / "offload")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            BUNDLED, device_map="auto", max_memory={"cpu": "12MB"}, offload_folder=tmp_path / "offload"
        )
        assert any(parameter.is_meta for parameter in model.parameters())
    for _ in range(3):
        for found, logits in zip(_logits(model), expected):
            torch.testing.assert_close(found, logits)
    assert model.generate(IDS, max_new_tokens=8, do_sample=False).equal(text)


_PROJECTIONS = [
    "lm_head",
    "model.patcher.lm_head",
    "model.patcher.layers.0.self_attn.q_proj",
    "model.local_encoder.layers.0.mlp.down_proj",
    "model.local_encoder.patch_embedding_projection",
    "model.local_encoder.cross_attn_layers.0.q_proj",
    "model.global_transformer.layers.0.self_attn.o_proj",
    "model.local_decoder.patch_embedding_projection",
    "model.local_decoder.cross_attn_layers.0.k_proj",
    "model.local_decoder.layers.0.self_attn.v_proj",
]


@pytest.mark.parametrize("how", ["forward", "hook"])
@pytest.mark.parametrize("name", _PROJECTIONS)
def test_a_replaced_forward_and_a_hook_are_honoured(name, how):
    """By a whole forward and by a single byte alike."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    plain = _logits(model)[0]
    module = model.get_submodule(name)
    if how == "forward":
        forward = module.forward
        module.forward = lambda states: 3 * forward(states) + 0.5
    else:
        module.register_forward_hook(lambda module, inputs, output: 3 * output + 0.5)
    whole, last = _logits(model)
    assert not torch.allclose(whole, plain, atol=1e-3)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)
