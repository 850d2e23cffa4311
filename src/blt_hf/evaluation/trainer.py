"""Bits per byte in `Trainer`."""

import math

import torch
from torch import Tensor, nn

from ..model.patching_blt import BYTE_OFFSET, IGNORED_LABEL, VOCAB_SIZE
from ..tokenizer.encoding import to_bytes


class TrainerBitsPerByte:
    """Adds `bits_per_byte` to the results of `Trainer.evaluate`, for byte models and for token models.

        metric = TrainerBitsPerByte()
        Trainer(..., compute_metrics=metric, preprocess_logits_for_metrics=metric.preprocess_logits)

    Keeps two numbers of each row instead of its logits. Labels of -100, special tokens, and the first column, which
    nothing predicts, are not counted.

    Args:
        tokenizer: of a token model; the bytes of a row are those of its decoded labels. None: labels are ids of a BLT.
    """

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer

    def preprocess_logits(self, logits: Tensor | tuple, labels: Tensor) -> Tensor:
        """Sums nats and counts tokens of each row, fp32 `(B, 2)`, from logits `(B, S, V)`, alone or first in a tuple."""
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        labels = self._counted(labels)[:, 1:]
        nats = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        return torch.stack([nats.view(labels.shape).sum(dim=1), (labels != IGNORED_LABEL).sum(dim=1).float()], dim=1)

    def _counted(self, labels: Tensor) -> Tensor:
        """Replaces special tokens in `labels` by -100."""
        if self.tokenizer is None:
            is_special = (labels < BYTE_OFFSET) | (labels >= VOCAB_SIZE)
        else:
            is_special = torch.isin(labels, torch.tensor(self.tokenizer.all_special_ids, device=labels.device))
        return torch.where(is_special, IGNORED_LABEL, labels)

    def __call__(self, prediction) -> dict[str, float]:
        """Computes the metric from the results of `preprocess_logits` that `Trainer` has gathered."""
        rows = torch.as_tensor(prediction.predictions, dtype=torch.float64)
        if rows.dim() != 2 or rows.shape[1] != 2:
            raise ValueError(
                f"predictions have shape {tuple(rows.shape)}; pass `preprocess_logits` as Trainer's "
                "`preprocess_logits_for_metrics`, which makes two numbers a row of them."
            )
        num_bytes = int(rows[:, 1].sum())
        if self.tokenizer is not None:
            labels = self._counted(torch.as_tensor(prediction.label_ids))[:, 1:]
            texts = self.tokenizer.batch_decode([row[row != IGNORED_LABEL].tolist() for row in labels])
            num_bytes = sum(len(to_bytes(text)) for text in texts)
        if num_bytes == 0:
            raise ValueError("no label is a byte, so there are no bits per byte.")
        return {"bits_per_byte": float(rows[:, 0].sum()) / (math.log(2) * num_bytes)}


__all__ = ["TrainerBitsPerByte"]
