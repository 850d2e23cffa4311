"""Bytes to ids and back for the Byte Latent Transformer: id = byte + 4.

Ids 0 to 3 are special (`<boe>`, which is the padding, `<s>`, `</s>`, `<bpe>`); the vocabulary has 260 entries and tokens
that a user adds follow from 260. `BltTokenizer` is a fast tokenizer of transformers: it keeps a `tokenizers` backend (a
byte-level BPE without merges) that it saves as `tokenizer.json`, so that its files load in a plain transformers with the
same ids. Encoding itself does not go through the backend: bytes are ids already, and numpy shifts them some fifty times
faster. `BltEncoding` answers what `tokenizers.Encoding` answers (offsets, words, character to token), from the bytes and
only when asked.
"""

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, TensorType


BYTE_OFFSET = 4
VOCAB_SIZE = 256 + BYTE_OFFSET
SPECIAL_NAMES = ("<boe>", "<s>", "</s>", "<bpe>")  # ids 0 to 3

# `assistant: ` closes a prompt and `</s>` closes an answer, so a prompt that waits for an answer never ends with EOS.
# What is inside `generation` (the answer and its EOS) is what `return_assistant_tokens_mask` marks.
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools or documents -%}
    {{- raise_exception("The default chat template of BltTokenizer has no place for `tools` or `documents`; set `tokenizer.chat_template`.") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['tool_calls'] -%}
        {{- raise_exception("The default chat template of BltTokenizer has no place for `tool_calls`; set `tokenizer.chat_template`.") -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {%- set content = message['content'] -%}
    {%- else -%}
        {%- set content = (message['content'] or []) | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
    {%- endif -%}
    {%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}
    {{- message['role'] + ': ' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- content -}}{{- eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\nassistant: ' -}}{%- endif -%}
"""  # fmt: skip

_SHIFT = bytes((byte + BYTE_OFFSET) % 256 for byte in range(256))
_UNSHIFT = bytes((byte - BYTE_OFFSET) % 256 for byte in range(256))
_LOW_BYTES = bytes(range(256 - BYTE_OFFSET))  # their ids fit in a byte; UTF-8 has no other bytes
_BYTE_IDS_BELOW_256 = bytes(range(BYTE_OFFSET, 256))
_SPECIAL_ID = re.compile(rb"([\0-\3])")
_SURROGATE = re.compile("[\ud800-\udfff]")
# `\s` of the Rust regexes that strip around added tokens; Python's `str.isspace` knows four more
_WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_WHITESPACE_BYTES = re.compile(b"(?:" + b"|".join(char.encode() for char in _WHITESPACE) + b")*")
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level `tokenizer.json` (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_SYMBOLS = _byte_symbols()
_SYMBOL_BYTES = {symbol: bytes([byte]) for byte, symbol in enumerate(_SYMBOLS)}


def _build_backend(names: Sequence[str]) -> Tokenizer:
    """The `tokenizers` model that maps text to the same ids; `names` are the tokens with ids 0 to 3."""
    vocab = {str(name): index for index, name in enumerate(names)}
    vocab.update({symbol: byte + BYTE_OFFSET for byte, symbol in enumerate(_SYMBOLS)})
    if len(vocab) != VOCAB_SIZE:
        raise ValueError(f"the tokens with ids 0 to 3 must be four different strings; got {[*map(str, names)]}.")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(str(name), normalized=False, special=True) for name in names])
    return backend


def _check_byte_vocabulary(vocab: Mapping[str, int], origin: str) -> None:
    for byte, symbol in enumerate(_SYMBOLS):
        if vocab.get(symbol) != byte + BYTE_OFFSET:
            raise ValueError(
                f"{origin} is not the vocabulary of a BLT: byte 0x{byte:02X} ({symbol!r}) must have id "
                f"{byte + BYTE_OFFSET}; got {vocab.get(symbol)}."
            )
    if len(vocab) > VOCAB_SIZE:
        raise ValueError(f"{origin} has {len(vocab)} entries; a BLT has {VOCAB_SIZE} and no merged tokens.")


def _to_bytes(text: str | bytes, argument: str = "text") -> bytes:
    """UTF-8 of `text`. A lone surrogate stands for the byte that `surrogateescape` made it from, or else for itself."""
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError:
            escaped = lambda char: 0xDC80 <= ord(char) <= 0xDCFF  # noqa: E731
            return b"".join(c.encode("utf-8", "surrogateescape" if escaped(c) else "surrogatepass") for c in text)
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TypeError(f"`{argument}` must be a str or bytes, or a list of them; got {type(text).__name__}: {text!r:.80}")


def _check_errors(errors: str) -> str:
    try:
        codecs.lookup_error(errors)
        b"\xff".decode("utf-8", errors)
    except UnicodeDecodeError:
        pass  # "strict" at work
    except (LookupError, TypeError) as error:
        raise ValueError(
            "`errors` must name a handler for decoding: 'strict', 'replace', 'ignore', 'backslashreplace', "
            f"'surrogateescape', 'surrogatepass' or one registered with `codecs`; got {errors!r}."
        ) from error
    return errors


def _reject_unknown(kwargs: Mapping[str, Any], method: str) -> None:
    if kwargs:
        raise TypeError(f"`BltTokenizer.{method}` got unexpected arguments: {', '.join(map(repr, sorted(kwargs)))}.")


class _AddedTokens:
    """The tokens that are found as wholes in a text, in the two rounds of the `tokenizers` library."""

    def __init__(self, tokenizer: "BltTokenizer"):
        decoder = tokenizer.added_tokens_decoder
        self.rounds = []  # [(pattern, {content: (id, token)})]
        for normalized in (False, True):
            tokens = {t.content.encode(): (i, t) for i, t in decoder.items() if t.normalized == normalized and t.content}
            if tokens:
                longest_first = sorted(tokens, key=len, reverse=True)
                self.rounds.append((re.compile(b"|".join(map(re.escape, longest_first))), tokens))
        self.first_bytes = sorted({content[:1] for _, tokens in self.rounds for content in tokens})
        self.special_ids = sorted(index for index, token in decoder.items() if token.special)
        self.special_bytes = bytes(index for index in self.special_ids if index < 256)
        self.names = {i: tokenizer._tokenizer.id_to_token(i) for i in (*range(BYTE_OFFSET), *decoder)}

    def __contains__(self, data: bytes) -> bool:
        """Whether some added token may be in `data`. One scan for a byte that none lacks, most often the last one."""
        return any(byte in data for byte in self.first_bytes) and any(p.search(data) for p, _ in self.rounds)

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
                    if start < last or (token.special and not keep_special):
                        continue
                    if token.single_word:
                        before = data[max(begin, start - 4) : start].decode("utf-8", "ignore")[-1:]
                        after = data[stop : min(end, stop + 4)].decode("utf-8", "ignore")[:1]
                        if re.match(r"\w", before) or re.match(r"\w", after):
                            continue
                    if token.lstrip:
                        gap = data[last:start].decode("utf-8", "surrogateescape")
                        start -= len(gap[len(gap.rstrip(_WHITESPACE)) :].encode("utf-8", "surrogateescape"))
                    if token.rstrip:
                        stop = _WHITESPACE_BYTES.match(data, stop, end).end()
                    found.append((start, stop, index))
                    next_gaps.append((last, start))
                    last = stop
                next_gaps.append((last, end))
            gaps = next_gaps
        return sorted(found)


class _Plan(NamedTuple):
    """What one call decides for all of its rows."""

    added: _AddedTokens
    keep_special: bool
    parse_bytes: bool
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    pad_id: int
    pad_type_id: int
    padding_side: str
    truncation_side: str
    truncation: TruncationStrategy
    max_length: int | None  # None: do not truncate
    stride: int
    overflow: bool
    is_split_into_words: bool

    def added_in(self, text: str | bytes, data: bytes) -> list[tuple[int, int, int]]:
        """The added tokens in a text whose bytes are `data`; raw bytes are searched only on request."""
        parse = (isinstance(text, str) or self.parse_bytes) and data in self.added
        return self.added.find(data, self.keep_special) if parse else []


class _TokenizedText:
    """One text and, on demand, an int64 entry per token: `ids` (T,), `spans` (T, 2) in characters, `words` (T,)."""

    def __init__(self, text: str | bytes, plan: _Plan):
        self.text, self.data = text, _to_bytes(text)
        self.matches = plan.added_in(text, self.data)

    def __len__(self) -> int:
        return len(self.data) - sum(stop - start - 1 for start, stop, _ in self.matches)

    @cached_property
    def starts(self) -> np.ndarray:
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
            of_byte = np.repeat(np.arange(len(text)), [len(_to_bytes(char)) for char in text])
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

    def __init__(self, words: Sequence[str | bytes], plan: _Plan):
        if not isinstance(words, (list, tuple)):
            raise TypeError(f"with `is_split_into_words=True` each text must be a list of words; got {words!r:.80}")
        self.texts = [_TokenizedText(word, plan) for word in words]
        self.ids = np.concatenate([np.zeros(0, np.int64), *(text.ids for text in self.texts)])
        self.words = np.repeat(np.arange(len(self.texts)), [len(text) for text in self.texts])

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def spans(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 2), np.int64), *(text.spans for text in self.texts)])


class BltEncoding:
    """One row of a batch: the interface of `tokenizers.Encoding`, computed on demand.

    Offsets count characters of a str and bytes of a bytes object; each byte of a character has the offsets of the whole
    character. Words are those of the byte-level pre-tokenizer (about: runs of letters, of digits, of other signs), or the
    given ones with `is_split_into_words=True`. Padding and the special tokens of the template have no sequence, no word
    and the offsets (0, 0).
    """

    def __init__(self, parts: list[tuple], plan: _Plan):
        # (sequence 0 or 1, tokenized text, first, last + 1, type id) or (None, id, 0, 1, type id)
        self._parts, self._plan = parts, plan
        self._padding = (0, 0)
        self.overflowing: list[BltEncoding] = []

    def _pad_to(self, length: int) -> "BltEncoding":
        missing = max(0, length - (len(self) - sum(self._padding)))
        self._padding = (missing, 0) if self._plan.padding_side == "left" else (0, missing)
        return self

    def _column(self, of_text, of_special, of_padding) -> np.ndarray:
        """int64, one entry per token: `of_text(part)` is an array or a number, the other two numbers."""
        left, right = self._padding
        pieces = [np.full(left, of_padding)]
        for part in self._parts:
            value = of_special(part) if part[0] is None else of_text(part)
            pieces.append(value if isinstance(value, np.ndarray) else np.full(part[3] - part[2], value))
        return np.concatenate([*pieces, np.full(right, of_padding)], dtype=np.int64)

    def _columns(self, name: str) -> np.ndarray:
        """int64 `(T,)`, or `(T, 2)` for offsets, under the name that the field has in a `BatchEncoding`."""
        if name == "input_ids":
            return self._column(lambda p: p[1].ids[p[2] : p[3]], lambda p: p[1], self._plan.pad_id)
        if name == "token_type_ids":
            return self._column(lambda p: p[4], lambda p: p[4], self._plan.pad_type_id)
        if name == "attention_mask":
            return self._column(lambda p: 1, lambda p: 1, 0)
        if name == "special_tokens_mask":
            return self._column(lambda p: 0, lambda p: 1, 1)
        ends = [self._column(lambda p, i=i: p[1].spans[p[2] : p[3], i], lambda p: 0, 0) for i in (0, 1)]
        return np.stack(ends, axis=1)

    def __len__(self) -> int:
        return sum(self._padding) + sum(part[3] - part[2] for part in self._parts)

    def __repr__(self) -> str:
        return f"BltEncoding(num_tokens={len(self)}, n_sequences={self.n_sequences}, overflowing={len(self.overflowing)})"

    ids = property(lambda self: self._columns("input_ids").tolist())
    type_ids = property(lambda self: self._columns("token_type_ids").tolist())
    attention_mask = property(lambda self: self._columns("attention_mask").tolist())
    special_tokens_mask = property(lambda self: self._columns("special_tokens_mask").tolist())
    offsets = property(lambda self: [*map(tuple, self._columns("offset_mapping").tolist())])
    n_sequences = property(lambda self: max(1, sum(part[0] is not None for part in self._parts)))
    words = property(lambda self: self.word_ids)

    @property
    def tokens(self) -> list[str]:
        names = self._plan.added.names
        return [names[i] if i in names else _SYMBOLS[i - BYTE_OFFSET] for i in self.ids]

    @property
    def sequence_ids(self) -> list[int | None]:
        return [None if i < 0 else i for i in self._column(lambda p: p[0], lambda p: -1, -1).tolist()]

    @property
    def word_ids(self) -> list[int | None]:
        words = self._column(lambda p: p[1].words[p[2] : p[3]], lambda p: -1, -1)
        return [None if i < 0 else i for i in words.tolist()]

    def _sequence(self, sequence_index: int) -> tuple[int, tuple | None]:
        """Where the tokens of a sequence begin, and its part."""
        position = self._padding[0]
        for part in self._parts:
            if part[0] == sequence_index:
                return position, part
            position += part[3] - part[2]
        return position, None

    def _part_of(self, token_index: int) -> tuple[int, tuple] | None:
        """The text part that holds a token, with the token's index in the text."""
        position = self._padding[0]
        for part in self._parts:
            if part[0] is not None and position <= token_index < position + part[3] - part[2]:
                return token_index - position + part[2], part
            position += part[3] - part[2]
        return None

    def token_to_sequence(self, token_index: int) -> int | None:
        place = self._part_of(token_index)
        return None if place is None else place[1][0]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        place = self._part_of(token_index)
        return None if place is None else tuple(place[1][1].spans[place[0]].tolist())

    def token_to_word(self, token_index: int) -> int | None:
        place = self._part_of(token_index)
        return None if place is None else int(place[1][1].words[place[0]])

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        position, part = self._sequence(sequence_index)
        if part is None:
            return None
        starts, stops = part[1].spans[part[2] : part[3]].T
        hits = np.flatnonzero((starts <= char_pos) & (char_pos < stops))
        return position + int(hits[0]) if len(hits) else None

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        token_index = self.char_to_token(char_pos, sequence_index)
        return None if token_index is None else self.token_to_word(token_index)

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        position, part = self._sequence(sequence_index)
        hits = [] if part is None else np.flatnonzero(part[1].words[part[2] : part[3]] == word_index)
        return (position + int(hits[0]), position + int(hits[-1]) + 1) if len(hits) else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        tokens = self.word_to_tokens(word_index, sequence_index)
        return None if tokens is None else (self.token_to_chars(tokens[0])[0], self.token_to_chars(tokens[1] - 1)[1])


def _windows(length: int, size: int, plan: _Plan) -> list[tuple[int, int]]:
    """`(first, last + 1)` of what truncation keeps and, where asked for, of each overflow, `stride` tokens shared."""
    if size >= length:
        return [(0, length)]
    if size == 0:
        return [(0, 0), (0, length)] if plan.overflow else [(0, 0)]
    if plan.stride >= size:
        raise ValueError(
            f"`stride` must be smaller than the room that `max_length` leaves for the text, {size}; got {plan.stride}."
        )
    if plan.truncation_side == "right":
        starts = range(0, length - plan.stride, size - plan.stride)
        windows = ((start, min(start + size, length)) for start in starts)
    else:
        stops = range(length, plan.stride, plan.stride - size)
        windows = ((max(0, stop - size), stop) for stop in stops)
    return list(windows) if plan.overflow else [next(windows)]


def _room(lengths: list[int], plan: _Plan) -> list[int]:
    """How many tokens each sequence may keep, by the rules of the `tokenizers` library."""
    if plan.max_length is None:
        return lengths
    room = plan.max_length - (len(plan.bos) + len(plan.eos)) * len(lengths)
    if room < 0:
        raise ValueError(f"`max_length={plan.max_length}` leaves no room beside {plan.max_length - room} special tokens.")
    excess = sum(lengths) - room
    if excess <= 0:
        return lengths
    if plan.truncation == TruncationStrategy.LONGEST_FIRST:
        if len(lengths) == 1:
            return [room]
        short = min(lengths)
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
        return [short, long] if lengths[0] <= lengths[1] else [long, short]
    target = 0 if plan.truncation == TruncationStrategy.ONLY_FIRST else 1
    if target >= len(lengths) or lengths[target] <= excess:
        raise ValueError(
            f"`truncation={plan.truncation.value!r}` cannot shorten sequences of {lengths} tokens to "
            f"`max_length={plan.max_length}`; use 'longest_first' or a larger `max_length`."
        )
    return [length - excess if i == target else length for i, length in enumerate(lengths)]


def _encode_row(item: tuple, plan: _Plan) -> BltEncoding:
    """Encode a text `(a,)` or a pair `(a, b)`, truncated and not padded, with its overflow."""
    tokenized = [(_TokenizedWords if plan.is_split_into_words else _TokenizedText)(text, plan) for text in item]
    lengths = [len(text) for text in tokenized]
    windows = [_windows(length, room, plan) for length, room in zip(lengths, _room(lengths, plan))]

    def row(*chosen: tuple[int, int]) -> BltEncoding:
        parts = []
        for sequence, (text, (start, stop)) in enumerate(zip(tokenized, chosen)):
            parts += [(None, index, 0, 1, sequence) for index in plan.bos]
            parts.append((sequence, text, start, stop, sequence))
            parts += [(None, index, 0, 1, sequence) for index in plan.eos]
        return BltEncoding(parts, plan)

    if len(item) == 1:
        combinations = [(a,) for a in windows[0]]
    else:  # the library's order of overflows
        (a, *later_a), (b, *later_b) = windows
        combinations = [(a, b), *((x, y) for x in later_a for y in windows[1]), *((a, y) for y in later_b)]
    main, *others = (row(*chosen) for chosen in combinations)
    main.overflowing = others
    return main


class _LazyEncodings(Sequence):
    """Rows of a batch that was encoded without them, each made when somebody looks at it."""

    def __init__(self, texts: Sequence[str | bytes], plan: _Plan, length: int):
        self._texts, self._plan, self._length = texts, plan, length

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return _encode_row((self._texts[index],), self._plan)._pad_to(self._length)


def _default(value: bool | None, default: bool) -> bool:
    return default if value is None else bool(value)


_EMPTY = np.zeros((0, 0), dtype=np.int64)


def _check_rectangular(lengths: Sequence[int]) -> None:
    if len({*lengths}) > 1:
        raise ValueError(
            f"`return_tensors` needs rows of one length; got lengths from {min(lengths)} to {max(lengths)}. Pass "
            "`padding=True`, and `truncation=True` with `max_length` where rows are too long."
        )


def _check_encode_arguments(padding_side, truncation_side, max_length, stride, pad_to_multiple_of) -> None:
    for name, value in (("padding_side", padding_side), ("truncation_side", truncation_side)):
        if value not in ("left", "right"):
            raise ValueError(f"`{name}` must be 'left' or 'right'; got {value!r}.")
    for name, value, least in (("max_length", max_length, 0), ("stride", stride, 0), ("pad_to_multiple_of", pad_to_multiple_of, 1)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")


def _as_items(text, text_pair, is_split_into_words: bool) -> tuple[list, bool]:
    """Texts, or tuples `(a, b)` for pairs (`(words,)` or `(words_a, words_b)` for lists of words), and: is it a batch?"""
    listed = (list, tuple)
    batched = isinstance(text, listed) and (not is_split_into_words or (len(text) > 0 and isinstance(text[0], listed)))
    if batched != isinstance(text_pair, listed) and text_pair is not None and not is_split_into_words:
        raise TypeError("`text_pair` must be a list exactly when `text` is one.")
    if not batched:
        pair = () if text_pair is None else (text_pair,)
        return [(text, *pair) if pair or is_split_into_words else text], False
    if text_pair is not None:
        if len(text) != len(text_pair):
            raise ValueError(f"`text` has {len(text)} entries and `text_pair` has {len(text_pair)}; pass as many.")
        return list(zip(text, text_pair)), True
    if is_split_into_words:
        return [tuple(t) if t and isinstance(t[0], listed) else (t,) for t in text], True
    if not {*map(type, text)} & {list, tuple}:
        return list(text), True
    for entry in text:
        if isinstance(entry, listed) and len(entry) != 2:
            raise ValueError(f"an entry of `text` may be a pair of texts; got {len(entry)} of them. Is `is_split_into_words=True` meant?")
    return [tuple(entry) if isinstance(entry, list) else entry for entry in text], True


def _encode_flat(texts: list, plan: _Plan, padded_length, as_arrays: bool):
    """The short way for single texts without added tokens: no object a row.

    Returns `(input_ids, attention_mask, lengths, encodings)`, or None where the long way is needed. Arrays are int64
    `(rows, length)`; `padded_length` maps the lengths of the rows to the one to pad to (0: none).
    """
    kinds = {*map(type, texts)}
    if plan.is_split_into_words or tuple in kinds:
        return None
    try:
        data = [*map(str.encode, texts)] if kinds <= {str} else [*map(_to_bytes, texts)]
    except UnicodeEncodeError:
        data, kinds = [*map(_to_bytes, texts)], {None}
    if kinds <= {str}:
        if (data[0] if len(data) == 1 else b"".join(data)) in plan.added:
            return None
    elif any(plan.added_in(text, row) for text, row in zip(texts, data)):
        return None

    num_special = len(plan.bos) + len(plan.eos)
    lengths = [*map(len, data)]
    if plan.max_length is not None and (max(lengths, default=0) + num_special > plan.max_length):
        kept = (_windows(n, _room([n], plan)[0], plan)[0] for n in lengths)
        data = [row[start:stop] for row, (start, stop) in zip(data, kept)]
        lengths = [*map(len, data)]
    lengths = [length + num_special for length in lengths] if num_special else lengths
    width = padded_length(lengths)
    encodings = _LazyEncodings(texts, plan, width)

    if not as_arrays:
        high = not kinds <= {str} and any(row.translate(None, _LOW_BYTES) for row in data)
        shifted = ([byte + BYTE_OFFSET for byte in row] for row in data) if high else (d.translate(_SHIFT) for d in data)
        input_ids = [[*plan.bos, *row, *plan.eos] for row in shifted]
        attention_mask = [[1] * length for length in lengths]
        for i, length in enumerate(lengths):
            if length < width:
                pad_ids, pad_mask = [plan.pad_id] * (width - length), [0] * (width - length)
                left = plan.padding_side == "left"
                input_ids[i] = pad_ids + input_ids[i] if left else input_ids[i] + pad_ids
                attention_mask[i] = pad_mask + attention_mask[i] if left else attention_mask[i] + pad_mask
        return input_ids, attention_mask, [max(width, length) for length in lengths], encodings

    _check_rectangular([max(width, length) for length in lengths])
    sizes = np.array(lengths, dtype=np.int64)
    width = max(width, max(lengths, default=0))
    shape = (len(data), width)
    input_ids = np.full(shape, plan.pad_id) if (sizes < width).any() else np.empty(shape, dtype=np.int64)
    first = width - sizes if plan.padding_side == "left" else np.zeros_like(sizes)
    last = first + sizes
    columns, every_row = np.arange(width), np.arange(len(data))
    for offset, index in enumerate(plan.bos):
        input_ids[every_row, first + offset] = index
    for offset, index in enumerate(plan.eos, start=1):
        input_ids[every_row, last - offset] = index
    begins, ends = first + len(plan.bos), last - len(plan.eos)
    if sizes.sum() > 256 * len(data):
        for row, ids, begin, end in zip(data, input_ids, begins.tolist(), ends.tolist()):
            np.add(np.frombuffer(row, dtype=np.uint8), BYTE_OFFSET, out=ids[begin:end], dtype=np.int64)
    else:
        inside = (columns >= begins[:, None]) & (columns < ends[:, None])
        input_ids[inside] = np.frombuffer(b"".join(data), dtype=np.uint8).astype(np.int64) + BYTE_OFFSET
    if (sizes == width).all():
        attention_mask = np.ones(shape, dtype=np.int64)
    else:
        attention_mask = ((columns >= first[:, None]) & (columns < last[:, None])).astype(np.int64)
    return input_ids, attention_mask, [width] * len(data), encodings


class BltTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of the Byte Latent Transformer: each byte of the text is one token, id = byte + 4.

    Takes `str` and `bytes`, single or in lists; every byte string comes back unchanged (`decode_bytes`), and every str
    too (`decode`). Added tokens such as `"</s>"` are found in a str unless `split_special_tokens=True`; in `bytes`, which
    are data, only with an explicit `split_special_tokens=False`.

    Args:
        errors: what `decode` does with bytes that are no UTF-8, as in `bytes.decode`.
        bos_token, eos_token, boe_token, bpe_token: names of ids 1, 2, 0 and 3.
        pad_token: name of the padding, by default that of id 0. Padding is told by `attention_mask`, never by an id.
        add_bos_token: put `bos_token` before each text.
        add_eos_token: put `eos_token` after each text. For training; a prompt must not end with it.
        padding_side: 'left', so that what is generated follows the prompt, or 'right'.
        tokenizer_file: a `tokenizer.json` to start from; its names of ids 0 to 3 and its added tokens are taken over.
        kwargs: as in any tokenizer of transformers (`model_max_length`, `truncation_side`, `chat_template`, ...).
    Raises:
        ValueError: the file does not map byte b to id b + 4, or `errors` is not a handler for decoding.

    Example: `BltTokenizer()("hé").input_ids` is `[1, 108, 199, 173]`.

    Files on the Hub that this class did not write (they have no `errors` in `tokenizer_config.json`) may ask for EOS after
    every text and name tokens beyond the 260 rows of the embedding: there `add_eos_token` counts only when the caller
    passes it, an unknown `unk_token` is dropped and an unknown `pad_token` becomes id 0.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        errors: str = "replace",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        pad_token: str | AddedToken | None = "<boe>",
        boe_token: str | AddedToken = "<boe>",
        bpe_token: str | AddedToken = "<bpe>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        padding_side: str = "left",
        tokenizer_file: str | os.PathLike | None = None,
        **kwargs,
    ):
        self._added = None
        self._errors = _check_errors(errors)
        backend = kwargs.pop("tokenizer_object", None)
        if kwargs.pop("merges", None):
            raise ValueError("`merges` must be empty: every token of a BLT is one byte.")
        if (vocab := kwargs.pop("vocab", None)) is not None:
            _check_byte_vocabulary(dict(vocab), "`vocab`")
        if backend is None and tokenizer_file is not None:
            backend = Tokenizer.from_file(os.fspath(tokenizer_file))
        if backend is None:
            names = zip((boe_token, bos_token, eos_token, bpe_token), SPECIAL_NAMES)
            backend = _build_backend([name or default for name, default in names])
        else:
            _check_byte_vocabulary(backend.get_vocab(with_added_tokens=False), "`tokenizer.json`")
        kwargs.setdefault("chat_template", DEFAULT_CHAT_TEMPLATE)
        for name in ("boe_token", "bpe_token"):  # `from_pretrained` gathers them here
            (kwargs.get("model_specific_special_tokens") or {}).pop(name, None)
        super().__init__(
            tokenizer_object=backend,
            errors=errors,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            boe_token=backend.id_to_token(0),
            bpe_token=backend.id_to_token(3),
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            padding_side=padding_side,
            **kwargs,
        )

    # Loading and saving

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        config = {}
        if (path := resolved_vocab_files.get("tokenizer_config_file")) is not None:
            with open(path, encoding="utf-8") as reader:
                config = json.load(reader)
        facts = {
            "written_here": "errors" in config,
            "asks_for": {key: config[key] for key in ("add_bos_token", "add_eos_token") if key in config},
            "passed": tuple(kwargs),
        }
        return super()._from_pretrained(resolved_vocab_files, *args, _file_facts=facts, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """Turn a `tokenizer.json` into a backend. Called by `from_pretrained` with all that goes to `__init__`."""
        facts = kwargs.pop("_file_facts", {"written_here": True, "asks_for": {}, "passed": tuple(kwargs)})
        path = kwargs.pop("tokenizer_file", None)
        spec = None
        if path is not None:
            with open(path, encoding="utf-8") as reader:
                spec = json.load(reader)
            vocab = spec.get("model", {}).get("vocab")
            _check_byte_vocabulary(vocab if isinstance(vocab, dict) else {}, f"`{path}`")
            for index in sorted({*range(BYTE_OFFSET)} - {*vocab.values()}):
                vocab[SPECIAL_NAMES[index]] = index
        else:
            vocab = dict(zip(SPECIAL_NAMES, range(BYTE_OFFSET)))

        written = facts["asks_for"]
        if spec is not None and (spec.get("post_processor") or {}).get("type") == "TemplateProcessing":
            in_template = {index for token in spec["post_processor"]["special_tokens"].values() for index in token["ids"]}
            written = {"add_bos_token": 1 in in_template, "add_eos_token": 2 in in_template}
        if not facts["written_here"]:
            written = {**written, "add_eos_token": False}
        kwargs.update({key: value for key, value in written.items() if key not in facts["passed"]})

        if not facts["written_here"]:
            cls._drop_tokens_without_embedding(kwargs, facts["passed"], vocab, spec)
        if spec is not None:
            kwargs["tokenizer_object"] = Tokenizer.from_str(json.dumps(spec))
        return kwargs

    @staticmethod
    def _drop_tokens_without_embedding(kwargs, passed, vocab, spec):
        """Forget an `unk_token` or `pad_token` beyond the 260 rows, unless tokens after it need their ids kept."""
        beyond = {str(kwargs[key]) for key in ("unk_token", "pad_token") if key not in passed and kwargs.get(key)}
        beyond -= vocab.keys()
        if {token["content"] for token in (spec or {}).get("added_tokens", []) if token["id"] >= VOCAB_SIZE} <= beyond:
            for key, replacement in (("unk_token", None), ("pad_token", next(n for n, i in vocab.items() if i == 0))):
                if key not in passed and str(kwargs.get(key)) in beyond:
                    kwargs[key] = replacement
            decoder = kwargs.get("added_tokens_decoder") or {}
            kwargs["added_tokens_decoder"] = {i: token for i, token in decoder.items() if str(token) not in beyond}
            if spec is not None:
                spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in beyond]

    def _save_pretrained(self, *args, **kwargs):
        self.update_post_processor()  # the names of BOS and EOS may have changed since
        return super()._save_pretrained(*args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No file: the bytes are the vocabulary."""
        return ()

    def train_new_from_iterator(self, *args, **kwargs):
        raise NotImplementedError("A BLT reads bytes: its vocabulary is fixed and there is nothing to train.")

    # Vocabulary

    @property
    def errors(self) -> str:
        """What `decode` does with bytes that are no UTF-8."""
        return self._errors

    @errors.setter
    def errors(self, value: str):
        self._errors = _check_errors(value)

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        for token in map(str, new_tokens):
            if token in _SYMBOL_BYTES and not token.isascii():
                raise ValueError(f"{token!r} cannot be added: it names byte 0x{_SYMBOL_BYTES[token][0]:02X} in the vocabulary.")
        self._added = None
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _added_tokens(self) -> _AddedTokens:
        size = self._tokenizer.get_vocab_size()  # somebody may add to the backend
        if self._added is None or self._added[0] != size:
            self._added = (size, _AddedTokens(self))
        return self._added[1]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """1 for each special token, 0 for the others, in the row that these ids make (or made already)."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * bool(self.add_bos_token), [1] * bool(self.add_eos_token)
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [value for ids in texts for value in (*bos, *[0] * len(ids), *eos)]

    # Encoding

    def __call__(self, text=None, *args, **kwargs) -> BatchEncoding:
        """As in every tokenizer of transformers; texts may be `bytes` as well. Unknown arguments are an error."""
        kwargs.setdefault("split_special_tokens", None)  # tells a default from a request
        return super().__call__(text, *args, **kwargs)

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return [byte + BYTE_OFFSET for byte in _to_bytes(text)]

    def _encode_plus(
        self,
        text,
        text_pair=None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | TensorType | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **kwargs,
    ) -> BatchEncoding:
        call = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        sanitize = kwargs.pop("sanitize_control_tokens", False)
        _reject_unknown(kwargs, "__call__")
        if sanitize or self._tokenizer.normalizer is not None:
            result = super()._encode_plus(**call, sanitize_control_tokens=sanitize)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            return result

        padding_side = self.padding_side if padding_side is None else padding_side
        _check_encode_arguments(padding_side, self.truncation_side, max_length, stride, pad_to_multiple_of)
        items, batched = _as_items(text, text_pair, is_split_into_words)
        plan = _Plan(
            added=self._added_tokens(),
            keep_special=not (self.split_special_tokens if split_special_tokens is None else split_special_tokens),
            parse_bytes=split_special_tokens is False,
            bos=(self.bos_token_id,) if add_special_tokens and self.add_bos_token else (),
            eos=(self.eos_token_id,) if add_special_tokens and self.add_eos_token else (),
            pad_id=self.pad_token_id or 0,
            pad_type_id=self.pad_token_type_id,
            padding_side=padding_side,
            truncation_side=self.truncation_side,
            truncation=truncation_strategy,
            max_length=None if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE else max_length,
            stride=stride,
            overflow=return_overflowing_tokens,
            is_split_into_words=is_split_into_words,
        )
        tensor_type = None if return_tensors is None else TensorType(return_tensors)
        as_arrays = tensor_type in (TensorType.PYTORCH, TensorType.NUMPY)

        def padded_length(lengths: Sequence[int]) -> int:
            longest = max(lengths, default=0)
            self._eventual_warn_about_too_long_sequence(range(longest), max_length, verbose)
            if padding_strategy == PaddingStrategy.DO_NOT_PAD:
                return 0
            length = max_length if padding_strategy == PaddingStrategy.MAX_LENGTH else longest
            return length + -length % (pad_to_multiple_of or 1)

        names = ["input_ids"]
        names += ["token_type_ids"] * _default(return_token_type_ids, "token_type_ids" in self.model_input_names)
        names += ["attention_mask"] * _default(return_attention_mask, "attention_mask" in self.model_input_names)
        names += ["special_tokens_mask"] * bool(return_special_tokens_mask)
        names += ["offset_mapping"] * bool(return_offsets_mapping)

        flat = None
        if {*names} <= {"input_ids", "attention_mask"} and not return_overflowing_tokens:
            flat = _encode_flat(items, plan, padded_length, as_arrays)
        if flat is not None:
            input_ids, attention_mask, lengths, rows = flat
            columns = {"input_ids": input_ids, "attention_mask": attention_mask}
            columns = {name: columns[name] for name in names}
        else:
            per_item = [_encode_row(item if isinstance(item, tuple) else (item,), plan) for item in items]
            length = padded_length([len(row) for row in per_item])
            rows = [row._pad_to(length) for main in per_item for row in (main, *main.overflowing)]
            lengths = [len(row) for row in rows]
            columns = {name: [row._columns(name) for row in rows] for name in names}
            if as_arrays:
                _check_rectangular(lengths)
                columns = {name: np.stack(column) if rows else _EMPTY for name, column in columns.items()}
            else:
                columns = {name: [array.tolist() for array in column] for name, column in columns.items()}
                if return_offsets_mapping:
                    columns["offset_mapping"] = [[*map(tuple, row)] for row in columns["offset_mapping"]]
        if return_length:
            columns["length"] = np.array(lengths) if as_arrays else lengths
        if return_overflowing_tokens:
            samples = [i for i, main in enumerate(per_item) for _ in (main, *main.overflowing)]
            columns["overflow_to_sample_mapping"] = np.array(samples, dtype=np.int64) if as_arrays else samples

        if tensor_type == TensorType.PYTORCH:
            import torch

            columns = {name: torch.from_numpy(column) for name, column in columns.items()}
        elif tensor_type is None and not batched and not return_overflowing_tokens:
            columns = {name: column[0] if name != "length" else column for name, column in columns.items()}
        pairs = any(isinstance(item, tuple) and len(item) == 2 for item in items[:1])
        return BatchEncoding(columns, rows, None if as_arrays else tensor_type, n_sequences=2 if pairs else 1)

    # Decoding

    def decode_bytes(self, token_ids, skip_special_tokens: bool = True) -> bytes | list[bytes]:
        """The raw bytes of one sequence of ids, or a list of them for a batch.

        Args:
            token_ids: an int, a list, array or tensor of ids, one- or two-dimensional, or a mapping with `input_ids`.
            skip_special_tokens: leave special tokens out; else they appear as the UTF-8 of their names.
        Raises:
            ValueError: an id is negative or not below `len(tokenizer)`. TypeError: ids are not integers.
        """
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        if hasattr(token_ids, "detach"):
            token_ids = token_ids.detach().cpu().numpy()
        if not isinstance(token_ids, (list, tuple)):
            token_ids = np.asarray(token_ids)
            if token_ids.ndim == 2:
                return [self._join_bytes(row, skip_special_tokens) for row in token_ids]
            return self._join_bytes(np.atleast_1d(token_ids), skip_special_tokens)
        if len(token_ids) and getattr(token_ids[0], "ndim", 0 if not isinstance(token_ids[0], (list, tuple)) else 1):
            return [self.decode_bytes(row, skip_special_tokens) for row in token_ids]
        return self._join_bytes(token_ids, skip_special_tokens)

    def _join_bytes(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool) -> bytes:
        added = self._added_tokens()
        if not isinstance(ids, np.ndarray):
            try:  # all below 256, nearly always: ten times faster than an array from a list
                raw = bytes(ids)
            except (ValueError, TypeError):
                ids = np.asarray(ids)
            else:
                raw = raw.translate(None, added.special_bytes) if skip_special_tokens else raw
                if not raw.translate(None, _BYTE_IDS_BELOW_256):
                    return raw.translate(_UNSHIFT)
                pieces = _SPECIAL_ID.split(raw)
                pieces[0::2] = [piece.translate(_UNSHIFT) for piece in pieces[0::2]]
                pieces[1::2] = [added.names[piece[0]].encode() for piece in pieces[1::2]]
                return b"".join(pieces)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TypeError(f"`token_ids` must be integers in one or two dimensions; got {ids!r:.80}")
        wrong = ids[(ids < 0) | (ids >= len(self))]
        if wrong.size:
            raise ValueError(f"`token_ids` must be at least 0 and below {len(self)}; got {wrong[0]}.")
        if skip_special_tokens:
            ids = ids[~np.isin(ids, added.special_ids)]
        pieces, begin = [], 0
        for position in np.flatnonzero((ids < BYTE_OFFSET) | (ids >= VOCAB_SIZE)).tolist():
            pieces.append((ids[begin:position] - BYTE_OFFSET).astype(np.uint8).tobytes())
            pieces.append(added.names[int(ids[position])].encode())
            begin = position + 1
        return b"".join([*pieces, (ids[begin:] - BYTE_OFFSET).astype(np.uint8).tobytes()])

    def decode(
        self,
        token_ids,
        skip_special_tokens: bool = False,
        errors: str | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
        **kwargs,
    ) -> str | list[str]:
        """The text of one sequence of ids, or a list of texts for a batch; see `decode_bytes` for what is taken.

        Args:
            skip_special_tokens: leave special tokens out.
            errors: for this call, in place of `self.errors`.
            clean_up_tokenization_spaces, spaces_between_special_tokens: taken and not used; text stays as it is.
        Raises:
            UnicodeDecodeError: `errors` is 'strict' and the bytes are no UTF-8.
        """
        _reject_unknown(kwargs, "decode")
        errors = self._errors if errors is None else _check_errors(errors)
        data = self.decode_bytes(token_ids, skip_special_tokens)
        return data.decode("utf-8", errors) if isinstance(data, bytes) else [d.decode("utf-8", errors) for d in data]

    def _decode(self, token_ids, **kwargs) -> str:
        return self.decode(token_ids, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens as `tokenize` returns them."""
        data = b"".join(_SYMBOL_BYTES[token] if token in _SYMBOL_BYTES else token.encode() for token in tokens)
        return data.decode("utf-8", self._errors)


__all__ = ["BltEncoding", "BltTokenizer"]
