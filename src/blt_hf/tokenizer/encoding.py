"""From texts to rows of ids: byte `b` is id `b + 4`, and a text is split at the added tokens in it.

A row is a bytes object that holds `id - 4` for each id, modulo 256: text stays as it is, and ids 0 to 3 are the bytes 0xFC
to 0xFF, which do not occur in UTF-8. So one addition makes ids of a whole batch, a fifth faster than one for each row. In
a batch with ids from 256 on (of binary data, or of tokens that were added) each id has four bytes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Encoding

from ..model.patching_blt import BYTE_OFFSET, VOCAB_SIZE


SPECIAL_NAMES = ("<boe>", "<s>", "</s>", "<bpe>")  # ids 0 to 3

_IDS = bytes((byte + BYTE_OFFSET) % 256 for byte in range(256))  # bytes of rows -> ids, for `bytes.translate`
_LOW_BYTES = bytes(range(256 - BYTE_OFFSET))  # their ids are below 256; UTF-8 has no others


def _byte_symbols() -> list[str]:
    """Returns the printable characters that name the 256 bytes in a byte-level `tokenizer.json` (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_SYMBOLS = _byte_symbols()


def to_bytes(text: str | bytes) -> bytes:
    """Returns the bytes that a model reads of `text`: its UTF-8.

    A lone surrogate from U+DC80 to U+DCFF is the byte that `surrogateescape` made it from, any other its three bytes.
    Everything in this package that takes a text asks this function.

    Raises:
        TypeError: `text` is neither str nor bytes.
    """
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError:
            handlers = ("surrogateescape" if 0xDC80 <= ord(char) <= 0xDCFF else "surrogatepass" for char in text)
            return b"".join(char.encode("utf-8", handler) for char, handler in zip(text, handlers))
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TypeError(f"`text` must be str or bytes, or a list of them; got {type(text).__name__}: {text!r:.80}")


def byte_ids(text: str | bytes) -> list[int]:
    """Returns the ids of the bytes of a text, nothing added, and no special token found in it.

    Example: `"hé" -> [108, 199, 173]`.
    """
    return [byte + BYTE_OFFSET for byte in to_bytes(text)]


def bytes_of(ids: Iterable[int]) -> bytes:
    """Returns the bytes among `ids`; special and added tokens have none."""
    return bytes(index - BYTE_OFFSET for index in ids if BYTE_OFFSET <= index < VOCAB_SIZE)


class AddedTokens:
    """The tokens that are found as wholes in a text.

    Args:
        decoder: id to `AddedToken`.
        names: id to name of the tokens with ids 0 to 3.
    """

    def __init__(self, decoder: Mapping[int, AddedToken], names: Mapping[int, str]):
        tokens = {token.content.encode(): token for token in decoder.values() if token.content}
        self.ids = {token.content.encode(): index for index, token in decoder.items()}
        self.names = {index: name.encode() for index, name in names.items()} | {i: n for n, i in self.ids.items()}
        self.special_ids = {index for index, token in decoder.items() if token.special}
        self.special_names = {name for name, token in tokens.items() if token.special}
        # Whether a token is its name alone, whatever text stands beside it.
        self.is_literal = not any(token.lstrip or token.rstrip or token.single_word for token in tokens.values())
        self._patterns = []
        for normalized in (False, True):  # the two rounds of the `tokenizers` library; the longest name wins
            found = sorted((name for name, token in tokens.items() if token.normalized is normalized), key=len)
            if found:
                self._patterns.append(re.compile(b"(" + b"|".join(map(re.escape, reversed(found))) + b")"))

    def __contains__(self, data: bytes) -> bool:
        return any(pattern.search(data) for pattern in self._patterns)

    def split(self, data: bytes, split_special: bool = False) -> list[bytes]:
        """Cuts `data` into pieces, of which every second one is the name of an added token.

        Args:
            split_special: special tokens are ordinary bytes. Their names still win over shorter ones of the same round,
                as in the `tokenizers` library; the next round finds other tokens in them.
        """
        ignored = self.special_names if split_special else ()
        pieces = [data]
        for pattern in self._patterns:
            found, pieces = pieces, []
            for index, piece in enumerate(found):
                start = 0
                for match in () if index % 2 else pattern.finditer(piece):
                    if match[0] not in ignored:
                        pieces += [piece[start : match.start()], match[0]]
                        start = match.end()
                pieces.append(piece[start:])
        return pieces


class LazyEncodings(Sequence):
    """Asks the `tokenizers` library about the rows of a batch when somebody looks at one of them."""

    def __init__(self, num_rows: int, ask: Callable[[], list[Encoding]]):
        self._num_rows, self._ask, self._rows = num_rows, ask, None

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index):
        if self._rows is None:
            self._rows = self._ask()
        return self._rows[index]


class Rows(NamedTuple):
    """The rows of a batch, not yet padded.

    Attributes:
        data: `id - 4` for each id, as unsigned integers of `size` bytes (1, or 4 in little-endian order).
        size: bytes of an id.
        lengths: ids of each row.
    """

    data: list[bytes]
    size: int
    lengths: list[int]

    def pad(self, width: int, side: str, pad_id: int) -> list[bytes]:
        """Returns the rows with padding up to `width` ids; `pad_id` must fit into `size` bytes."""
        fill = _shifted(pad_id, self.size)
        if side == "left":
            return [fill * (width - length) + row for row, length in zip(self.data, self.lengths)]
        return [row + fill * (width - length) for row, length in zip(self.data, self.lengths)]


def encode_rows(
    texts: list,
    added: AddedTokens,
    ends: tuple[list[int], list[int]],
    pad_id: int,
    room: int | None,
    side: str,
    split_special: bool,
    parse_bytes: bool,
) -> Rows | None:
    """Returns the rows of a batch of texts, not padded yet; None where an added token occurs that is not literal.

    Args:
        ends: the ids before and after every text.
        pad_id: of the padding that may follow.
        room: how many ids of a text truncation leaves, `side` where it cuts; None without truncation.
        split_special: special tokens in a text are ordinary bytes.
        parse_bytes: look for added tokens in bytes objects as well.
    """
    try:
        data, is_utf8 = [*map(str.encode, texts)], True
    except (TypeError, UnicodeEncodeError):
        data, is_utf8 = [*map(to_bytes, texts)], False
    pieces = None
    # All in one search; that a token may seem to span two texts costs time and nothing else
    if (data[0] if len(data) == 1 else b"".join(data)) in added:
        parsed = [parse_bytes or isinstance(text, str) for text in texts]
        if not added.is_literal and any(parse and row in added for row, parse in zip(data, parsed)):
            return None
        pieces = [added.split(row, split_special) if parse else [row] for row, parse in zip(data, parsed)]

    ids = {name: added.ids[name] for row in pieces or () for name in row[1::2]}
    has_high_bytes = not is_utf8 and any(row.translate(None, _LOW_BYTES) for row in data)
    size = 4 if has_high_bytes or max([pad_id, *ends[0], *ends[1], *ids.values()]) > 255 else 1
    if ids:
        tokens = {name: _shifted(index, size) for name, index in ids.items()}
        data = [b"".join([tokens[p] if i % 2 else _widened(p, size) for i, p in enumerate(row)]) for row in pieces]
    elif size > 1:
        data = [_widened(row, size) for row in data]
    before, after = (b"".join(_shifted(index, size) for index in end) for end in ends)
    if room is not None:
        # A slice that ends at -0 would be empty, so no room is no slice from the end
        kept = slice(room * size) if side == "right" or not room else slice(-room * size, None)
        data = [row[kept] for row in data]
    data = [before + row + after for row in data]
    return Rows(data, size, [len(row) // size for row in data])


def _shifted(index: int, size: int) -> bytes:
    return ((index - BYTE_OFFSET) % 256**size).to_bytes(size, "little")


def _widened(data: bytes, size: int) -> bytes:
    return data if size == 1 else data.decode("latin-1").encode("utf-32-le")


def to_lists(rows: Rows, width: int, side: str, pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns `input_ids` and `attention_mask` as lists; rows shorter than `width` are padded."""
    padded = rows.pad(width, side, pad_id) if width else rows.data
    if rows.size == 1:
        ids = [[*row.translate(_IDS)] for row in padded]
    else:
        ids = [(np.frombuffer(row, dtype="<u4") + np.uint32(BYTE_OFFSET)).tolist() for row in padded]
    mask = [[1] * length for length in rows.lengths]
    if width:
        mask = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in mask]
    return ids, mask


def to_arrays(rows: Rows, width: int, side: str, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `input_ids` and `attention_mask` as int64 `(rows, T)`; rows shorter than `width` are padded."""
    lengths = np.array(rows.lengths, dtype=np.int32)
    check_one_length(np.maximum(lengths, width).tolist())
    width = int(max(width, lengths[0])) if len(lengths) else 0
    data = bytearray().join(rows.pad(width, side, pad_id))
    shifted = np.frombuffer(data, dtype=f"<u{rows.size}").reshape(len(lengths), width)
    shifted += BYTE_OFFSET  # modulo 256 where ids have one byte
    ids = shifted.astype(np.int64)
    mask = np.ones_like(ids)
    if (lengths < width).any():
        columns, lengths = np.arange(width, dtype=np.int32), lengths[:, None]
        np.copyto(mask, columns >= width - lengths if side == "left" else columns < lengths)
    return ids, mask


def check_one_length(lengths: list[int]) -> None:
    if len({*lengths}) > 1:
        raise ValueError(
            f"`return_tensors` needs rows of one length; got lengths from {min(lengths)} to {max(lengths)}. Pass "
            "`padding=True`, and `truncation=True` with `max_length` where rows are too long."
        )


__all__ = [
    "AddedTokens",
    "LazyEncodings",
    "Rows",
    "byte_ids",
    "bytes_of",
    "encode_rows",
    "to_arrays",
    "to_bytes",
    "to_lists",
]
