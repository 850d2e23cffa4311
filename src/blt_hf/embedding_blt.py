"""Hashed n-gram embeddings of bytes."""

import torch
from torch import Tensor, nn


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
    before the text count as 0. Each n-gram's sum is that of the next shorter one times the prime, plus its oldest id.

    Args:
        input_ids: int64 `(B, S)`.
        history: int64 `(B, H)`, the ids before them; None: none.
        text_positions: int64 `(B, S)`, index of each byte in its text.
        sizes: n-gram sizes.
        num_functions: hash functions; each has a table for each size.
        num_rows: rows of one table.
    Returns:
        int64 `(B, S, num_functions * len(sizes))`, function-major, with each table's offset added.
    Source: facebookresearch/blt `bytelatent/model/blt.py`; same result from `max(sizes)` multiplications.
    """
    num_lags = max(sizes) - 1
    length = input_ids.shape[1]
    past = input_ids if history is None else torch.cat([history, input_ids], dim=1)
    past = nn.functional.pad(past, (max(num_lags - past.shape[1] + length, 0), 0))[:, -(length + num_lags) :]
    lagged = [
        past[:, num_lags - lag : num_lags - lag + length] * (text_positions >= lag) for lag in range(num_lags + 1)
    ]
    hashes = []
    for function in range(num_functions):
        prime = HASH_PRIMES[function % len(HASH_PRIMES)]
        rolling = torch.zeros_like(input_ids)
        by_size = {}
        for lag, ids in enumerate(lagged):
            rolling = rolling * prime + ids
            by_size[lag + 1] = rolling
        hashes.extend(by_size[size] for size in sizes)
    offsets = torch.arange(len(hashes), device=input_ids.device) * num_rows
    return torch.stack(hashes, dim=-1) % num_rows + offsets


class BltHashEmbedding(nn.Embedding):
    """All hash tables in one weight `(functions * sizes * rows, D)`; looks a bag of rows up at once and sums it."""

    def forward(self, hashes: Tensor) -> Tensor:
        """Sum of the rows `hashes` `(B, S, G)` -> `(B, S, D)`."""
        bags = hashes.flatten(0, 1)
        summed = nn.functional.embedding_bag(bags, self.weight, mode="sum", sparse=self.sparse)
        return summed.view(*hashes.shape[:2], -1)


__all__ = ["BltHashEmbedding", "ngram_hashes"]
