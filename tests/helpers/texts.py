"""Texts, their ids and batches of them, spelled out once more: nothing here asks the package's tokenizer."""

import torch
from hypothesis import strategies as st


TEXT = "The quick brown fox, jumps over 13 lazy dogs!\nZażółć gęślą jaźń — naïve café über 速い狐."
texts = st.text(alphabet=st.sampled_from("ab cd\n,é速2"), min_size=1, max_size=40)


def encode(text: str | bytes, bos: bool = True, eos: bool = False, eos_every: int | None = None) -> list[int]:
    """`<s>`, the bytes, and `</s>` if asked for; with `eos_every` each id at a multiple of it is `</s>`."""
    data = text.encode() if isinstance(text, str) else text
    ids = [1] * bos + [byte + 4 for byte in data] + [2] * eos
    if eos_every:
        for index in range(eos_every, len(ids), eos_every):
            ids[index] = 2
    return ids


def text_ids(rule: str, text: str) -> list[int]:
    """`encode` for a model of `RULES`: of several documents where its attention stops at their ends."""
    return encode(text, eos_every=7 if rule == "documents" else None)


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(B, S)`, padded with 0 at one side."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        ids.append([0] * fill + row if side == "left" else row + [0] * fill)
        mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return torch.tensor(ids), torch.tensor(mask)


ROWS = ["héllo, a b\nc 速2 d ab", "ab", "2, c\n\nbé ab cd, ab c"]


def rows_of(rule: str, length: int) -> list[list[int]]:
    rows = []
    for text in ROWS:
        ids = encode(text * 200)[:length]
        if rule == "documents":
            ids[5::9] = [2] * len(ids[5::9])
        rows.append(ids)
    return rows


TEXTS = [
    "a",
    "The quick brown fox, jumps over 13 lazy dogs!",
    "Zażółć gęślą jaźń — naïve café",
    "some text, with 2 lines\nand words of many lengths",
    "速い狐 and more",
    "0123456789" * 4,
    "  spaces   and\ttabs",
]
