"""What a BLT cannot do in vLLM is an error when the engine is built, that names the setting and what is accepted."""

import logging

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from blt_hf_vllm import tested_versions
from blt_hf_vllm.settings import BltOptions, MemoryPlan, check_version
from conftest import make_model


def build(folder: str, **options):
    """The settings of an engine, as `LLM` and the server make them."""
    values = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    return EngineArgs(model=folder, **{**values, **options}).create_engine_config()


DRAFTS = {"method": "suffix", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "tensor_parallel_size.*must be 1.*got 2"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "[Pp]ipeline"),
        ({"enable_lora": True}, "enable_lora.*merge_and_unload"),
        ({"quantization": "fp8"}, "quantization"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype.*must be 'auto'"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"additional_config": {"blt": {"bytes_per_slot": 2}}}, "bytes_per_slot=2.*entropy.*merge_patches"),
        ({"additional_config": {"blt": {"bytes_per_slot": 0}}}, "bytes_per_slot.*at least 1 byte; got 0"),
        ({"additional_config": {"blt": {"max_patch": True}}}, "max_patch.*got True"),
        ({"additional_config": {"blt": {"ratio": 2}}}, "ratio.*accepted are.*bytes_per_slot"),
        ({"additional_config": {"blt": 2}}, "must be a dictionary"),
    ],
)  # fmt: skip
def test_settings(saved, options, named):
    with pytest.raises((ValueError, NotImplementedError), match=f"(?s){named}"):
        build(saved("entropy")[1], **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_documents": True}, "mask_documents"),
        ({"patching_newline_reset": True}, "patching_newline_reset"),
        ({"encoder_config": {"cross_attn_window": 2}}, "encoder_config.cross_attn_window"),
        ({"decoder_config": {"cross_attn_window": 3}}, "decoder_config.cross_attn_window"),
    ],
)
def test_models(saved, options, named):
    with pytest.raises(ValueError, match=named):
        build(saved("entropy", **options)[1])


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "1.0.0", "dev"])
def test_untested_versions(saved, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ValueError, match=f"{tested_versions()}; got vLLM {version}"):
        check_version()


@pytest.mark.parametrize("version", ["0.29.0", "0.32.4", "0.31.0+cpu"])
def test_tested_versions(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    check_version()


def test_prefix_caching_is_off_and_said_to_be(saved, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("vllm").propagate = True
    settings = build(saved("entropy")[1], enable_prefix_caching=True)
    assert not settings.cache_config.enable_prefix_caching
    assert "Prefix caching is off for BLT models" in caplog.text


def test_graphs_are_off(saved):
    assert build(saved("entropy")[1], enforce_eager=False).model_config.enforce_eager


def test_ratios_that_rules_bound(saved):
    for mode, options, ratio in (
        ("static", {}, 4),
        ("static", {"bytes_per_slot": 2}, 2),
        ("static", {"max_patch": 3}, 1),
        ("space", {}, 1),
        ("space", {"bytes_per_slot": 2}, 2),
        ("entropy", {"bytes_per_slot": 8, "merge_patches": True}, 8),
    ):
        assert BltOptions(**options).ratio(make_model(mode).config) == ratio
    with pytest.raises(ValueError, match="at least 4"):
        BltOptions(bytes_per_slot=5).ratio(make_model("static").config)


def test_pages_hold_what_they_are_planned_for(saved):
    plan = MemoryPlan.of(build(saved("entropy")[1], dtype="bfloat16"))
    assert set(plan.stacks) == {"bytes", "global", "patcher"}
    assert plan.members == {
        "encoder": ("bytes", 0),
        "decoder": ("bytes", 1),
        "global": ("global", 0),
        "patcher": ("patcher", 0),
    }
    assert plan.layout.page_size <= plan.page_size
    for name, shape in plan.stacks.items():
        assert plan.slots[name] % 32 == 0 and 0 < plan.slots[name] * shape.slot_size <= plan.page_size
    assert plan.stacks["patcher"].dtype.itemsize == 4 and plan.stacks["bytes"].dtype.itemsize == 2
