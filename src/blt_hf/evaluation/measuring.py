"""Bits per byte of a model on texts of any length, the same number for byte models and for token models."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.patching_blt import BOS_TOKEN_ID
from ..tokenizer.encoding import byte_ids, to_bytes
from ..training.data import check_texts, evaluating, pad_rows


DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True)
class Measurement:
    """Holds how well a model predicts some texts.

    Attributes:
        bits_per_byte: summed cross-entropy of all bytes (or tokens) in bits, divided by the number of UTF-8 bytes.
        nats: the summed cross-entropy in nats.
        num_texts, num_bytes, num_tokens: measured ones, each byte once. A byte model has a token for each byte.
        bytes_per_patch: the bytes, divided by the patches that start at one of them; None: the model has no patches.
        seconds: time in the model. Windows that overlap make it longer.
    """

    bits_per_byte: float
    nats: float
    num_texts: int
    num_bytes: int
    num_tokens: int
    bytes_per_patch: float | None
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / self.seconds


@dataclass
class _Window:
    """`ids`: a start token, `context` ids that were scored before, and those to score, about `num_bytes` of text."""

    ids: list[int]
    context: int
    num_bytes: float = 0.0


def measure_bits_per_byte(
    model: nn.Module,
    texts: Iterable[str | bytes],
    tokenizer=None,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    on_progress: Callable[[float], None] | None = None,
) -> Measurement:
    """Measures bits per byte of a causal language model.

    Each text begins with a start token (the tokenizer's BOS, or its EOS if it has no BOS). A text longer than
    `max_length` is read in windows, each `stride` ids after the one before. Each window begins with the start token
    and scores only ids that no window before it has scored; the ids before these are its context.

    Args:
        model: a BLT, a [`BltPatcher`], or any causal language model of transformers, with `tokenizer`.
        texts: UTF-8 for a token model, any bytes for a byte model.
        tokenizer: of a token model. Byte models read the bytes as they are, without special tokens.
        max_length: ids a window, start token included; None: as the config says, at most 4096.
        stride: ids scored in each window after the first; None: half a window.
        batch_size: windows at a time.
        on_progress: called with the number of bytes scored (of a token model, about), after each batch.
    Returns:
        [`Measurement`].
    Raises:
        ValueError: no text, one str for all texts, a text that is not UTF-8 for a token model, or windows that do not
            fit together.
    """
    check_texts(texts)
    is_byte_model = getattr(model.config, "model_type", None) in ("blt", "blt_patcher")
    if not is_byte_model and tokenizer is None:
        raise ValueError(f"{type(model).__name__} reads tokens; pass its `tokenizer`.")
    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    max_length = min(limit, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"`max_length` must be at least 2 and `batch_size` 1; got {max_length} and {batch_size}.")
    stride = max(max_length // 2, 1) if stride is None else stride
    if not 1 <= stride < max_length:
        raise ValueError(f"`stride` must be at least 1 and less than `max_length` ({max_length}); got {stride}.")
    encode = _encode_bytes if is_byte_model else _token_encoder(tokenizer)

    nats, seconds = 0.0, 0.0
    num_texts = num_bytes = num_tokens = num_patches = 0
    has_patches = getattr(model.config, "model_type", None) == "blt"
    pending: list[_Window] = []

    def flush() -> None:
        nonlocal nats, seconds, num_patches, num_tokens
        started = time.perf_counter()
        # `.item()` inside waits for the device, so the clock measures the work and not its launch.
        batch_nats, batch_patches = _score(model, pending, has_patches)
        seconds += time.perf_counter() - started
        nats += batch_nats
        num_patches += batch_patches
        num_tokens += sum(len(window.ids) - 1 - window.context for window in pending)
        if on_progress is not None:
            on_progress(sum(window.num_bytes for window in pending))
        pending.clear()

    with evaluating(model):
        for text in texts:
            start, ids, size = encode(text)
            if not ids:
                continue
            num_texts += 1
            num_bytes += size
            for window in _windows(start, ids, max_length, stride):
                window.num_bytes = size * (len(window.ids) - 1 - window.context) / len(ids)
                pending.append(window)
                if len(pending) == batch_size:
                    flush()
        if pending:
            flush()
    if not num_bytes:
        raise ValueError("`texts` hold no byte to measure.")
    return Measurement(
        bits_per_byte=nats / (math.log(2) * num_bytes),
        nats=nats,
        num_texts=num_texts,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        bytes_per_patch=num_bytes / num_patches if has_patches else None,
        seconds=seconds,
    )


def _encode_bytes(text: str | bytes) -> tuple[int, list[int], int]:
    ids = byte_ids(text)
    return BOS_TOKEN_ID, ids, len(ids)


def _token_encoder(tokenizer) -> Callable[[str | bytes], tuple[int, list[int], int]]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("`tokenizer` has neither BOS nor EOS, so nothing can stand before the first token of a text.")
    has_warned = False

    def encode(text: str | bytes) -> tuple[int, list[int], int]:
        nonlocal has_warned
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"a text is not UTF-8, which a token model needs: {error}") from error
        ids = tokenizer(text, add_special_tokens=False, truncation=False).input_ids
        if not has_warned and tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            warnings.warn(
                "the tokenizer does not give back every text as it was, so the model is not asked for all of its bytes "
                "and the bits per byte come out too low.",
                stacklevel=3,
            )
            has_warned = True
        return start, ids, len(to_bytes(text))

    return encode


def _windows(start: int, ids: list[int], max_length: int, stride: int) -> Iterator[_Window]:
    """Yields windows of `max_length` ids that together score each of `ids` once."""
    room = max_length - 1
    scored = 0
    while scored < len(ids):
        end = min(scored + (stride if scored else room), len(ids))
        first = max(end - room, 0)
        yield _Window([start, *ids[first:end]], scored - first)
        scored = end


def _score(model: nn.Module, windows: list[_Window], has_patches: bool) -> tuple[float, int]:
    """Sums the nats of the scored ids, and counts the patches that start at them."""
    width = max(len(window.ids) for window in windows)
    device = next(model.parameters()).device
    ids = pad_rows([window.ids for window in windows], 0).to(device)
    mask = pad_rows([[1] * len(window.ids) for window in windows], 0).to(device)
    columns = torch.arange(width, device=device)
    # The start token and the context were scored before, or are not text.
    first = torch.tensor([1 + window.context for window in windows], device=device)
    is_scored = (columns >= first[:, None]) & (mask != 0)
    options = {"output_patches": True} if has_patches else {}
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    targets = ids[:, 1:][is_scored[:, 1:]]
    logits = output.logits[:, :-1][is_scored[:, 1:]]
    nats = 0.0
    for part, wanted in zip(logits.split(4096), targets.split(4096)):  # vocabularies of token models are large
        nats += nn.functional.cross_entropy(part.float(), wanted, reduction="none").double().sum().item()
    num_patches = int(_patch_starts(output.patch_lengths, width)[is_scored].sum()) if has_patches else 0
    return nats, num_patches


def _patch_starts(patch_lengths: Tensor, width: int) -> Tensor:
    """Returns bool `(B, width)`: positions that start a patch."""
    starts = patch_lengths.cumsum(dim=1) - patch_lengths
    is_start = (patch_lengths > 0) & (starts < width)
    found = torch.zeros(patch_lengths.shape[0], width + 1, dtype=torch.int64, device=patch_lengths.device)
    return found.scatter_add_(1, starts.clamp_max(width), is_start.long())[:, :width] > 0


__all__ = ["Measurement", "measure_bits_per_byte"]
