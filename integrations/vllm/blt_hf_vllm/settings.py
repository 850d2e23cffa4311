"""What a BLT asks of vLLM's settings, what it refuses, and how memory is divided into pages."""

import re
from dataclasses import dataclass, replace

import torch
from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from blt_hf import BltConfig
from blt_hf.serving.ragged import StateLayout, bytes_per_patch, check_served

from . import FIRST_UNTESTED_VLLM, OLDEST_VLLM, tested_versions


_SLOT_MULTIPLE = 32  # slots of a page for which every attention backend has a kernel
_ALIGNMENT = 512  # bytes; a page holds integers and floats of up to 8


@dataclass(frozen=True)
class BltOptions:
    """Options of a BLT, which vLLM takes as `additional_config={"blt": {...}}` (`--additional-config` of its server).

    Attributes:
        bytes_per_slot: bytes of a request for which memory of one patch is reserved in the global transformer. None: as
            many as the patching rule promises for every text: `patch_size` for `static`, else 1.
        merge_patches: with more `bytes_per_slot` than the rule promises, patches are merged where a text has more than
            there are slots. Without this, such a ratio is refused.
        max_patch: bytes of the longest patch, longer ones are split. None: the model's `max_patch_length`, or the window
            of its local layers.
    """

    bytes_per_slot: int | None = None
    merge_patches: bool = False
    max_patch: int | None = None

    @classmethod
    def of(cls, vllm_config) -> "BltOptions":
        """The options of an engine.

        Raises:
            ValueError: names the option, what was given and what is accepted.
        """
        given = getattr(vllm_config, "additional_config", None) or {}
        given = given.get("blt", {}) if isinstance(given, dict) else {}
        if not isinstance(given, dict):
            raise ValueError(f"`additional_config['blt']` must be a dictionary of options; got {given!r}.")
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"`additional_config['blt']` has options that do not exist: {unknown}; accepted are "
                f"{sorted(cls.__dataclass_fields__)}."
            )
        for name in ("bytes_per_slot", "max_patch"):
            value = given.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1 byte; got {value!r}.")
        return cls(**given)

    def ratio(self, config: BltConfig) -> int:
        """Bytes for which one slot of a patch is reserved.

        Raises:
            ValueError: the patching rule does not bound it, and patches may not be merged.
        """
        bound = bytes_per_patch(config)
        if config.patching_mode == "static" and self.max_patch is not None and self.max_patch < bound:
            bound = 1
        if self.bytes_per_slot is None:
            # A text of many special ids breaks what `space` promises, so that has to be asked for.
            return bound if config.patching_mode == "static" else 1
        if self.bytes_per_slot > bound and not self.merge_patches:
            raise ValueError(
                f"`bytes_per_slot={self.bytes_per_slot}` is more than `patching_mode={config.patching_mode!r}` promises: "
                f"patches have at least {bound} byte(s) on average. Accepted are 1 to {bound}; or `merge_patches=True`, "
                "which merges patches where a text has more of them than slots, and counts these "
                "(blt_hf_merged_patches)."
            )
        return self.bytes_per_slot


@dataclass(frozen=True)
class StackShape:
    """Layers that share the pages of one cache, side by side as heads.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim: of each layer.
        window: bytes that a query sees; None: all patches.
        dtype: of keys and values.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    dtype: torch.dtype

    @property
    def slot_size(self) -> int:
        """Memory of one byte (or patch) in all layers, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class MemoryPlan:
    """How one model's memory is divided: pages of one size, of four kinds.

    vLLM's cache has pages of one size for all layers of a model. A request has one page of state, and as many pages of
    each stack as its bytes (its last bytes, where there is a window) or patches need.

    Attributes:
        layout: what a page of state holds.
        stacks: the layers that share pages, by name. `bytes` is encoder and decoder, where their shapes are the same.
        members: the stack of each part of the model: `{"encoder": "bytes", ...}`, and the number of its first layer there.
        slots: bytes (or patches) of a page of each stack.
        page_size: in bytes of memory.
        bytes_per_slot: bytes of text for which a page of the global transformer has one slot.
    """

    layout: StateLayout
    stacks: dict[str, StackShape]
    members: dict[str, tuple[str, int]]
    slots: dict[str, int]
    page_size: int
    bytes_per_slot: int

    @classmethod
    def of(cls, vllm_config) -> "MemoryPlan":
        """The plan of an engine.

        Raises:
            ValueError: options that do not fit the model.
        """
        config, dtype = blt_config(vllm_config), vllm_config.model_config.dtype
        options, longest = BltOptions.of(vllm_config), vllm_config.model_config.max_model_len
        stacks, members = _divide_stacks(config, dtype, longest)
        layout = StateLayout.of(config, dtype, num_drafts(vllm_config), options.max_patch)
        sizes = [layout.page_size, *(_SLOT_MULTIPLE * shape.slot_size for shape in stacks.values())]
        page_size = -(-max(sizes) // _ALIGNMENT) * _ALIGNMENT
        slots = {
            name: page_size // shape.slot_size // _SLOT_MULTIPLE * _SLOT_MULTIPLE for name, shape in stacks.items()
        }
        return cls(layout, stacks, members, slots, page_size, options.ratio(config))


def _divide_stacks(config: BltConfig, dtype: torch.dtype, longest: int) -> tuple[dict, dict]:
    def shape(part, window: int | None, kind: torch.dtype) -> StackShape:
        kv_heads = part.num_key_value_heads or part.num_attention_heads
        return StackShape(part.num_hidden_layers, part.num_attention_heads, kv_heads, part.head_dim, window, kind)

    # As a window, also where there is none: vLLM puts all layers of full attention into one group of pages.
    window = config.local_attention_window_len or longest
    encoder = shape(config.encoder_config, window, dtype)
    decoder = shape(config.decoder_config, window, dtype)
    total = encoder.num_layers + decoder.num_layers
    if _with_layers(encoder, total) == _with_layers(decoder, total):
        stacks = {"bytes": _with_layers(encoder, total)}
        members = {"encoder": ("bytes", 0), "decoder": ("bytes", encoder.num_layers)}
    else:
        stacks = {"encoder": encoder, "decoder": decoder}
        members = {"encoder": ("encoder", 0), "decoder": ("decoder", 0)}
    stacks["global"] = shape(config.global_config, None, dtype)
    members["global"] = ("global", 0)
    if config.uses_patcher:
        # Entropies decide where patches start, so they are the same in every precision of the model.
        part = config.patcher_config
        stacks["patcher"] = shape(part, part.sliding_window or longest, torch.float32)
        members["patcher"] = ("patcher", 0)
    return stacks, members


def _with_layers(shape: StackShape, num_layers: int) -> StackShape:
    return replace(shape, num_layers=num_layers)


def blt_config(vllm_config) -> BltConfig:
    """The configuration of the model as blt_hf's class, also where vLLM has loaded code that came with the checkpoint."""
    config = vllm_config.model_config.hf_config
    return config if isinstance(config, BltConfig) else BltConfig.from_dict(config.to_dict())


def num_drafts(vllm_config) -> int:
    """Bytes that speculative decoding may take back at once."""
    speculation = vllm_config.speculative_config
    return 0 if speculation is None else speculation.num_speculative_tokens


class BltModelConfig(ModelConfig):
    """vLLM's settings of a model, for one whose requests share no pages: prefix caching is off unless it is asked for."""

    @property
    def is_prefix_caching_supported(self) -> bool:
        return False


class BltSettings(VerifyAndUpdateConfig):
    """What vLLM asks before it builds an engine for a BLT."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Gives the settings the class that knows the defaults of a BLT; vLLM has no field for them."""
        model_config.__class__ = BltModelConfig

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Refuses what a BLT cannot do here, and turns off graphs, which are on by default.

        Raises:
            ValueError: names the setting, what was given and what is accepted.
        """
        check_version()
        check_served(blt_config(vllm_config))
        for name, given, accepted, reason in _refusals(vllm_config):
            if given != accepted and given is not accepted:
                raise ValueError(f"`{name}` must be {accepted!r} for a BLT in vLLM ({reason}); got {given!r}.")
        MemoryPlan.of(vllm_config)  # raises for options that do not fit
        # The number of patches is known in the middle of a forward, which no recorded graph allows.
        vllm_config.model_config.enforce_eager = True


def _refusals(vllm_config):
    """Settings, what was given, what is accepted, and why."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    yield "tensor_parallel_size", parallel.tensor_parallel_size, 1, "its projections are not split; run replicas"
    yield "pipeline_parallel_size", parallel.pipeline_parallel_size, 1, "its layers are not divided; run replicas"
    context = getattr(parallel, "decode_context_parallel_size", 1)
    yield "decode_context_parallel_size", context, 1, "its pages are not divided"
    # By default it is off here, see [`BltModelConfig`]: somebody has asked for it.
    caching = bool(cache.enable_prefix_caching)
    yield "enable_prefix_caching", caching, False, "patches do not end where pages do, so requests share none"
    yield "enable_lora", vllm_config.lora_config is not None, False, "merge the adapter: `merge_and_unload()` of PEFT"
    yield "quantization", model.quantization, None, "weights are read as they are"
    yield "kv_cache_dtype", cache.cache_dtype, "auto", "keys and values have the dtype of the model"
    yield "enable_prompt_embeds", bool(getattr(model, "enable_prompt_embeds", False)), False, "patches come of bytes"
    yield "runner", model.runner_type, "generate", "pooling is not implemented"
    yield "kv_transfer_config", vllm_config.kv_transfer_config, None, "a request's state is not only keys and values"
    hybrid = bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager)
    yield "disable_hybrid_kv_cache_manager", hybrid, False, "windows and patches have pages of their own"
    if model.dtype not in (torch.float32, torch.bfloat16):
        yield "dtype", model.dtype, "float32 or bfloat16", "others are not tested"
    if vllm_config.speculative_config is not None:
        method = vllm_config.speculative_config.method
        yield "speculative_config.method", method, "ngram", "no model drafts bytes for this one"
    if not current_platform.is_cpu():
        runner = bool(getattr(vllm_config, "use_v2_model_runner", False))
        yield "VLLM_USE_V2_MODEL_RUNNER", int(runner), 0, "set this variable of the environment; runner 1 is tested"


def check_version() -> None:
    """Refuses a vLLM that the tests have not passed with.

    Raises:
        ValueError: names the version and those that are accepted.
    """
    import vllm

    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    version = tuple(map(int, found.groups())) if found else (0, 0)
    if not OLDEST_VLLM <= version < FIRST_UNTESTED_VLLM:
        raise ValueError(
            f"blt-hf-vllm uses parts of vLLM that change between releases, and is tested with {tested_versions()}; got "
            f"vLLM {vllm.__version__}. Install one of these, or a blt-hf-vllm that knows yours."
        )


__all__ = [
    "BltModelConfig",
    "BltOptions",
    "BltSettings",
    "MemoryPlan",
    "StackShape",
    "blt_config",
    "check_version",
    "num_drafts",
]
