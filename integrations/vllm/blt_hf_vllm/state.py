"""The page of state of each request: what is neither a key nor a value of self-attention."""

from dataclasses import dataclass

from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from .settings import MemoryPlan


@dataclass
class StateMetadata:
    """The requests of one step.

    Attributes:
        pages: int64 `(R,)`, page of each.
        starts: int64 `(R + 1,)`, where their bytes begin.
        num_bytes: bytes of all requests, on the host.
        longest: bytes of the request that has most.
    """

    pages: Tensor
    starts: Tensor
    num_bytes: int
    longest: int


class StateMetadataBuilder(AttentionMetadataBuilder):
    """Makes [`StateMetadata`] of what the engine tells every layer."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs) -> StateMetadata:
        common = common_attn_metadata
        return StateMetadata(
            common.block_table_tensor[:, 0].long().clamp_min(0),
            common.query_start_loc.long(),
            int(common.query_start_loc_cpu[-1]),
            common.max_query_len,
        )


class StateBackend(AttentionBackend):
    """The attention that the engine thinks the pages belong to; nothing attends."""

    @staticmethod
    def get_name() -> str:
        return "BLT_STATE"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("pages of state have no attention")

    @staticmethod
    def get_builder_cls():
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class BltState(nn.Module, MambaBase):
    """A layer without weights that owns the pages of state; to the engine like the state of a Mamba, one page a request.

    Attributes:
        kv_cache: the tensors of the pages, `(pages, *shape)` of each shape of the plan's layout.
    """

    mamba_type = MambaAttentionBackendEnum.MAMBA2  # an engine's state has one of its types; nothing of it runs

    def __init__(self, plan: MemoryPlan, prefix: str):
        nn.Module.__init__(self)
        self.plan, self.prefix, self.kv_cache = plan, prefix, ()
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self):
        return self.plan.layout.shapes

    def get_state_dtype(self):
        return self.plan.layout.dtypes

    def get_attn_backend(self):
        return StateBackend

    def get_kv_cache_spec(self, vllm_config) -> MambaSpec:
        return MambaSpec(
            shapes=self.plan.layout.shapes,
            dtypes=self.plan.layout.dtypes,
            block_size=vllm_config.model_config.max_model_len,
            page_size_padded=self.plan.page_size,
            mamba_type=self.mamba_type,
            mamba_cache_mode="none",
        )


__all__ = ["BltState", "StateMetadata"]
