"""From text to rows of ids, and back to the characters that each id came from.

`encode_batch` takes one of two ways. The short one serves what models are fed with, `input_ids` and `attention_mask`
of texts without added tokens: the bytes of the whole batch are shifted at once and no object is made for a row. The
long one makes a `BltEncoding` for each row, which answers what `tokenizers.Encoding` answers, each thing when it is
asked. The rows of the short way are made in the same manner when somebody looks at them (`LazyEncodings`).
"""

import gc
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, pre_tokenizers
from transformers.tokenization_utils_base import TruncationStrategy


BYTE_OFFSET = 4
VOCAB_SIZE = 256 + BYTE_OFFSET

_SHIFT = bytes((byte + BYTE_OFFSET) % 256 for byte in range(256))
_LOW_BYTES = bytes(range(256 - BYTE_OFFSET))  # their ids fit in a byte; UTF-8 has no other bytes
_SURROGATE = re.compile("[\ud800-\udfff]")
# `\s` of the Rust regexes that strip around added tokens; Python's `str.isspace` knows four more
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_WHITESPACE_BYTES = re.compile(b"(?:" + b"|".join(char.encode() for char in _WHITESPACE) + b")*")
_WORD_CATEGORIES = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _byte_symbols() -> list[str]:
    """The printable character that names each of the 256 bytes in a byte-level `tokenizer.json` (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_SYMBOLS = _byte_symbols()


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8 of `text`; a lone surrogate stands for the byte that `surrogateescape` made it from, else for itself."""
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError:
            handlers = ("surrogateescape" if 0xDC80 <= ord(char) <= 0xDCFF else "surrogatepass" for char in text)
            return b"".join(char.encode("utf-8", handler) for char, handler in zip(text, handlers))
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TypeError(f"`text` must be str or bytes, or a list of them; got {type(text).__name__}: {text!r:.80}")


def _is_word(char: str) -> bool:
    """`\\w` of the Rust regexes: combining marks belong to the word, which they do not in Python's `re`."""
    return bool(char) and (unicodedata.category(char) in _WORD_CATEGORIES or char in "\u200c\u200d")


class AddedTokens:
    """The tokens that are found as wholes in a text, in the two rounds of the `tokenizers` library.

    Args:
        decoder: id to `AddedToken`.
        names: id to name of every token that is not one byte.
    """

    def __init__(self, decoder: Mapping[int, AddedToken], names: Mapping[int, str]):
        self.names = {**names, **{index: token.content for index, token in decoder.items()}}
        self.special_ids = sorted(index for index, token in decoder.items() if token.special)
        self.rounds = []  # [(pattern, {content: (id, token)})]
        for normalized in (False, True):
            tokens = {t.content.encode(): (i, t) for i, t in decoder.items() if t.normalized is normalized}
            tokens.pop(b"", None)
            if tokens:
                # `re` jumps to a literal prefix much faster than to a set of alternatives
                prefix = os.path.commonprefix([*tokens])
                endings = sorted((token[len(prefix) :] for token in tokens), key=len, reverse=True)
                pattern = re.escape(prefix) + b"(?:" + b"|".join(map(re.escape, endings)) + b")"
                self.rounds.append((re.compile(pattern), tokens))
        self.contents = tuple(content for _, tokens in self.rounds for content in tokens)
        self.first_bytes = sorted({content[:1] for content in self.contents})

    def __contains__(self, data: bytes) -> bool:
        """Whether an added token may be in `data`. Most often a few jumps from one `<` to the next tell that none is."""
        for byte in self.first_bytes:
            position = data.find(byte)
            for _ in range(16 + len(data) // 4096):
                if position < 0:
                    break
                if data.startswith(self.contents, position):
                    return True
                position = data.find(byte, position + 1)
            else:  # too many of them
                return any(pattern.search(data) for pattern, _ in self.rounds)
        return False

    def find(self, data: bytes, keep_special: bool) -> list[tuple[int, int, int]]:
        """`(first byte, byte after the last, id)` of each added token in `data`, in order and without overlap."""
        found, gaps = [], [(0, len(data))]
        for pattern, tokens in self.rounds:
            next_gaps = []
            for begin, end in gaps:
                last = begin
                for match in pattern.finditer(data, begin, end):
                    start, stop = match.span()
                    index, token = tokens[match.group()]
                    if stop <= last or (token.special and not keep_special):
                        continue
                    if token.single_word:
                        before = data[max(begin, start - 4) : start].decode("utf-8", "ignore")[-1:]
                        after = data[stop : min(end, stop + 4)].decode("utf-8", "ignore")[:1]
                        if _is_word(before) or _is_word(after):
                            continue
                    if token.lstrip:
                        gap = data[last:start].decode("utf-8", "surrogateescape")
                        start -= len(gap[len(gap.rstrip(_WHITESPACE)) :].encode("utf-8", "surrogateescape"))
                    if token.rstrip:
                        stop = _WHITESPACE_BYTES.match(data, stop, end).end()
                    start = max(start, last)  # an `rstrip` before may have taken the blanks that it starts with
                    found.append((start, stop, index))
                    next_gaps.append((last, start))
                    last = stop
                next_gaps.append((last, end))
            gaps = next_gaps
        return sorted(found)


class EncodePlan(NamedTuple):
    """What one call decides for all of its rows. Lengths count tokens."""

    added: AddedTokens
    keep_special: bool  # False: special tokens in a text are ordinary bytes
    parse_bytes: bool  # look for added tokens in bytes objects as well
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    pad_id: int
    pad_type_id: int
    pad_length: int | None  # 0: do not pad, None: to the longest row
    pad_to_multiple_of: int
    padding_side: str
    truncation: TruncationStrategy
    truncation_side: str
    max_length: int | None  # None: do not truncate
    stride: int
    overflow: bool
    is_split_into_words: bool

    def added_in(self, text: str | bytes, data: bytes) -> list[tuple[int, int, int]]:
        """The added tokens in a text whose bytes are `data`."""
        parse = (isinstance(text, str) or self.parse_bytes) and data in self.added
        return self.added.find(data, self.keep_special) if parse else []

    def padded_length(self, lengths: Iterable[int]) -> int:
        """The length that shorter rows are padded to."""
        length = max(lengths, default=0) if self.pad_length is None else self.pad_length
        return length + -length % self.pad_to_multiple_of

    def room(self, lengths: list[int]) -> list[int]:
        """How many tokens each sequence of a row may keep, by the rules of the `tokenizers` library."""
        if self.max_length is None:
            return lengths
        room = self.max_length - (len(self.bos) + len(self.eos)) * len(lengths)
        if room < 0:
            num_special = self.max_length - room
            raise ValueError(f"`max_length` must hold the {num_special} special tokens; got {self.max_length}.")
        excess = sum(lengths) - room
        if excess <= 0 or room == 0:
            return lengths if excess <= 0 else [0] * len(lengths)
        if self.truncation == TruncationStrategy.LONGEST_FIRST:
            if len(lengths) == 1:
                return [room]
            short = min(lengths)
            long = max(short, room - short)
            if short + long > room:
                short, long = room // 2, room - room // 2
            return [short, long] if lengths[0] <= lengths[1] else [long, short]
        target = 0 if self.truncation == TruncationStrategy.ONLY_FIRST else 1
        if target >= len(lengths) or lengths[target] <= excess:
            raise ValueError(
                f"`truncation={self.truncation.value!r}` cannot bring sequences of {lengths} tokens to "
                f"`max_length={self.max_length}`; use 'longest_first' or a larger `max_length`."
            )
        return [length - excess if i == target else length for i, length in enumerate(lengths)]

    def windows(self, length: int, size: int) -> list[tuple[int, int]]:
        """`(first, last + 1)` of what truncation to `size` keeps, and of each overflow where the call wants them."""
        if size >= length:
            return [(0, length)]
        if size == 0:
            return [(0, 0), (0, length)] if self.overflow else [(0, 0)]
        if self.stride >= size:
            raise ValueError(
                f"`stride` must be less than the room that `max_length` leaves for a text, {size}; got {self.stride}."
            )
        if self.truncation_side == "right":
            starts = range(0, length - self.stride, size - self.stride)
            windows = ((start, min(start + size, length)) for start in starts)
        else:
            stops = range(length, self.stride, self.stride - size)
            windows = ((max(0, stop - size), stop) for stop in stops)
        return list(windows) if self.overflow else [next(windows)]


class _TokenizedText:
    """One text and, on demand, an int64 entry per token: `ids` (T,), `spans` (T, 2) in characters, `words` (T,)."""

    def __init__(self, text: str | bytes, plan: EncodePlan):
        self.text, self.data = text, to_bytes(text)
        self.matches = plan.added_in(text, self.data)

    def __len__(self) -> int:
        return len(self.data) - sum(stop - start - 1 for start, stop, _ in self.matches)

    @cached_property
    def starts(self) -> np.ndarray:
        """The byte that each token starts at."""
        keep = np.ones(len(self.data), dtype=bool)
        for start, stop, _ in self.matches:
            keep[start + 1 : stop] = False
        return np.flatnonzero(keep)

    @cached_property
    def ids(self) -> np.ndarray:
        ids = np.frombuffer(self.data, dtype=np.uint8).astype(np.int64) + BYTE_OFFSET
        for start, _, index in self.matches:
            ids[start] = index
        return ids[self.starts] if self.matches else ids

    @cached_property
    def _characters(self) -> tuple[str, np.ndarray]:
        """The text as str, and for each byte the index of its character there."""
        text = self.text if isinstance(self.text, str) else self.data.decode("utf-8", "surrogateescape")
        raw = np.frombuffer(self.data, dtype=np.uint8)
        of_byte = ((raw & 0xC0) != 0x80).cumsum() - 1
        if len(text) != (of_byte[-1] + 1 if len(raw) else 0):  # bytes outside of UTF-8
            of_byte = np.repeat(np.arange(len(text)), [len(to_bytes(char)) for char in text])
        return text, of_byte

    @cached_property
    def spans(self) -> np.ndarray:
        starts, stops = self.starts, self.starts + 1
        for start, stop, _ in self.matches:
            stops[np.searchsorted(starts, start)] = stop
        if isinstance(self.text, str):
            of_byte = self._characters[1]
            starts, stops = of_byte[starts], of_byte[stops - 1] + 1
        return np.stack([starts, stops], axis=1)

    @cached_property
    def words(self) -> np.ndarray:
        text, of_byte = self._characters
        words = np.zeros(len(self.data), dtype=np.int64)
        begin = count = 0
        for start, stop, index in [*self.matches, (len(self.data), len(self.data), None)]:
            if begin < start:
                first, last = of_byte[begin], of_byte[start - 1]
                # Rust takes no lone surrogates; one character for another keeps the positions
                pieces = _WORDS.pre_tokenize_str(_SURROGATE.sub("\ufffd", text[first : last + 1]))
                word_starts = np.array([span[0] for _, span in pieces])
                words[begin:start] = count + np.searchsorted(word_starts, of_byte[begin:start] - first, "right") - 1
                count += len(pieces)
            if index is not None:
                words[start] = count
                count += 1
            begin = stop
        return words[self.starts]


class _TokenizedWords:
    """The same for a text that comes as a list of words: offsets count from the start of each word."""

    def __init__(self, words: Sequence[str | bytes], plan: EncodePlan):
        if not isinstance(words, (list, tuple)):
            raise TypeError(f"with `is_split_into_words=True` each text must be a list of words; got {words!r:.80}")
        texts = [_TokenizedText(word, plan) for word in words]
        self.ids = np.concatenate([np.zeros(0, np.int64), *(text.ids for text in texts)])
        self.spans = np.concatenate([np.zeros((0, 2), np.int64), *(text.spans for text in texts)])
        self.words = np.repeat(np.arange(len(texts)), [len(text) for text in texts])

    def __len__(self) -> int:
        return len(self.ids)


class _Part(NamedTuple):
    """A run of tokens in a row: a slice of a sequence, or a special token of the template (`sequence` is None)."""

    sequence: int | None
    source: "_TokenizedText | _TokenizedWords | int"
    start: int
    stop: int
    type_id: int


class BltEncoding:
    """One row of a batch: the interface of `tokenizers.Encoding`, computed on demand.

    Offsets count characters of a str and bytes of a bytes object; each byte of a character has the offsets of the
    whole character. Words are those of the byte-level pre-tokenizer (about: runs of letters, of digits, of other
    signs), or the given ones with `is_split_into_words=True`. Padding, and the special tokens put around a text, have
    no sequence, no word and the offsets (0, 0).
    """

    def __init__(self, parts: list[_Part], plan: EncodePlan):
        self._parts, self._plan = parts, plan
        self._padding = (0, 0)
        self.overflowing: list[BltEncoding] = []

    def pad_to(self, length: int) -> "BltEncoding":
        missing = max(0, length - (len(self) - sum(self._padding)))
        self._padding = (missing, 0) if self._plan.padding_side == "left" else (0, missing)
        return self

    def _column(self, of_text, of_special, of_padding: int) -> np.ndarray:
        """int64 `(T,)`: `of_text(part)` gives an array or a number for each part, the other two give numbers."""
        pieces = [np.full(self._padding[0], of_padding)]
        for part in self._parts:
            value = of_special(part) if part.sequence is None else of_text(part)
            pieces.append(value if isinstance(value, np.ndarray) else np.full(part.stop - part.start, value))
        return np.concatenate([*pieces, np.full(self._padding[1], of_padding)], dtype=np.int64)

    def column(self, name: str) -> np.ndarray:
        """int64 `(T,)`, or `(T, 2)` for `offset_mapping`, under the name that the field has in a `BatchEncoding`."""
        if name == "input_ids":
            return self._column(lambda p: p.source.ids[p.start : p.stop], lambda p: p.source, self._plan.pad_id)
        if name == "token_type_ids":
            return self._column(lambda p: p.type_id, lambda p: p.type_id, self._plan.pad_type_id)
        if name == "attention_mask":
            return self._column(lambda p: 1, lambda p: 1, 0)
        if name == "special_tokens_mask":
            return self._column(lambda p: 0, lambda p: 1, 1)
        ends = [self._column(lambda p, i=i: p.source.spans[p.start : p.stop, i], lambda p: 0, 0) for i in (0, 1)]
        return np.stack(ends, axis=1)

    def __len__(self) -> int:
        return sum(self._padding) + sum(part.stop - part.start for part in self._parts)

    def __repr__(self) -> str:
        return f"BltEncoding(num_tokens={len(self)}, n_sequences={self.n_sequences})"

    ids = property(lambda self: self.column("input_ids").tolist())
    type_ids = property(lambda self: self.column("token_type_ids").tolist())
    attention_mask = property(lambda self: self.column("attention_mask").tolist())
    special_tokens_mask = property(lambda self: self.column("special_tokens_mask").tolist())
    offsets = property(lambda self: [*map(tuple, self.column("offset_mapping").tolist())])
    n_sequences = property(lambda self: sum(part.sequence is not None for part in self._parts))
    words = property(lambda self: self.word_ids)

    @property
    def tokens(self) -> list[str]:
        names = self._plan.added.names
        return [names[i] if i in names else BYTE_SYMBOLS[i - BYTE_OFFSET] for i in self.ids]

    @property
    def sequence_ids(self) -> list[int | None]:
        return [None if i < 0 else i for i in self._column(lambda p: p.sequence, lambda p: -1, -1).tolist()]

    @property
    def word_ids(self) -> list[int | None]:
        words = self._column(lambda p: p.source.words[p.start : p.stop], lambda p: -1, -1)
        return [None if i < 0 else i for i in words.tolist()]

    def _text_parts(self) -> list[tuple[int, _Part]]:
        """Each sequence's part, after the index in the row of its first token."""
        starts = np.cumsum([self._padding[0], *(part.stop - part.start for part in self._parts)]).tolist()
        return [(start, part) for start, part in zip(starts, self._parts) if part.sequence is not None]

    def _locate(self, token_index: int) -> tuple[int, _Part] | None:
        """A token's index in its text, and the part that it is in."""
        for start, part in self._text_parts():
            if start <= token_index < start + part.stop - part.start:
                return token_index - start + part.start, part
        return None

    def _search(self, sequence_index: int, matches) -> tuple[int, int] | None:
        """`(first, last + 1)` of the tokens of a sequence where `matches(source, slice)` is true."""
        for start, part in self._text_parts():
            if part.sequence == sequence_index:
                hits = np.flatnonzero(matches(part.source, slice(part.start, part.stop)))
                return (start + int(hits[0]), start + int(hits[-1]) + 1) if len(hits) else None
        return None

    def token_to_sequence(self, token_index: int) -> int | None:
        place = self._locate(token_index)
        return None if place is None else place[1].sequence

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        place = self._locate(token_index)
        return None if place is None else tuple(place[1].source.spans[place[0]].tolist())

    def token_to_word(self, token_index: int) -> int | None:
        place = self._locate(token_index)
        return None if place is None else int(place[1].source.words[place[0]])

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        def covers(source, tokens):
            return (source.spans[tokens, 0] <= char_pos) & (char_pos < source.spans[tokens, 1])

        tokens = self._search(sequence_index, covers)
        return None if tokens is None else tokens[0]

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        token_index = self.char_to_token(char_pos, sequence_index)
        return None if token_index is None else self.token_to_word(token_index)

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        return self._search(sequence_index, lambda source, tokens: source.words[tokens] == word_index)

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        tokens = self.word_to_tokens(word_index, sequence_index)
        return None if tokens is None else (self.token_to_chars(tokens[0])[0], self.token_to_chars(tokens[1] - 1)[1])


def encode_row(item, plan: EncodePlan) -> BltEncoding:
    """Encode a text, or a tuple of one or two; truncated, with its overflow, not padded."""
    texts = item if isinstance(item, tuple) else (item,)
    tokenized = [(_TokenizedWords if plan.is_split_into_words else _TokenizedText)(text, plan) for text in texts]
    lengths = [len(text) for text in tokenized]
    windows = [plan.windows(length, room) for length, room in zip(lengths, plan.room(lengths))]

    def row(*chosen: tuple[int, int]) -> BltEncoding:
        parts = []
        for sequence, (text, (start, stop)) in enumerate(zip(tokenized, chosen)):
            parts += [_Part(None, index, 0, 1, sequence) for index in plan.bos]
            parts.append(_Part(sequence, text, start, stop, sequence))
            parts += [_Part(None, index, 0, 1, sequence) for index in plan.eos]
        return BltEncoding(parts, plan)

    if len(texts) == 1:
        main, *others = (row(window) for window in windows[0])
    else:  # the library's order of overflows
        (a, *later_a), (b, *later_b) = windows
        main = row(a, b)
        others = [row(x, y) for x in later_a for y in windows[1]] + [row(a, y) for y in later_b]
    main.overflowing = others
    return main


class LazyEncodings(Sequence):
    """The rows of a batch of single texts that was encoded without them, each made when somebody looks at it."""

    def __init__(self, texts: Sequence[str | bytes], plan: EncodePlan, length: int):
        self._texts, self._plan, self._length = texts, plan, length

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return encode_row(self._texts[index], self._plan).pad_to(self._length)


def _check_rectangular(lengths: Sequence[int] | np.ndarray) -> None:
    shortest, longest = np.min(lengths, initial=2**62), np.max(lengths, initial=0)
    if shortest < longest:
        raise ValueError(
            f"`return_tensors` needs rows of one length; got lengths from {shortest} to {longest}. Pass "
            "`padding=True`, and `truncation=True` with `max_length` where rows are too long."
        )


class PausedCollection:
    """Without it, Python looks for garbage after every 700 new lists; in a batch of 10,000 that is most of the time."""

    def __enter__(self):
        self.was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *exception):
        if self.was_enabled:
            gc.enable()


def encode_batch(
    items: list, plan: EncodePlan, names: Sequence[str], as_arrays: bool
) -> tuple[dict, Sequence[BltEncoding], Sequence[int]]:
    """Encode texts, or tuples of one or two, to the columns `names` of a `BatchEncoding`.

    Returns:
        columns: a list per row (pairs in `offset_mapping`), or with `as_arrays` int64 `(rows, T)`, `(rows, T, 2)`.
        rows: a `BltEncoding` for each row, perhaps made on demand.
        samples: for each row the index of the item that it comes from.
    """
    if {*names} <= {"input_ids", "attention_mask"} and not plan.overflow and not plan.is_split_into_words:
        data = _plain_bytes(items, plan)
        if data is not None:
            columns, length = (_flat_arrays if as_arrays else _flat_lists)(*data, plan)
            return {name: columns[name] for name in names}, LazyEncodings(items, plan, length), range(len(items))

    encodings = [encode_row(item, plan) for item in items]
    length = plan.padded_length(map(len, encodings))
    rows = [row.pad_to(length) for main in encodings for row in (main, *main.overflowing)]
    samples = [index for index, main in enumerate(encodings) for _ in (main, *main.overflowing)]
    columns = {name: [row.column(name) for row in rows] for name in names}
    if as_arrays:
        _check_rectangular([*map(len, rows)])
        empty = np.zeros((0, 0), dtype=np.int64)
        return {name: np.stack(column) if rows else empty for name, column in columns.items()}, rows, samples
    columns = {name: [array.tolist() for array in column] for name, column in columns.items()}
    if "offset_mapping" in columns:
        columns["offset_mapping"] = [[*map(tuple, row)] for row in columns["offset_mapping"]]
    return columns, rows, samples


def _plain_bytes(texts: list, plan: EncodePlan) -> tuple[list[bytes], bool] | None:
    """The bytes of each text, truncated, and whether all are UTF-8; None if a pair or an added token occurs."""
    kinds = {*map(type, texts)}
    if tuple in kinds:
        return None
    is_utf8 = kinds <= {str}
    try:
        data = [*map(str.encode, texts)] if is_utf8 else [*map(to_bytes, texts)]
    except UnicodeEncodeError:
        data, is_utf8 = [*map(to_bytes, texts)], False
    if is_utf8:
        # In one scan; that a token may seem to span two texts costs time and nothing else
        if (data[0] if len(data) == 1 else b"".join(data)) in plan.added:
            return None
    elif any(plan.added_in(text, row) for text, row in zip(texts, data)):
        return None
    if plan.max_length is not None:
        kept = [plan.windows(len(row), plan.room([len(row)])[0])[0] for row in data]
        data = [row[start:stop] for row, (start, stop) in zip(data, kept)]
    return data, is_utf8


def _shifted(row: bytes) -> bytes:
    """The ids of UTF-8 bytes, as bytes."""
    if len(row) < 4096:
        return row.translate(_SHIFT)
    ids = np.frombuffer(row, dtype=np.uint8) + np.uint8(BYTE_OFFSET)
    return ids.tobytes()  # numpy is faster where its overhead no longer counts


def _flat_lists(data: list[bytes], is_utf8: bool, plan: EncodePlan) -> tuple[dict[str, list], int]:
    bos, eos = plan.bos, plan.eos
    if is_utf8 or not any(row.translate(None, _LOW_BYTES) for row in data):
        input_ids = [[*bos, *_shifted(row), *eos] for row in data]
    else:
        input_ids = [[*bos, *(byte + BYTE_OFFSET for byte in row), *eos] for row in data]
    attention_mask = [[1] * len(row) for row in input_ids]
    width = plan.padded_length(map(len, input_ids))
    if width:
        for rows, value in ((input_ids, plan.pad_id), (attention_mask, 0)):
            for i, row in enumerate(rows):
                padding = [value] * (width - len(row))
                rows[i] = padding + row if plan.padding_side == "left" else row + padding
    return {"input_ids": input_ids, "attention_mask": attention_mask}, width


def _flat_arrays(data: list[bytes], is_utf8: bool, plan: EncodePlan) -> tuple[dict[str, np.ndarray], int]:
    num_bos, num_eos = len(plan.bos), len(plan.eos)
    lengths = np.array([*map(len, data)], dtype=np.int64) + num_bos + num_eos
    width = plan.padded_length(lengths.tolist())
    _check_rectangular(np.maximum(lengths, width))
    width = max([width, *lengths[:1].tolist()])
    missing = width - lengths
    is_left = plan.padding_side == "left"

    # Rows of bytes become a matrix by padding them as bytes: one operation for all rows, and no copy of a single one.
    # The shift is modulo 256: UTF-8 has no byte from 0xFC on, so one of these can become the id of the padding.
    input_ids = np.empty((len(data), width), dtype=np.int64)
    text_ids = input_ids[:, num_bos : width - num_eos]
    is_padded = bool(missing.any())
    is_filled = is_padded and is_utf8 and plan.pad_id < 256
    fill = bytes([(plan.pad_id - BYTE_OFFSET) % 256])
    pad = bytes.rjust if is_left else bytes.ljust
    text = (bytearray() if is_filled else b"").join([pad(row, text_ids.shape[1], fill) for row in data])
    text = np.frombuffer(text, dtype=np.uint8).reshape(text_ids.shape)
    if is_filled:
        text += BYTE_OFFSET
        text_ids[...] = text
    else:
        np.add(text, BYTE_OFFSET, out=text_ids, dtype=np.int64)

    if is_padded:
        attention_mask = np.empty_like(input_ids)
        columns, before = np.arange(width, dtype=np.int32), missing.astype(np.int32)[:, None]
        if is_left:
            np.greater_equal(columns, before, out=attention_mask)
        else:
            np.less(columns, width - before, out=attention_mask)
        input_ids[:, :num_bos] = input_ids[:, width - num_eos :] = plan.pad_id
        if not is_filled:
            np.copyto(input_ids, plan.pad_id, where=attention_mask == 0)
    else:
        attention_mask = np.ones_like(input_ids)
    every_row = np.arange(len(data))
    first = width - lengths if is_left else np.zeros_like(lengths)
    for offset, index in enumerate(plan.bos):
        input_ids[every_row, first + offset] = index
    for offset, index in enumerate(plan.eos, start=1):
        input_ids[every_row, first + lengths - offset] = index
    return {"input_ids": input_ids, "attention_mask": attention_mask}, width


__all__ = [
    "AddedTokens",
    "BltEncoding",
    "EncodePlan",
    "LazyEncodings",
    "PausedCollection",
    "encode_batch",
    "encode_row",
    "to_bytes",
]
