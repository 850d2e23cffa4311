"""Drafting: a source proposes bytes for each row, one pass of the whole model verifies them.

Self-speculation (BLT-S, arXiv 2605.08044) is the first source: encoder and decoder draft alone. Each row accepts its own
number of bytes. Greedy text is that of decoding byte by byte; sampling keeps its distribution.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_blt import BltCache
from .decoding_blt import RaggedText


@dataclass
class Drafts:
    """Proposed bytes.

    Attributes:
        ids: int64 `(B, k)`.
        lengths: how many of them count in each row.
        probs: fp32 `(B, k, V)`, the distribution that each was drawn from. None: they were not drawn.
    """

    ids: Tensor
    lengths: list[int]
    probs: Tensor | None = None


class DraftSource(ABC):
    """Proposes bytes for the rows of a batch."""

    @abstractmethod
    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        """Drafts for each row, at most `limits[b]`.

        The cache has read all bytes of `text` but the last one of each row, and must be left as it was: what is written
        to it is taken back with `crop_rows`.
        """

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """Learns how many drafts of each row were verified, and how many accepted; rows that wait have 0 of both."""
        return


class SelfSpeculation(DraftSource):
    """BLT-S: encoder and decoder draft by themselves, on the last closed patch, as if no patch ended.

    Args:
        model: a [`BltForCausalLM`].
        num_rows: rows of the batch.
        window: bytes to draft.
        is_adaptive: each row's window grows by two bytes after all of its drafts were accepted and shrinks by one
            otherwise; the batch drafts the mean of its rows' windows.
        do_sample: draw the drafts, from what the logits processors make of them.
    """

    def __init__(self, model, num_rows: int, window: int, is_adaptive: bool, do_sample: bool):
        self.model, self.windows = model, [window] * num_rows
        self.is_adaptive, self.do_sample = is_adaptive, do_sample

    @torch.no_grad()
    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        windows = [window for window, limit in zip(self.windows, limits) if limit > 0]
        window = -(-sum(windows) // len(windows)) if windows else 0
        window = min(window, max(limits), cache.slack - 1)
        pending, ids, probs = text.last_ids(), [], []
        for step in range(window):
            logits = self.model.draft_logits(pending, cache)[:, None]
            if ids and text.has_context:
                text.put_drafts(torch.cat(ids, dim=1))
            scores = (logits if text.is_in_order else text.process(logits, ahead=step))[:, 0]
            if self.do_sample:
                probs.append(scores.softmax(dim=-1))
                pending = torch.multinomial(probs[-1], num_samples=1)
            else:
                pending = scores.argmax(dim=-1, keepdim=True)
            ids.append(pending)
        cache.crop_rows([window] * len(limits))
        if not ids:
            return Drafts(pending[:, :0], [0] * len(limits))
        lengths = [min(limit, window) for limit in limits]
        return Drafts(torch.cat(ids, dim=1), lengths, torch.stack(probs, dim=1) if probs else None)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        if self.is_adaptive:
            self.windows = [
                window if not d else window + 2 if a == d else max(window - 1, 1)
                for window, d, a in zip(self.windows, drafted, accepted)
            ]


@torch.no_grad()
def verify(model, text: RaggedText, cache: BltCache, drafts: Drafts, do_sample: bool):
    """One pass of the whole model over the last byte of each row and its drafts.

    Each row accepts drafts up to the first that the model would not have written (greedy), or by speculative sampling
    (arXiv 2211.17192, algorithm 1), and gets one byte of the model's own behind them. The cache has read all of these but
    the last one then; rows that wait are left alone.

    Returns:
        ids: int64 `(B, k + 1)`; counts: how many of them each row gets; logits and scores: fp32 `(B, k + 1, V)`.
    """
    is_active = text.active
    lengths = [count + 1 if active else 0 for count, active in zip(drafts.lengths, is_active)]
    num_drafts = drafts.ids.shape[1]
    input_ids = torch.cat([text.last_ids(), drafts.ids], dim=1)
    is_full = min(lengths) == num_drafts + 1
    logits = model.step_logits(input_ids, cache, None if is_full else lengths)
    if text.has_context:
        text.put_drafts(drafts.ids)
    if text.is_in_order:
        ids, accepted, scores = choose_in_order(text, logits, drafts, do_sample)
    else:
        scores = text.process(logits)
        ids, accepted = choose(scores, drafts, do_sample)
    counts = [min(count, draft) + 1 if active else 0 for count, draft, active in
              zip(accepted.tolist(), drafts.lengths, is_active)]  # fmt: skip
    cache.crop_rows([length - count for length, count in zip(lengths, counts)])
    return ids, counts, logits, scores


def choose(scores: Tensor, drafts: Drafts, do_sample: bool) -> tuple[Tensor, Tensor]:
    """Ids `(B, k + 1)` and how many drafts are accepted `(B,)`, from processed scores `(B, k + 1, V)`."""
    rows, num_drafts = drafts.ids.shape
    exists = (
        torch.arange(num_drafts, device=scores.device) < torch.tensor(drafts.lengths, device=scores.device)[:, None]
    )
    if not do_sample:
        ids = scores.argmax(dim=-1)
        is_accepted = (ids[:, :num_drafts] == drafts.ids) & exists
        return ids, is_accepted.long().cumprod(dim=1).sum(dim=1)
    probs = scores.softmax(dim=-1)
    if drafts.probs is None:  # the whole probability of a draft that was not drawn is its own
        proposed = torch.nn.functional.one_hot(drafts.ids, probs.shape[-1]).to(probs.dtype)
    else:
        proposed = drafts.probs
    of_model = probs[:, :num_drafts].gather(2, drafts.ids[..., None])[..., 0]
    of_draft = proposed.gather(2, drafts.ids[..., None])[..., 0]
    is_accepted = (torch.rand_like(of_model) * of_draft < of_model) & exists
    accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)
    # After a refused draft, the next byte comes from what the model says beyond the draft; else from the model.
    proposed = torch.cat([proposed * exists[..., None], torch.zeros_like(probs[:, :1])], dim=1)
    at = accepted[:, None, None].expand(-1, 1, probs.shape[-1])
    model_probs, draft_probs = probs.gather(1, at)[:, 0], proposed.gather(1, at)[:, 0]
    rest = (model_probs - draft_probs).clamp_min(0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, model_probs)
    own = torch.multinomial(rest, num_samples=1)
    ids = torch.cat([drafts.ids, own], dim=1)
    is_own = torch.arange(num_drafts + 1, device=ids.device) == accepted[:, None]
    return torch.where(is_own, own, ids), accepted


def choose_in_order(
    text: RaggedText, logits: Tensor, drafts: Drafts, do_sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """[`choose`] for one row whose logits processors see a draft only when it is accepted; the scores come third."""
    ids, scores, count = [], logits.clone(), 0
    for step in range(drafts.lengths[0] + 1):
        scores[:, step] = text.process(logits[:, step, None], ahead=step)[:, 0]
        is_draft = step < drafts.lengths[0]
        here = slice(step, step + 1) if is_draft else slice(0, 0)
        probs = None if drafts.probs is None else drafts.probs[:, here]
        # The second of the two scores is what would follow the draft, which is not known yet.
        pair = scores[:, [step] * (1 + is_draft)]
        chosen, accepted = choose(pair, Drafts(drafts.ids[:, here], [int(is_draft)], probs), do_sample)
        ids.append(chosen[:, :1])
        if not int(accepted) or int(chosen[0, 0]) in text.eos_token_ids:
            break
        count += 1
    rest = drafts.ids.shape[1] + 1 - len(ids)
    chosen = torch.nn.functional.pad(torch.cat(ids, dim=1), (0, rest), value=text.pad_token_id)
    return chosen, torch.tensor([count], device=chosen.device), scores


def decode_drafted(model, source: DraftSource, text: RaggedText, cache: BltCache, do_sample: bool) -> None:
    """Writes texts to their ends. The cache has read all bytes but the last one of each row, before and after.

    A streamer that has a method `put_drafts` is told, after the bytes of each verification, what was verified: the drafts
    `(B, k)`, how many of them counted in each row, and how many were accepted.
    """
    while not text.is_done:
        limits = [
            max(text.max_length - length - 1, 0) if active else 0 for length, active in zip(text.lengths, text.active)
        ]
        drafts = source.propose(text, cache, limits)
        is_active = text.active
        ids, counts, logits, scores = verify(model, text, cache, drafts, do_sample)
        added = text.append(ids, counts, logits, scores)
        cache.crop_rows([count - new for count, new in zip(counts, added)])
        drafted = [count if active else 0 for count, active in zip(drafts.lengths, is_active)]
        accepted = [max(count - 1, 0) for count in counts]
        source.update(drafted, accepted)
        if hasattr(text.streamer, "put_drafts"):
            text.streamer.put_drafts(drafts.ids.cpu(), drafted, accepted)
    finish_rows(model, text, cache)


def finish_rows(model, text: RaggedText, cache: BltCache) -> None:
    """Makes the cache one that has read all bytes but the last of each row of what `generate` returns."""
    # Rows that ended before others have one byte that the next turn would not read; others may have gone too far.
    cache.crop_rows([max(length - text.end, 0) for length in text.lengths])
    is_behind = [int(length < text.end) for length in text.lengths]
    if any(is_behind):
        model.step_logits(text.last_ids(), cache, is_behind)
    cache.set_columns(text.end - 1)


__all__ = [
    "DraftSource",
    "Drafts",
    "SelfSpeculation",
    "choose",
    "choose_in_order",
    "decode_drafted",
    "finish_rows",
    "verify",
]
