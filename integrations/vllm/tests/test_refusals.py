"""What a BLT cannot do in vLLM is an error when the engine is built, that names the setting and what is accepted."""

import copy
import pickle

import pytest
import vllm
from vllm.config import ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from blt_hf_vllm import tested_versions
from blt_hf_vllm.settings import BltOptions, MemoryPlan, check_version
from conftest import make_model


def build(folder: str, **options):
    """The settings of an engine, as `LLM` and the server make them."""
    values = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    return EngineArgs(model=folder, **{**values, **options}).create_engine_config()


def build_from_flags(folder: str, *flags: str):
    """The same from the command line of the server."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = [
        "--model",
        folder,
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--kv-cache-memory-bytes",
        str(64 << 20),
    ]
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*given, *flags])).create_engine_config()


DRAFTS = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


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
        ({"speculative_config": DRAFTS}, "speculative_config.method.*must be 'ngram'.*got 'ngram_gpu'"),
        ({"runner": "pooling"}, "runner.*must be 'generate'.*got 'pooling'"),
        ({"kv_transfer_config": TRANSFER}, "kv_transfer_config.*must be None"),
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


@pytest.mark.parametrize("flags", [[], ["--no-enable-prefix-caching"]])
def test_prefix_caching_is_off_by_default(saved, flags):
    """In vLLM it is on by default; a BLT says what its default is, and nobody is warned of what he has not asked for."""
    assert not build_from_flags(saved("entropy")[1], *flags).cache_config.enable_prefix_caching


def test_prefix_caching_is_refused_where_it_is_asked_for(saved):
    folder, refusal = saved("entropy")[1], "`enable_prefix_caching` must be False for a BLT.*got True"
    with pytest.raises(ValueError, match=refusal):
        build(folder, enable_prefix_caching=True)
    with pytest.raises(ValueError, match=refusal):
        build_from_flags(folder, "--enable-prefix-caching")


def test_settings_of_a_model_travel_to_other_processes(saved):
    settings = build(saved("entropy")[1])
    copies = pickle.loads(pickle.dumps(settings)), copy.deepcopy(settings)
    assert not any(found.model_config.is_prefix_caching_supported for found in copies)
    assert all(isinstance(found.model_config, ModelConfig) for found in copies)


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
