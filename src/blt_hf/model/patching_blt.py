"""Patching: from entropies or bytes to patches, in tensor functions without state.

The functions mark the last byte of each patch, its end: byte `i` is an end if position `i + 1` starts a patch. Every
rule here knows that as soon as byte `i` is there, so a text gives the same patches whole and byte by byte. Positions 0
and 1 of a text always start a patch, so byte 0 is always an end. A patch whose end has not come yet is *open*.

Dimension letters: `B` rows, `S` bytes, `P` patches.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .names_blt import is_exporting, kept_arange, largest_count, running_max, take_columns


PATCHING_MODES = ("entropy", "space", "static", "byte")

# Ids of tokens: four special ones, then byte `b` as `b + BYTE_OFFSET`. Configuration and tokenizer take them from here.
BOE_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, BPE_TOKEN_ID = range(4)
BYTE_OFFSET = 4
VOCAB_SIZE = BYTE_OFFSET + 256
NEWLINE_ID = ord("\n") + BYTE_OFFSET
IGNORED_LABEL = -100  # where `labels` hold it, nothing is learned; torch's `cross_entropy` knows the same number


@dataclass(frozen=True)
class PatchingRule:
    """Says where patches start.

    Attributes:
        mode: `"entropy"`, `"space"`, `"static"`, `"byte"`, or the name of a rule of your own; see
            `blt_hf.register_patching_rule`.
        threshold: nats (entropy mode; your own rule may read it, too).
        threshold_add: nats; the entropy must also rise by more than this (entropy mode).
        monotonicity: the entropy must rise by more than `threshold` (entropy mode).
        patch_size: bytes (static mode).
        max_patch_length: bytes; longer patches are split, whatever the mode. None: no limit.
    """

    mode: str = "entropy"
    threshold: float = 1.335442066192627
    threshold_add: float | None = None
    monotonicity: bool = False
    patch_size: int = 4
    max_patch_length: int | None = None

    @classmethod
    def from_config(cls, config) -> "PatchingRule":
        """Reads the rule that a [`BltConfig`] describes."""
        return cls(
            mode=config.patching_mode,
            threshold=config.patching_threshold,
            threshold_add=config.patching_threshold_add,
            monotonicity=config.monotonicity,
            patch_size=int(config.patch_size or 1),
            max_patch_length=config.max_patch_length,
        )

    @property
    def uses_entropies(self) -> bool:
        """Whether the rule reads entropies, so that an entropy model must run."""
        return self.mode == "entropy" or (self.mode not in PATCHING_MODES and find_rule(self.mode).uses_entropies)

    @property
    def uses_ids(self) -> bool:
        """Whether the rule reads ids, so that `inputs_embeds` are not enough."""
        return self.mode == "space" or self.mode not in PATCHING_MODES

    @property
    def window(self) -> int:
        """Bytes that the rule reads to decide about one byte, that byte included."""
        return 2 if self.mode in PATCHING_MODES else find_rule(self.mode).window


def find_rule(name: str):
    """Finds the `blt_hf.rules.RegisteredRule` of that name.

    Raises:
        ValueError: there is none.
    """
    # Not imported: code that came with a checkpoint looks here as well, and may do without the package.
    registry = sys.modules.get("blt_hf.rules")
    rule = None if registry is None else registry.RULES.get(name)
    if rule is None:
        raise ValueError(
            f"`patching_mode` must be one of {PATCHING_MODES}, or a rule that `register_patching_rule` of the package "
            f"blt_hf was given before; got {name!r}. Run the code that registers {name!r} first, or choose another rule."
        )
    return rule


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Computes entropies in nats, fp32 `(...)`, of logits `(..., vocabulary)` of any floating dtype."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def shift_right(values: Tensor, first: Tensor) -> Tensor:
    """Moves `values` `(B, S)` one byte later along the row, with `first` `(B,)` in front; same shape and dtype."""
    first = first[:, None].to(values.dtype)
    if is_exporting():  # without a tensor of one column less, which might have none
        return take_columns(torch.cat([first, values], dim=1), 0, values.shape[1])
    return torch.cat([first, values[:, :-1]], dim=1)


def entropy_patch_ends(
    rule: PatchingRule, entropies: Tensor, previous_entropies: Tensor | None, positions: Tensor
) -> Tensor:
    """Finds where patches end by the entropy rules, bool `(B, S)`.

    Arguments as [`find_patch_ends`]; `previous_entropies`: one byte earlier, for rules on differences, ignored at the
    first byte of a text.

    Source: arXiv 2412.09871 section 2.3; exact edges from the recorded vectors of Meta's code: with a rule on
        differences position 2 always starts a patch, and with `threshold_add` position 3 never does.
    """
    if rule.monotonicity:
        ends = (entropies - previous_entropies > rule.threshold) | (positions == 1)
    elif rule.threshold_add is not None:
        ends = (entropies - previous_entropies > rule.threshold_add) & (entropies > rule.threshold)
        ends = (ends & (positions != 2)) | (positions == 1)
    else:
        ends = entropies > rule.threshold
    return ends | (positions == 0)


def space_patch_ends(input_ids: Tensor, previous_ids: Tensor, positions: Tensor) -> Tensor:
    """Finds where patches end by the space rule, bool `(B, S)`.

    A patch ends after a space-like byte that follows one that is not, and after every special id. Arguments as
    [`find_patch_ends`]; `previous_ids`: one byte earlier, ignored at the first byte of a text.
    """

    def is_special(ids: Tensor) -> Tensor:
        return (ids < BYTE_OFFSET) | (ids >= VOCAB_SIZE)

    special = is_special(input_ids)
    previous_breaks = is_special(previous_ids) | is_space_like(previous_ids)
    return special | (~special & is_space_like(input_ids) & ~previous_breaks) | (positions == 0)


def is_space_like(ids: Tensor) -> Tensor:
    """Finds every byte but `0-9`, `A-Z`, `a-z` and UTF-8 continuation bytes (0x80-0xBF) among ids, also special ids."""
    byte = ids - BYTE_OFFSET
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    letter = ((byte | 0x20) >= ord("a")) & ((byte | 0x20) <= ord("z")) & (byte < 0x80)
    return ~(digit | letter | ((byte >= 0x80) & (byte < 0xC0)))


def split_long_patches(ends: Tensor, text_starts: Tensor, open_bytes: Tensor, max_patch_length: int) -> Tensor:
    """Adds to `ends` `(B, S)` an end wherever a patch has reached `max_patch_length` bytes `m`: `m, m, ..., remainder`.

    Args:
        text_starts: bool `(B, S)`, where a text begins inside the row.
        open_bytes: int64 `(B,)`, bytes of the patch that was still open before these.
    """
    index = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    follows_end = shift_right(ends, torch.zeros_like(open_bytes))
    patch_start = running_max(torch.where(follows_end | text_starts, index, -open_bytes[:, None]), -open_bytes)
    return ends | ((index - patch_start + 1) % max_patch_length == 0)


def open_patch_bytes(ends: Tensor, open_bytes: Tensor) -> Tensor:
    """Counts the bytes of the open patch after each byte, int64 `(B, S)`; 0 where the byte ends its patch.

    `open_bytes`: int64 `(B,)`, bytes of the patch that was still open before these.
    """
    if ends.shape[1] == 1 and not is_exporting():
        return (open_bytes[:, None] + 1).masked_fill(ends, 0)
    index = kept_arange(0, ends.shape[1], ends.device)
    before = -1 - open_bytes
    return index - running_max(torch.where(ends, index, before[:, None]), before)


def patch_lengths_from_ends(ends: Tensor, num_bytes: Tensor | None = None) -> Tensor:
    """Counts the bytes of patches as Meta's patcher does: the next, not yet known byte included.

    Args:
        ends: bool `(B, S)`; the bytes of a row stand at its beginning.
        num_bytes: int64 `(B,)`, bytes of each row; None: `S`.
    Returns:
        int64 `(B, P)`, zeros on the right; row `b` sums to `num_bytes[b] + 1` (0 for an empty row).
        `ends [T, F, T, F] -> [[1, 2, 2]]`.
    """
    num_rows, length = ends.shape
    if num_bytes is None:
        num_bytes = ends.new_full((num_rows,), length, dtype=torch.int64)
    index = torch.arange(length, device=ends.device)
    ends = ends & (index < num_bytes[:, None])
    starts = torch.cat([num_bytes[:, None] > 0, ends], dim=1)
    patch_ids = (starts.long().cumsum(dim=1) - 1).clamp_min(0)
    exists = torch.arange(length + 1, device=ends.device) <= num_bytes[:, None]
    exists = exists & (num_bytes[:, None] > 0)
    num_patches = largest_count(starts.sum(dim=1), 1)
    lengths = torch.zeros(num_rows, num_patches, dtype=torch.int64, device=ends.device)
    # Positions past the row's end add 0 to its last patch.
    return lengths.scatter_add_(1, patch_ids, exists.long())


def patch_ends_from_lengths(patch_lengths: Tensor, num_bytes: int) -> Tensor:
    """Inverts [`patch_lengths_from_ends`].

    Args:
        patch_lengths: int `(B, P)`, zeros on the right. A row that sums to the bytes of its text plus 1 says whether
            the last byte ends a patch. A row that sums to the bytes alone leaves the last patch open.
        num_bytes: `S`, bytes to label.
    Returns:
        bool `(B, S)`.
    """
    starts = patch_lengths.cumsum(dim=1) - patch_lengths  # (B, P), of each patch
    is_end = (patch_lengths > 0) & (starts >= 1) & (starts <= num_bytes)
    ends = torch.zeros(patch_lengths.shape[0], num_bytes + 1, dtype=torch.int64, device=patch_lengths.device)
    return take_columns(ends.scatter_add_(1, starts.clamp(0, num_bytes).long(), is_end.long()), 1, num_bytes + 1) > 0


def find_patch_ends(
    rule: PatchingRule, input_ids: Tensor | None, entropies: Tensor | None, positions: Tensor,
    past_ids: Tensor | None = None, past_entropies: Tensor | None = None, open_bytes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Applies `rule` to the next bytes of each row.

    Args:
        input_ids: int64 `(B, S)`; needed if the rule reads ids.
        entropies: `(B, S)` nats of the byte after each byte; needed if it reads entropies.
        positions: int64 `(B, S)`, index of each byte in its text; 0 begins a text.
        past_ids, past_entropies: `(B, H)`, those before the first byte, the newest last: one of them, or as many as
            the window of a registered rule says. Any values at the start of a text. None: all rows start here.
        open_bytes: int64 `(B,)`, bytes of the open patch; 0 at the start of a text. None: 0.
    Returns:
        bool `(B, S)`: byte `i` is the last of its patch.
    """
    num_rows = positions.shape[0]
    if rule.mode == "entropy":
        previous = None
        if rule.monotonicity or rule.threshold_add is not None:
            before = entropies.new_zeros(num_rows) if past_entropies is None else past_entropies[:, -1]
            previous = shift_right(entropies, before)
        ends = entropy_patch_ends(rule, entropies, previous, positions)
    elif rule.mode == "space":
        before = input_ids.new_zeros(num_rows) if past_ids is None else past_ids[:, -1]
        ends = space_patch_ends(input_ids, shift_right(input_ids, before), positions)
    elif rule.mode == "static":
        ends = positions % rule.patch_size == 0
    elif rule.mode == "byte":
        ends = torch.ones_like(positions, dtype=torch.bool)
    else:
        registered = find_rule(rule.mode)
        ends = registered.find_ends(rule, input_ids, entropies, positions, past_ids, past_entropies)
    if rule.max_patch_length is not None:
        open_bytes = positions.new_zeros(num_rows) if open_bytes is None else open_bytes
        ends = split_long_patches(ends, positions == 0, open_bytes, rule.max_patch_length)
    return ends


@dataclass
class RowLayout:
    """Maps between padded rows and rows that begin with their first byte.

    Attributes:
        source: int64 `(B, S)`, column of the i-th byte of each row (columns without text come last).
        rank: int64 `(B, S)`, the inverse of `source`.
        num_bytes: int64 `(B,)`.
    """

    source: Tensor
    rank: Tensor
    num_bytes: Tensor

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "RowLayout":
        """Reads an attention mask `(B, S)`; nonzero means text. Zeros may stand anywhere."""
        is_text = attention_mask != 0
        text_so_far = is_text.long().cumsum(dim=1)
        num_bytes = is_text.sum(dim=1)
        index = torch.arange(is_text.shape[1], device=is_text.device).expand_as(text_so_far)
        rank = torch.where(is_text, text_so_far - 1, num_bytes[:, None] + index - text_so_far)
        return cls(torch.zeros_like(rank).scatter_(1, rank, index), rank, num_bytes)

    def _gather(self, values: Tensor, index: Tensor) -> Tensor:
        index = index.view(*index.shape, *[1] * (values.dim() - 2)).expand(values.shape)
        return values.gather(1, index)

    def pack(self, values: Tensor) -> Tensor:
        """Moves the bytes of `values` `(B, S, ...)` to the beginning of their rows."""
        return self._gather(values, self.source)

    def unpack(self, values: Tensor) -> Tensor:
        """Moves them back; 0 where there is no text."""
        is_text = self.rank < self.num_bytes[:, None]
        is_text = is_text.view(*is_text.shape, *[1] * (values.dim() - 2))
        return torch.where(
            is_text, self._gather(values, self.rank), torch.zeros((), dtype=values.dtype, device=values.device)
        )
