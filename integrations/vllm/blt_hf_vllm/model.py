"""A BLT as a model of vLLM: blt_hf's layers, rules and weights, vLLM's attention and memory."""

from collections.abc import Iterable

import torch
from prometheus_client import Counter
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import HasInnerState
from vllm.model_executor.models.utils import AutoWeightsLoader

from blt_hf import BltModel
from blt_hf.serving.ragged import NewPatches, RaggedBlt, RaggedRows

from . import logger
from .attention import StackAttention
from .kernels import make_kernels
from .settings import BltOptions, MemoryPlan, blt_config, num_drafts
from .state import BltState


EVENTS = {
    name: (text, Counter(f"blt_hf_{name}_patches", text))
    for name, text in {
        "split": "A patch reached `max_patch` bytes and was split; such texts are not exactly the model's.",
        "merged": "A text has more patches than `bytes_per_slot` leaves memory for; some were merged.",
    }.items()
}
"""What makes a text another than the model's, and vLLM's counter of it (of this process)."""


class BltForCausalLM(nn.Module, HasInnerState):
    """A [`BltModel`] with a head, in the form that vLLM asks of its models.

    The bytes of all requests of a step stand in one row. Windows over bytes are vLLM's sliding-window attention; the
    global layers are its full attention, over patches; everything else of a request lies in one page of state.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("`enable_prefix_caching` must be False for a BLT; got True.")
        self.config = blt_config(vllm_config)
        plan, options = MemoryPlan.of(vllm_config), BltOptions.of(vllm_config)
        with no_init_weights():
            self.model = BltModel(self.config)
        self.model.requires_grad_(False).eval()
        if self.model.patcher is not None:
            self.model.patcher.float()  # whatever the model's own precision
        self.lm_head = nn.Linear(self.config.decoder_config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.local_encoder.embed_tokens.weight
        self._kernels, self._head = make_kernels(), None
        self.ragged = RaggedBlt(
            self.model,
            num_drafts(vllm_config),
            plan.bytes_per_slot,
            plan.slots["global"],
            options.max_patch,
            self._kernels,
            vllm_config.model_config.max_model_len,
        )
        self.state = BltState(plan, "blt.state.0")
        self.attentions = nn.ModuleDict()
        for part, (name, _) in plan.members.items():
            if name not in self.attentions:
                scale = self.ragged.stacks[part].layers[0].self_attn.scaling
                self.attentions[name] = StackAttention(plan, name, scale, f"blt.{name}.layers.0.attn")
        self._members = plan.members
        self._counters = _Counters()

    # What vLLM asks of a model.

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of bytes `(T,)` without those of their hashes, `(T, W)`; the forward takes ids."""
        return self.model.local_encoder.embed_tokens(input_ids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """fp32 logits of the next byte from states `(T, W)`."""
        if self._head is None:  # the weights are there now
            # Tied weights embed bytes as well, so they stay as they are.
            is_tied = self.config.tie_word_embeddings
            self._head = self.lm_head if is_tied else self._kernels.make_product([self.lm_head.weight])
        return self._head(hidden_states).float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the tensors of a checkpoint; the names of those that were found.

        The mask embedding of a BLT-D is for filling blocks alone, which this does not do.
        """
        loader, buffers, loaded = AutoWeightsLoader(self), dict(self.named_buffers()), set()

        def parameters() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name in buffers:  # which the loader does not know: how entries of a lexicon are spelled
                    buffers[name].copy_(weight)
                    loaded.add(name)
                elif "mask_embedding" not in name:
                    yield name, weight

        loaded |= loader.load_weights(parameters())
        if self.config.tie_word_embeddings:
            loaded |= {"lm_head.weight", "model.local_encoder.embed_tokens.weight"}
        return loaded

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, *args, **kwargs) -> Tensor:
        """States `(T, W)` of the bytes `(T,)` of all requests; behind them may stand padding."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # the engine measures memory
            return self.lm_head.weight.new_zeros(len(input_ids), self.config.decoder_config.hidden_size)
        step = metadata[self.state.prefix]
        count = step.num_bytes
        rows = RaggedRows(input_ids[:count].long(), positions[:count].long(), step.starts, step.pages, step.longest)
        output = self.ragged(rows, self.state.kv_cache, self)
        self._counters.update(self.ragged)
        return nn.functional.pad(output, (0, 0, 0, len(input_ids) - count)) if count < len(input_ids) else output

    # What the forward over ragged rows asks of an engine.

    def attend_bytes(self, stack: str, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        name, first = self._members[stack]
        return self.attentions[name].attend(first + layer, query, key, value)

    def start_patches(self, patches: NewPatches) -> None:
        self.attentions["global"].start_patches(patches)

    def attend_patches(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attentions["global"].attend(layer, query, key, value)


class _Counters:
    """Shows how often a text is not exactly the model's: in vLLM's metrics, and the first time in the log."""

    def __init__(self):
        self._seen = dict.fromkeys(EVENTS, 0)

    def update(self, ragged: RaggedBlt) -> None:
        for name, count in (("split", ragged.num_split), ("merged", ragged.num_merged)):
            new = count - self._seen[name]
            if new:
                text, counter = EVENTS[name]
                if not self._seen[name]:
                    logger.warning(text)
                counter.inc(new)
                self._seen[name] = count


__all__ = ["BltForCausalLM"]
