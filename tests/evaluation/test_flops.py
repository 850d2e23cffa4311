"""FLOPs per byte: against what torch counts while small models run, against numbers worked out by hand, and the paper."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen3Config

from blt_hf import BltConfig
from blt_hf.evaluation.flops import Flops, FlopsPerByte, flops_per_byte, preset_config
from helpers.models import make_model, tiny_config
from helpers.texts import encode


SIZES = {
    "tiny": {},
    "projection": {"cross_attn_k": 4},
    "grouped heads": {
        "encoder_config": {"num_key_value_heads": 1},
        "decoder_config": {"num_key_value_heads": 1, "num_cross_attention_heads": 4, "num_cross_key_value_heads": 2},
        "global_config": {"num_key_value_heads": 2},
        "patcher_config": {"num_key_value_heads": 1},
    },
    "all layers": {
        "encoder_config": {"cross_attn_all_layers": True, "num_hidden_layers": 3},
        "decoder_config": {"cross_attn_all_layers": False},
    },
    "space": {"patching_mode": "space"},
}


def counted_matmuls(model, **inputs) -> int:
    """What torch counts in `aten.mm`: the products of `nn.Linear` layers without bias, and no attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(use_cache=False, **inputs)
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("overrides", SIZES.values(), ids=SIZES)
def test_matmuls_are_those_that_torch_counts(overrides):
    model = make_model(tiny_config(**overrides))
    ids = torch.tensor([encode("a patch is a few bytes, and a byte is a small number")])
    lengths = model(ids, output_patches=True).patch_lengths[0]
    num_bytes, num_closed = ids.shape[1], len(lengths) - 1  # the last patch is still open
    flops = flops_per_byte(model.config, num_bytes / num_closed, num_bytes)
    predicted = num_bytes * sum(part.matmul for part in flops.parts.values())
    assert counted_matmuls(model, input_ids=ids) == pytest.approx(predicted, rel=1e-9)


def test_patcher_alone():
    patcher = make_model().model.patcher
    ids = torch.arange(4, 44)[None]
    flops = flops_per_byte(patcher.config, context_bytes=40)
    matmuls = flops.decoder.matmul + flops.head.matmul
    assert counted_matmuls(patcher, input_ids=ids) == pytest.approx(40 * matmuls)
    in_blt = flops_per_byte(tiny_config(), context_bytes=40).patcher
    assert (in_blt.matmul, in_blt.attention) == (matmuls, flops.decoder.attention)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_token_models(kv_heads):
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    counts = counter.get_flop_counts()
    flops = flops_per_byte(config, context_bytes=80, bytes_per_token=2)
    parts = flops.parts.values()
    assert counts["Global"][torch.ops.aten.mm] == pytest.approx(80 * sum(part.matmul for part in parts))
    # Eager attention multiplies all 40 x 40 pairs, of which (40 + 1) / 2 a row are seen.
    attention = sum(sum(n.values()) for name, n in counts.items() if name.endswith("self_attn"))
    attention -= sum(n.get(torch.ops.aten.mm, 0) for name, n in counts.items() if name.endswith("self_attn"))
    assert attention * (41 / 2) / 40 == pytest.approx(80 * sum(part.attention for part in parts))


def test_attention_follows_the_paper():
    """4 h (m + 1) / 2 a layer and position, by hand."""
    config = tiny_config(local_attention_window_len=10)
    flops = flops_per_byte(config, patch_bytes=4, context_bytes=100)
    assert flops.encoder.attention == 1 * 4 * 16 * (10 + 1) / 2
    assert flops.decoder.attention == 2 * 4 * 16 * (10 + 1) / 2
    assert flops.global_transformer.attention == 2 * 4 * 32 * (25 + 1) / 2 / 4
    assert flops.encoder_cross.attention == 4 * 16 * 4 * 2 / 4  # 2 queries a patch see its 4 bytes
    assert flops.decoder_cross.attention == 2 * 4 * 16 * 2  # each byte sees 2 latents, in 2 layers
    assert flops.encoder_cross.matmul == 4 * 16**2 * 2 / 4 + 4 * 16**2
    assert flops.decoder_cross.matmul == 2 * (4 * 16**2 + 4 * 16**2 * 2 / 4)
    assert flops.head.total == 2 * 16 * 260
    whole = flops_per_byte(tiny_config(local_attention_window_len=None), context_bytes=100)
    assert whole.encoder.attention == 4 * 16 * (100 + 1) / 2


def test_training_costs_three_forwards_but_the_patcher_one():
    flops = flops_per_byte(tiny_config())
    training = flops.training()
    assert training.without_patcher == pytest.approx(3 * flops.without_patcher)
    assert training.patcher == flops.patcher
    assert flops.total == pytest.approx(flops.paper + flops.projections.total + flops.patcher.total)
    assert flops.projections.total > 0 and flops.patcher.total > 0


def test_models_without_entropies_pay_no_patcher():
    assert flops_per_byte(tiny_config(patching_mode="space")).patcher == Flops()


def test_released_shapes():
    """The figures of the paper's shapes, worked out by hand for the large terms."""
    flops = flops_per_byte(preset_config("blt-7b"), patch_bytes=8, context_bytes=8192)
    layer = 8 * 4096**2 + 6 * 4096 * 11008
    assert flops.global_transformer.matmul == pytest.approx(32 * layer / 8)
    assert flops.patcher.matmul == 14 * (8 * 768**2 + 6 * 768 * 2048) + 2 * 768 * 260
    one = preset_config("blt-1b")
    assert one.encoder_config.intermediate_size == one.decoder_config.intermediate_size == 2816
    assert one.global_config.num_hidden_layers == 25


def test_patch_size_8_about_halves_the_inference_of_llama_3():
    """The paper's claim. The equations give 57 % at 8 KB of context and 55 % at the 8,192 tokens Llama 3 is made for."""
    llama, blt = preset_config("llama-3-8b"), preset_config("blt-7b")
    for context, ratio, with_all in ((8192, 0.572, 0.635), (8192 * 4.4, 0.546, 0.603)):
        tokens = flops_per_byte(llama, context_bytes=context).total
        bytes_ = flops_per_byte(blt, patch_bytes=8, context_bytes=context)
        assert bytes_.paper / tokens == pytest.approx(ratio, abs=0.002)
        assert bytes_.total / tokens == pytest.approx(with_all, abs=0.002)
    same = flops_per_byte(blt, patch_bytes=4.5).paper / flops_per_byte(llama).total
    assert same == pytest.approx(0.955, abs=0.002)  # at 4.5 bytes they cost nearly the same, as in the paper


def test_windows_of_token_models():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    windowed = flops_per_byte(MistralConfig(sliding_window=8, **size), context_bytes=88)
    free = flops_per_byte(MistralConfig(sliding_window=None, **size), context_bytes=88)
    assert windowed.global_transformer.attention < free.global_transformer.attention
    assert flops_per_byte(Qwen3Config(sliding_window=8, head_dim=16, **size)).global_transformer.matmul > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GPT2Config(), {}, "'gpt2'; FLOPs are known for"),
        (BltConfig(), {"patch_bytes": 0}, "`patch_bytes` must be at least 1; got 0"),
        (BltConfig(), {"context_bytes": -1}, "`context_bytes`"),
        (LlamaConfig(), {"bytes_per_token": float("nan")}, "`bytes_per_token`"),
        (None, {}, "of type None"),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message):
        flops_per_byte(config, **options)


def test_unknown_presets_are_told():
    with pytest.raises(ValueError, match="no preset 'blt-70b'; there are blt-1b, blt-7b"):
        preset_config("blt-70b")


def test_parts_cover_every_field():
    assert set(FlopsPerByte().parts) == set(FlopsPerByte.__dataclass_fields__)
