"""Thresholds of the entropy rules for a wanted patch size."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model.patching_blt import BOS_TOKEN_ID, BYTE_OFFSET, PatchingRule
from ..patches.lengths import compute_patch_lengths
from ..tokenizer.encoding import byte_ids
from .data import PatchFinder, check_texts, pad_rows, without_next_byte


@dataclass(frozen=True)
class Calibration:
    """A threshold, and the patches of the texts on which it was found.

    The BOS of each row is a patch of its own by every rule; it is not counted.

    Attributes:
        rule: the rule with its new threshold.
        newline_reset: whether the entropy model forgot the bytes before each newline.
        target_patch_size: bytes a patch asked for.
        mean_patch_size: bytes a patch achieved.
        num_bytes, num_patches: counts of the measured texts.
        histogram: how many patches have each length in bytes, by length.
    """

    rule: PatchingRule
    newline_reset: bool
    target_patch_size: float
    mean_patch_size: float
    num_bytes: int
    num_patches: int
    histogram: dict[int, int]

    @property
    def threshold(self) -> float:
        """In nats: of the entropy, or with `rule.monotonicity` of its rise."""
        return self.rule.threshold

    @property
    def settings(self) -> dict:
        """The fields of [`BltConfig`] that describe the rule."""
        return {
            "patching_mode": "entropy",
            "patching_threshold": self.rule.threshold,
            "patching_threshold_add": self.rule.threshold_add,
            "monotonicity": self.rule.monotonicity,
            "max_patch_length": self.rule.max_patch_length,
            "patching_newline_reset": self.newline_reset,
        }

    def apply(self, config):
        """Writes the rule into a [`BltConfig`], or that of a model, and returns it. The next forward uses the rule.

        Raises:
            ValueError: the config cannot hold the rule.
        """
        config = getattr(config, "config", config)
        if getattr(config, "model_type", None) != "blt":
            raise ValueError(f"`config` must be a BltConfig or a model with one; got {type(config).__name__}.")
        for name, value in self.settings.items():
            setattr(config, name, value)
        config.validate_patching()
        return config


def calibrate_threshold(
    patcher: nn.Module,
    texts: Iterable[str | bytes | Sequence[int]],
    target_patch_size: float = 4.5,
    *,
    monotonicity: bool | None = None,
    threshold_add: float | None = None,
    max_patch_length: int | None = None,
    newline_reset: bool | None = None,
    tokenizer=None,
    batch_size: int = 8,
    max_length: int = 8192,
    on_progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Finds the threshold with which patches hold `target_patch_size` bytes on average.

    The entropy model runs once over the texts. The search then applies the whole rule at many thresholds, and returns
    the one whose mean is closest.

    Args:
        patcher: a [`BltPatcher`], or a BLT. The rule of a BLT gives the values of arguments that are None.
        texts: texts like those that the model will see, and that the entropy model was not trained on; or lists of ids
            that begin with a BOS.
        target_patch_size: bytes.
        monotonicity: a patch starts where the entropy rises by more than the threshold.
        threshold_add: nats; it must also rise by more than this.
        max_patch_length: bytes; longer patches are split.
        newline_reset: the entropy model forgets the bytes before each newline.
        tokenizer: turns texts into ids; None: a BOS and the bytes, without a search for special tokens.
        batch_size: rows for the entropy model at a time.
        max_length: ids; longer texts are cut into rows of this length.
        on_progress: called with the number of bytes whose entropies have been computed, after each batch.
    Returns:
        [`Calibration`].
    Raises:
        ValueError: no text, one str for all texts, no entropy model, or no threshold that comes to the wanted size.
    """
    check_texts(texts)
    finder = PatchFinder.of(patcher)
    if finder.rule.mode != "entropy":
        raise ValueError(
            f"patching mode {finder.rule.mode!r} has no threshold to search for; pass the BltPatcher to calibrate."
        )
    if target_patch_size < 1:
        raise ValueError(f"`target_patch_size` must be at least 1 byte; got {target_patch_size}.")
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"`max_length` must be at least 2 and `batch_size` 1; got {max_length} and {batch_size}.")
    options = {"monotonicity": monotonicity, "threshold_add": threshold_add, "max_patch_length": max_patch_length}
    rule = dataclasses.replace(finder.rule, **{name: value for name, value in options.items() if value is not None})
    if rule.monotonicity and rule.threshold_add is not None:
        raise ValueError(
            "`monotonicity` and `threshold_add` are two different rules; set one of them, got monotonicity=True and "
            f"threshold_add={rule.threshold_add}."
        )
    if newline_reset is not None:
        finder.documents = replace(finder.documents, newline_reset=newline_reset)
    rows = [row for text in texts for row in _rows(text, tokenizer, max_length)]
    if not any(len(row) > 1 for row in rows):
        raise ValueError("`texts` hold no byte to calibrate on.")
    rows.sort(key=len)  # rows of similar lengths have little padding
    batches = []
    for first in range(0, len(rows), batch_size):
        batches.append(_entropies(finder, rows[first : first + batch_size]))
        if on_progress is not None:
            on_progress(sum(len(row) - 1 for row in rows[first : first + batch_size]))
    return _search(rule, finder.documents.newline_reset, batches, target_patch_size)


def _rows(text: str | bytes | Sequence[int], tokenizer, max_length: int) -> Iterator[list[int]]:
    """Yields the ids of a text in rows of at most `max_length`. If the first id is special, each row begins with it."""
    if not isinstance(text, (str, bytes)):
        ids = list(text)
    elif tokenizer is not None:
        ids = list(tokenizer(text).input_ids)
    else:
        ids = [BOS_TOKEN_ID, *byte_ids(text)]
    start = ids[:1] if ids and ids[0] < BYTE_OFFSET else []
    step = max_length - len(start)
    for first in range(len(start), len(ids), step):
        yield start + ids[first : first + step]


def _entropies(finder: PatchFinder, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Computes entropies, fp32 `(B, S)`, and mask of a batch, on the CPU."""
    mask = pad_rows([[1] * len(row) for row in rows], 0)
    device = finder.patcher.device
    entropies = finder.entropies(pad_rows(rows, 0).to(device), mask.to(device))
    return entropies.float().cpu(), mask


def _search(
    rule: PatchingRule, newline_reset: bool, batches: list[tuple[Tensor, Tensor]], target: float
) -> Calibration:
    """Bisects all thresholds that make a difference; the mean never falls as the threshold rises."""
    scores = []
    for entropies, mask in batches:
        if rule.monotonicity:
            scores.append((entropies[:, 1:] - entropies[:, :-1])[mask[:, 1:] != 0])
        else:
            scores.append(entropies[mask != 0])
    scores = torch.cat(scores).unique()

    def rule_at(index: int) -> PatchingRule:
        """Returns the rule with a threshold that exactly the scores from `index` on exceed."""
        if index == 0:
            threshold = scores[0] - 1
        elif index == len(scores):
            threshold = scores[-1]
        else:
            below, above = scores[index - 1], scores[index]
            threshold = (below + above) / 2
            threshold = threshold if threshold < above else below  # no number of fp32 lies between the two
        return dataclasses.replace(rule, threshold=float(threshold))

    def count(at: PatchingRule) -> Tensor:
        """Counts patches by length, int64."""
        counts = torch.zeros(1, dtype=torch.int64)
        for entropies, mask in batches:
            lengths = compute_patch_lengths(at, entropies=entropies, attention_mask=mask)
            lengths = without_next_byte(lengths)[:, 1:]  # the first patch is the BOS
            new = torch.bincount(lengths.flatten(), minlength=len(counts))
            new[: len(counts)] += counts
            counts = new
        counts[0] = 0
        return counts

    def mean(index: int) -> float:
        counts = count(rule_at(index))
        return float((counts * torch.arange(len(counts))).sum() / counts.sum())

    low, high = 0, len(scores)
    smallest, largest = mean(low), mean(high)
    if not smallest <= target <= largest:
        limit = "" if rule.max_patch_length is None else f" with `max_patch_length` {rule.max_patch_length}"
        raise ValueError(
            f"`target_patch_size` = {target} cannot be reached on these texts{limit}: their patches hold between "
            f"{smallest:.3f} bytes (lowest threshold) and {largest:.3f} (highest)."
        )
    while high - low > 1:
        middle = (low + high) // 2
        if mean(middle) < target:
            low = middle
        else:
            high = middle
    best = min((low, high), key=lambda index: abs(mean(index) - target))
    found = rule_at(best)
    counts = count(found)
    num_bytes, num_patches = int((counts * torch.arange(len(counts))).sum()), int(counts.sum())
    histogram = {length: int(n) for length, n in enumerate(counts.tolist()) if n}
    return Calibration(found, newline_reset, target, num_bytes / num_patches, num_bytes, num_patches, histogram)


__all__ = ["Calibration", "calibrate_threshold"]
