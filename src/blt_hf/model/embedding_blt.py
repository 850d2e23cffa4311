"""Hashed n-gram embeddings of bytes."""

import torch
from torch import Tensor, nn

from .tracing_blt import is_exporting, sliding_windows


# Multipliers of the hash functions, in the order in which the released checkpoints use them.
HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


# Results of `hash_weights`. A plain dictionary, because torch.compile traces through it and not through functools.cache.
_hash_weights: dict[tuple, Tensor] = {}


def hash_weights(sizes: tuple[int, ...], num_functions: int, device: torch.device) -> Tensor:
    """int64 `(L, functions * sizes)`: factor of the id `L - 1 - l` bytes back in each hash, wrapped to 64 bits."""
    if is_exporting():  # a tensor of the program, that nothing else may use
        return _make_hash_weights(sizes, num_functions, device)
    key = (sizes, num_functions, device)
    if key not in _hash_weights:
        # A tensor that is made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            _hash_weights[key] = _make_hash_weights(sizes, num_functions, device)
    return _hash_weights[key]


def _make_hash_weights(sizes: tuple[int, ...], num_functions: int, device: torch.device) -> Tensor:
    longest = max(sizes)
    columns = []
    for function in range(num_functions):
        prime = HASH_PRIMES[function % len(HASH_PRIMES)]
        for size in sizes:
            powers = [(pow(prime, power, 2**64) + 2**63) % 2**64 - 2**63 for power in range(size)]
            columns.append([0] * (longest - size) + powers)
    return torch.tensor(columns, device=device).T.contiguous()


def ngram_hashes(
    input_ids: Tensor,
    history: Tensor | None,
    text_positions: Tensor,
    sizes: list[int],
    num_functions: int,
    num_rows: int,
) -> Tensor:
    """Rows of the fused hash table for the n-grams that end at each byte.

    The hash of ids `x_0 .. x_{n-1}` (oldest first) is `sum x_j * prime^j` in wrapping int64, modulo `num_rows`; ids
    before the text count as 0.

    Args:
        input_ids: int64 `(B, S)`.
        history: int64 `(B, H)`, the ids before them; None: none.
        text_positions: int64 `(B, S)`, index of each byte in its text.
        sizes: n-gram sizes.
        num_functions: hash functions; each has a table for each size.
        num_rows: rows of one table.
    Returns:
        int64 `(B, S, num_functions * len(sizes))`, function-major, with each table's offset added.
    Source: facebookresearch/blt `bytelatent/model/blt.py`, same values from one product of windows and powers.
    """
    longest, length, device = max(sizes), input_ids.shape[1], input_ids.device
    past = input_ids if history is None else torch.cat([history, input_ids], dim=1)
    missing = length + longest - 1 - past.shape[1]
    past = nn.functional.pad(past, (max(missing, 0), 0))[:, max(-missing, 0) :]
    age = torch.arange(longest - 1, -1, -1, device=device)
    windows = sliding_windows(past, 1, longest) * (text_positions[..., None] >= age)  # (B, S, L)
    products = windows[..., None] * hash_weights(tuple(sizes), num_functions, device)
    # onnxruntime adds two numbers as torch does, but sums in floats.
    hashes = sum(products.unbind(dim=-2)) if is_exporting() else products.sum(dim=-2)
    offsets = torch.arange(hashes.shape[-1], device=device) * num_rows
    # The products wrap around like the reference's; the remainder of a negative number is positive in torch.
    return hashes % num_rows + offsets


class BltHashEmbedding(nn.Embedding):
    """All hash tables in one weight `(functions * sizes * rows, D)`. One look-up sums a row of each table."""

    def forward(self, hashes: Tensor) -> Tensor:
        """Sums the rows of the weight that `hashes` `(B, S, G)` name, to `(B, S, D)`."""
        weight = self.weight
        if hasattr(weight, "to_local"):  # under tensor parallelism: every rank sums its columns of the tables
            weight, hashes = weight.to_local(), hashes.to_local()
        if is_exporting():  # ONNX has a loop for bags
            return nn.functional.embedding(hashes, weight).sum(dim=2)
        bags = hashes.flatten(0, 1)
        summed = nn.functional.embedding_bag(bags, weight, mode="sum", sparse=self.sparse)
        return summed.view(*hashes.shape[:2], -1)


__all__ = ["BltHashEmbedding", "ngram_hashes"]
