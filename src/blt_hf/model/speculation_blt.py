"""Self-speculation (BLT-S, arXiv 2605.08044): the local models draft bytes, one pass of the whole model verifies them."""

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from .cache_blt import BltCache


class BltSelfSpeculator(CandidateGenerator):
    """Drafts with encoder and decoder alone, on the last closed patch, as if no patch ended.

    What is drafted leaves no trace: the cache is put back before the whole model sees the drafts.

    Args:
        model: a [`BltForCausalLM`].
        cache: its cache.
        generation_config: `self_speculation_window`, bytes to draft; `self_speculation_schedule`, `"constant"`, or
            `"heuristic"` to draft two bytes more after a window that was accepted whole and one less otherwise.
        logits_processor: applied to the drafts' logits as to the model's own.
    """

    def __init__(self, model, cache: BltCache, generation_config, logits_processor):
        self.model, self.cache, self.logits_processor = model, cache, logits_processor
        self.window = generation_config.self_speculation_window
        self.is_adaptive = getattr(generation_config, "self_speculation_schedule", "constant") == "heuristic"
        self.do_sample = generation_config.do_sample
        self.max_length = generation_config.max_length
        self.eos_token_ids = getattr(generation_config, "_eos_token_tensor", None)
        self.num_drafted = 0

    @torch.no_grad()
    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """`input_ids` `(1, N)` with the drafts behind them, and the drafts' logits `(1, drafts, V)` when sampling."""
        num_pending = input_ids.shape[1] - self.cache.get_seq_length()
        num_drafts = min(self.window, self.max_length - input_ids.shape[1] - 1)
        self.num_drafted = 0
        if self.cache.is_empty or num_pending != 1 or num_drafts < 1:
            return input_ids, None  # a prompt is read by the whole model
        state = self.cache.snapshot()
        pending, all_logits = input_ids[:, -1:], []
        try:
            while self.num_drafted < num_drafts:
                logits = self.model.draft_logits(pending, self.cache)
                logits = self.logits_processor(input_ids, logits)
                if self.do_sample:
                    pending = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
                else:
                    pending = logits.argmax(dim=-1, keepdim=True)
                all_logits.append(logits)
                input_ids = torch.cat([input_ids, pending], dim=1)
                self.num_drafted += 1
                if self.eos_token_ids is not None and bool(torch.isin(pending, self.eos_token_ids).any()):
                    break
        finally:
            self.cache.restore(state)
        return input_ids, torch.stack(all_logits, dim=1) if self.do_sample else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        if self.is_adaptive and self.num_drafted:
            self.window = self.window + 2 if num_matches == self.num_drafted else max(self.window - 1, 1)


__all__ = ["BltSelfSpeculator"]
