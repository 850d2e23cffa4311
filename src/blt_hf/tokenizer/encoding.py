"""From texts to rows of ids with numpy: byte `b` is id `b + 4`, and a text is split at the added tokens in it.

Rows are cut and padded as bytes, and one addition makes ids of a whole batch. For this the *symbol* of an id is the byte
`(id - 4) % 256`: UTF-8 text is its own symbols, and ids 0 to 3 have the symbols 0xFC to 0xFF, which do not occur in UTF-8.
In a batch with ids from 256 on (of binary data, or of tokens that were added) symbols have four bytes.
"""

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Encoding

from ..model.patching_blt import BYTE_OFFSET, VOCAB_SIZE


SPECIAL_NAMES = ("<boe>", "<s>", "</s>", "<bpe>")  # ids 0 to 3

_SHIFT = bytes((byte + BYTE_OFFSET) % 256 for byte in range(256))
_LOW_BYTES = bytes(range(256 - BYTE_OFFSET))  # their ids fit in a byte; UTF-8 has no others


def _byte_symbols() -> list[str]:
    """The printable character that names each of the 256 bytes in a byte-level `tokenizer.json` (GPT-2's table)."""
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


def to_symbol(index: int, size: int = 1) -> bytes:
    """What stands for an id until a batch is shifted."""
    return ((index - BYTE_OFFSET) % 256**size).to_bytes(size, "little")


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
        # Whether a token is its name and no more, whatever stands beside it
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
    """What the `tokenizers` library says about the rows of a batch, asked when somebody looks at one of them."""

    def __init__(self, num_rows: int, ask: Callable[[], list[Encoding]]):
        self._num_rows, self._ask, self._rows = num_rows, ask, None

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index):
        if self._rows is None:
            self._rows = self._ask()
        return self._rows[index]


class PausedCollection(contextlib.ContextDecorator):
    """Without it, Python looks for garbage after every 700 new lists; in a batch of 10,000 that is most of the time."""

    def __enter__(self):
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *exception):
        if self._was_enabled:
            gc.enable()


class Rows(NamedTuple):
    """The rows of a batch, not yet padded, as symbols of `size` bytes each."""

    data: list[bytes]
    size: int

    def lengths(self) -> list[int]:
        return [len(row) // self.size for row in self.data]


def encode_rows(
    texts: list,
    added: AddedTokens,
    ends: tuple[list[int], list[int]],
    room: int | None,
    side: str,
    split_special: bool,
    parse_bytes: bool,
) -> Rows | None:
    """The rows of a batch of texts; None where an added token occurs that is not literal.

    Args:
        ends: the ids before and after every text.
        room: how many ids of a text truncation leaves, `side` where it cuts; None without truncation.
        split_special: special tokens in a text are ordinary bytes.
        parse_bytes: look for added tokens in bytes objects as well.
    """
    is_utf8 = {*map(type, texts)} <= {str}
    try:
        data = [*map(str.encode, texts)] if is_utf8 else [*map(to_bytes, texts)]
    except UnicodeEncodeError:
        data, is_utf8 = [*map(to_bytes, texts)], False
    pieces, ids = None, {}
    # All in one search; that a token may seem to span two texts costs time and nothing else
    if (data[0] if len(data) == 1 else b"".join(data)) in added:
        parsed = [parse_bytes or isinstance(text, str) for text in texts]
        if not added.is_literal and any(parse and row in added for row, parse in zip(data, parsed)):
            return None
        pieces = [added.split(row, split_special) if parse else [row] for row, parse in zip(data, parsed)]
        ids = {name: added.ids[name] for row in pieces for name in row[1::2]}

    has_high_bytes = not is_utf8 and any(row.translate(None, _LOW_BYTES) for row in data)
    size = 4 if has_high_bytes or max([*sum(ends, []), *ids.values()], default=0) > 255 else 1
    if ids:
        symbols = {name: to_symbol(index, size) for name, index in ids.items()}
        data = [
            b"".join([symbols[p] if i % 2 and p in symbols else _widen(p, size) for i, p in enumerate(row)])
            for row in pieces
        ]
    elif size > 1:
        data = [_widen(row, size) for row in data]
    before, after = (b"".join(to_symbol(index, size) for index in end) for end in ends)
    keep = (
        slice(None)
        if room is None
        else slice(room * size)
        if side == "right" or not room
        else slice(-room * size, None)
    )
    return Rows([before + row[keep] + after for row in data], size)


def _widen(data: bytes, size: int) -> bytes:
    return data if size == 1 else data.decode("latin-1").encode("utf-32-le")


def to_lists(rows: Rows, width: int, side: str, pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """`input_ids` and `attention_mask` as lists; rows shorter than `width` are padded."""
    if rows.size == 1:
        ids = [[*row.translate(_SHIFT)] for row in rows.data]
    else:
        ids = [(np.frombuffer(row, dtype="<u4") + np.uint32(BYTE_OFFSET)).tolist() for row in rows.data]
    mask = [[1] * len(row) for row in ids]
    for columns, value in ((ids, pad_id), (mask, 0)) if width else ():
        for i, row in enumerate(columns):
            padding = [value] * (width - len(row))
            columns[i] = padding + row if side == "left" else row + padding
    return ids, mask


def to_arrays(rows: Rows, width: int, side: str, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask` as int64 `(rows, T)`; rows shorter than `width` are padded."""
    lengths = np.array(rows.lengths(), dtype=np.int32)
    check_one_length(np.maximum(lengths, width).tolist())
    width = int(max(width, lengths[0])) if len(lengths) else 0
    has_symbol = rows.size == 1 and pad_id < 256
    fill = to_symbol(pad_id) if has_symbol else b"\0"
    pad = bytes.rjust if side == "left" else bytes.ljust
    text = bytearray().join([pad(row, width * rows.size, fill) for row in rows.data])
    symbols = np.frombuffer(text, dtype=f"<u{rows.size}").reshape(len(lengths), width)
    symbols += BYTE_OFFSET  # modulo 256 where symbols are bytes
    ids = symbols.astype(np.int64)
    mask = np.ones_like(ids)
    if (lengths < width).any():
        columns, lengths = np.arange(width, dtype=np.int32), lengths[:, None]
        np.copyto(mask, columns >= width - lengths if side == "left" else columns < lengths)
        if not has_symbol:
            ids[mask == 0] = pad_id
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
