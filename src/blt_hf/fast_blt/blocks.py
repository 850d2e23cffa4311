"""Fast BLT, the decoding side (BLT-D and BLT-DV, arXiv 2605.08044): the decoder fills in masked bytes, several at once.

A block is `[last byte | masks]`. The last byte of the text is the one that the whole model has chosen and not read yet.
The encoder reads it alone; the decoder then reads it and the masks behind it, over the keys of the text before and the
latents of the last complete patch. Each state predicts the next byte, as always: that of the last byte the first mask,
that of each mask the one behind it. Confidence or an entropy budget decides which masks become bytes (*unmasking*). The
block is read again with these bytes in it, until no mask is left. The cache counts nothing of this: the whole model then
reads the finished bytes in one pass, as any text.

Fields of the generation configuration, and arguments of `generate`, for a model that was trained with
`config.diffusion_block_size`:

    diffusion_block_size (default None): bytes of a block, at least 2. The whole model chooses the first, the decoder
        the others. Larger blocks than those of training make the text worse.
    unmasking (default `"confidence"`): the rule by which bytes of a block are kept each time it was read; or
        `"entropy"`.
    confidence_threshold (default 0.6): probability from which a byte is kept. Above 1: one byte at a time.
    entropy_budget (default 0.9): nats that the bytes kept at a time may have in sum.
    verify (default False): read each block once and let the whole model verify it: greedy text is that of normal
        decoding, and sampling keeps its distribution. Without it the text depends on block size and thresholds.

BLT-DV fills in all masks at once and lets the whole model verify them, like other drafts (`blt_hf.speculation`).

Dimension letters: `B` rows, `K` bytes of a block (its last byte of the text included), `V` vocabulary, `W` width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.attention_blt import SlotSpan
from ..model.cache_blt import BltCache
from ..model.chunk_blt import assign_patches, next_bytes
from ..model.forward_blt import ForwardInputs, ForwardSettings, read_bytes
from ..model.generation_blt import RaggedText
from ..model.layers_blt import LatentIndex
from ..model.step_blt import StepRunner, round_up_bytes
from ..speculation import (
    Drafts,
    DraftSource,
    check_processors,
    decode_drafted,
    finish_rows,
    is_in_order,
    put_drafts,
)
from ..speculation import check_settings as check_drafts


UNMASKING_RULES = ("confidence", "entropy")
# Where a block's most probable byte is less probable, this byte and those behind it are not worth a verification.
_LEAST_SURE = 0.15


@dataclass
class Unmasking:
    """Decides which masked bytes of a block are kept after it was read.

    Attributes:
        rule: `"confidence"`: bytes whose probability is at least `confidence_threshold` (the paper's alpha, 0.5 to 0.7).
            `"entropy"`: the surest bytes whose entropies sum to at most `entropy_budget` nats (its gamma, 0.8 to 1.0).
            Both keep at least the surest byte. With a threshold above 1 or a budget below 0 that is the only one.
        confidence_threshold, entropy_budget: as above.
    """

    rule: str = "confidence"
    confidence_threshold: float = 0.6
    entropy_budget: float = 0.9

    @classmethod
    def from_config(cls, generation_config) -> "Unmasking":
        """Reads a generation configuration; fields that it lacks have their defaults."""
        names = {
            "rule": "unmasking",
            "confidence_threshold": "confidence_threshold",
            "entropy_budget": "entropy_budget",
        }
        given = {name: getattr(generation_config, field, None) for name, field in names.items()}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def choose(self, scores: Tensor, is_masked: Tensor) -> Tensor:
        """Chooses the masked bytes to keep, bool `(B, n)`, from processed logits `(B, n, V)`."""
        log_probs = scores.log_softmax(dim=-1)
        if self.rule == "confidence":
            doubt = -log_probs.amax(dim=-1).exp()
        else:
            doubt = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(scores.dtype).min)).sum(dim=-1)
        doubt = doubt.masked_fill(~is_masked, float("inf"))
        surest = doubt.argmin(dim=1, keepdim=True)
        if self.rule == "confidence":
            is_kept = doubt <= -self.confidence_threshold
        else:
            order = doubt.sort(dim=1, stable=True)
            within = order.values.cumsum(dim=1) <= self.entropy_budget
            is_kept = torch.zeros_like(is_masked).scatter(1, order.indices, within)
        return (is_kept | torch.zeros_like(is_masked).scatter(1, surest, True)) & is_masked


def check_settings(generation_config, config) -> None:
    """Checks the fields of a generation configuration with a `diffusion_block_size`.

    Args:
        generation_config: the settings of one call of `generate`.
        config: of the model.
    Raises:
        ValueError: names the field, its value and the accepted ones.
    """
    check_drafts(generation_config, config)
    size = generation_config.diffusion_block_size
    trained = getattr(config, "diffusion_block_size", None)
    window = getattr(config, "local_attention_window_len", None)
    rule = getattr(generation_config, "unmasking", UNMASKING_RULES[0])
    if trained is None:
        raise ValueError(
            f"`diffusion_block_size={size!r}` needs a model that was trained with blocks (`diffusion_block_size` in "
            "its configuration); this one has no mask embedding."
        )
    if not isinstance(size, int) or size < 2 or (window is not None and size > window):
        raise ValueError(
            "`diffusion_block_size` must be None or at least 2 bytes, and at most the local attention window; got "
            f"{size!r} and a window of {window}."
        )
    if rule not in UNMASKING_RULES:
        raise ValueError(f"`unmasking` must be one of {UNMASKING_RULES}; got {rule!r}.")
    for name in ("confidence_threshold", "entropy_budget"):
        value = getattr(generation_config, name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"`{name}` must be a number; got {value!r}.")
    if getattr(generation_config, "self_speculation_window", None) is not None:
        raise ValueError(
            "`self_speculation_window` and `diffusion_block_size` are two ways to draft; set one of them, got "
            f"{generation_config.self_speculation_window} and {size}."
        )


class BlockSpan(SlotSpan):
    """Says which slots a block sees, its own among them: those of drafts, which the cache does not count.

    Its first byte is one of the text and sees no mask; the others see the whole block.
    """

    def _build_mask(self, device: torch.device):
        queries = self.query_positions.to(device)
        last = queries[:, -1:]
        keys = last - (last - torch.arange(self.num_slots, device=device)) % self.num_slots
        first = torch.zeros_like(queries) if self.start is None else self.start.to(device)
        if self.window is not None:
            first = torch.maximum(first, queries - (self.window - 1))
        end = torch.where(queries == queries[:, :1], queries, last)
        visible = (keys[:, None] >= first[..., None]) & (keys[:, None] <= end[..., None])
        if self.implementation != "flex_attention":
            return ~visible[:, None]
        from torch.nn.attention.flex_attention import create_block_mask

        def is_visible(row, head, query, key):
            return visible[row, query, key]

        return create_block_mask(is_visible, len(visible), None, *visible.shape[1:], device=device)


def read_last(model, settings: ForwardSettings, cache: BltCache, ids: Tensor, packed=None) -> Tensor:
    """Computes encoder states `(B, 1, W)` of one more byte of each row `(B, 1)`, which the cache does not count.

    Other arguments as [`read_block`].
    """
    chunk = next_bytes(ids, None, cache, settings.documents)
    chunk.packed = packed
    patches = assign_patches(chunk, torch.zeros_like(ids, dtype=torch.bool), settings.documents)
    return read_bytes(model.model, settings, chunk, cache, ForwardInputs(patches=patches)).byte_states[-1]


def read_block(
    model,
    settings: ForwardSettings,
    cache: BltCache,
    last_state: Tensor,
    ids: Tensor,
    is_masked: Tensor,
    packed=None,
) -> Tensor:
    """Computes fp32 logits `(B, K - 1, V)` of the masks of a block behind each row's text, which the cache does not count.

    Args:
        model: a [`BltForCausalLM`] with a mask embedding.
        settings: of its configuration.
        cache: has read all bytes before the block, and has room for it.
        last_state: `(B, 1, W)`, encoder state of its first byte, the last of the text.
        ids: int64 `(B, K)`; anything where `is_masked`, bool `(B, K)`.
        packed: a [`PackedStacks`] of the model; None: the modules run.
    """
    blt = model.model
    chunk = next_bytes(ids, None, cache, settings.documents)
    chunk.packed = packed
    embeds = torch.where(is_masked[..., None], model.mask_embedding.weight[0], blt.local_encoder.embed_tokens(ids))
    states = torch.cat([last_state, embeds[:, 1:].to(last_state.dtype)], dim=1)
    last = (chunk.previous.num_patches[:, None] - 1).expand_as(ids)
    patches, hidden = LatentIndex.find(last, settings.decoder_window)
    latent_index = LatentIndex(patches % cache.latent_slots.size, hidden)
    start = None if chunk.document_start is None else chunk.document_start[:, :1].expand_as(ids)
    slots = cache.local_slots
    span = BlockSpan(
        slots.seen or slots.size, chunk.row_positions, settings.local_window, start, settings.attention,
        chunk.slot_index(slots, 0),
    )  # fmt: skip
    states = blt.local_decoder(states, cache.latents.values, chunk, latent_index, span, cache)
    return model.lm_head(states[:, :-1]).float()


@dataclass
class FilledBlock:
    """Holds a block that has no mask left.

    Attributes:
        ids: int64 `(B, K - 1)`, the bytes behind the first.
        logits, scores: fp32 `(B, K - 1, V)`, from which each was chosen, before and after the logits processors.
        num_reads: how often the block was read.
    """

    ids: Tensor
    logits: Tensor
    scores: Tensor
    num_reads: int


def fill_block(
    model,
    runner: StepRunner,
    text: RaggedText,
    block_size: int,
    needed: list[int],
    choose: Callable[[Tensor, Tensor], Tensor] | None,
    do_sample: bool,
) -> FilledBlock:
    """Fills in the bytes behind the last one of each row.

    Logits processors see each byte behind those before it in the block. Where such a byte is still masked, they see its
    most probable value when the block was last read (at first, the padding).

    Args:
        model: a [`BltForCausalLM`] with a mask embedding.
        runner: of its steps.
        text: the texts; the cache has read all but the last byte of each.
        block_size: `K`.
        needed: bytes of each row that must be filled in; the masks behind them may be left as they are.
        choose: picks the masked bytes to keep, from scores and `is_masked`, as [`Unmasking.choose`]. None: all.
    """
    last, rows, cache = text.last_ids(), len(needed), runner.cache
    stages = [read_last, read_block]
    if rows == 1 and runner.compiles:
        key = block_size, runner.hooks
        stages = [model.model.compiled_steps.find(stage, key, cache, runner.starts_by_cpp) for stage in stages]
    read_first, read = stages
    cache.begin(rows, block_size, True, last.device)
    last_state = read_first(model, runner.settings, cache, last, runner.packed)
    ids = last.new_full((rows, block_size - 1), text.pad_token_id)
    is_masked = torch.ones_like(ids, dtype=torch.bool)
    is_needed = torch.arange(block_size - 1, device=ids.device) < torch.tensor(needed, device=ids.device)[:, None]
    logits = scores = None
    num_reads = 0
    while num_reads == 0 or (choose is not None and bool((is_masked & is_needed).any())):
        block = torch.cat([last, ids], dim=1)
        new_logits = read(
            model, runner.settings, cache, last_state, block, torch.nn.functional.pad(is_masked, (1, 0)), runner.packed
        )
        if text.with_context:
            put_drafts(text, ids)
        new_scores = new_logits if is_in_order(text) else text.process(new_logits)
        if do_sample:
            drawn = torch.multinomial(new_scores.softmax(dim=-1).flatten(0, 1), num_samples=1).view_as(ids)
        else:
            drawn = new_scores.argmax(dim=-1)
        ids = torch.where(is_masked, drawn, ids)
        if logits is None:
            logits, scores = new_logits, new_scores
        else:
            logits = torch.where(is_masked[..., None], new_logits, logits)
            scores = torch.where(is_masked[..., None], new_scores, scores)
        kept = is_masked if choose is None else choose(new_scores, is_masked)
        is_masked = is_masked & ~kept
        num_reads += 1
    return FilledBlock(ids, logits, scores, num_reads)


class BlockDrafts(DraftSource):
    """Drafts as BLT-DV does: fills in a block at once, for the whole model to verify up to the first byte it is unsure of.

    Args:
        model: a [`BltForCausalLM`] with a mask embedding.
        runner: of its steps.
        block_size: bytes of a block; one of them is the last of the text.
        do_sample: draw the drafts from processed logits.
    """

    def __init__(self, model, runner: StepRunner, block_size: int, do_sample: bool):
        self.model, self.runner, self.block_size, self.do_sample = model, runner, block_size, do_sample

    @torch.no_grad()
    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        needed = [min(limit, self.block_size - 1) for limit in limits]
        block = fill_block(self.model, self.runner, text, self.block_size, needed, None, self.do_sample)
        probs = block.scores.softmax(dim=-1)
        # Not what was drawn decides, but of what: so sampling keeps its distribution.
        sure = (probs.amax(dim=-1) >= _LEAST_SURE).long().cumprod(dim=1).sum(dim=1).tolist()
        lengths = [min(limit, max(count, 1)) for limit, count in zip(needed, sure)]
        most = max(lengths)
        return Drafts(block.ids[:, :most], lengths, probs[:, :most] if self.do_sample else None)


@torch.no_grad()
def decode_blocks(
    model, runner: StepRunner, text: RaggedText, block_size: int, unmasking: Unmasking, do_sample: bool
) -> None:
    """Writes texts to their ends as BLT-D does, block by block and without verification.

    Each turn fills in a block, reads it with the whole model, and takes the first byte of the next block from there. The
    cache has read all bytes but the last one of each row, before and after.
    """
    while not text.is_done:
        is_active = text.active
        needed = [
            min(text.max_length - length, block_size - 1) if active else 0
            for length, active in zip(text.lengths, is_active)
        ]
        last = text.last_ids()
        block = fill_block(model, runner, text, block_size, needed, unmasking.choose, do_sample)
        added = text.append(block.ids, needed, block.logits, block.scores)
        # A row that goes on is read to its last byte and gets another one; of one that has stopped, the last is not read.
        goes_on = [active and still for active, still in zip(is_active, text.active)]
        lengths = [n + on if active else 0 for n, on, active in zip(added, goes_on, is_active)]
        logits = runner.step(torch.cat([last, block.ids], dim=1), lengths)
        if not any(goes_on):
            continue
        at = torch.tensor(lengths, device=logits.device).clamp_min(1)[:, None, None] - 1
        logits = logits.gather(1, at.expand(-1, 1, logits.shape[-1]))
        scores = text.process(logits)
        ids = torch.multinomial(scores[:, 0].softmax(dim=-1), num_samples=1) if do_sample else scores.argmax(dim=-1)
        text.append(ids, [int(on) for on in goes_on], logits, scores)
    finish_rows(runner, text)


def decode(model, runner: StepRunner, text: RaggedText, generation_config) -> None:
    """Writes texts to their ends with blocks, as the configuration of `generate` says.

    Args:
        model: a [`BltForCausalLM`] with a mask embedding.
        runner: of its steps. The cache has read all bytes but the last one of each row, before and after.
    """
    size, do_sample = generation_config.diffusion_block_size, generation_config.do_sample
    runner.cache.reserve_slack(round_up_bytes(size + 1))
    if generation_config.verify:
        decode_drafted(runner, BlockDrafts(model, runner, size, do_sample), text, do_sample)
    else:
        decode_blocks(model, runner, text, size, Unmasking.from_config(generation_config), do_sample)


__all__ = [
    "UNMASKING_RULES",
    "BlockDrafts",
    "FilledBlock",
    "Unmasking",
    "check_processors",
    "check_settings",
    "decode",
    "decode_blocks",
    "fill_block",
    "read_block",
]
