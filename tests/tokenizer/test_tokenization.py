"""The tokenizer against a plain-Python oracle, and against the `tokenizers` backend that it saves for others."""

import copy
import gc
import importlib
import inspect
import io
import json
import os
import pickle
import random
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from blt_hf import BltConfig
from blt_hf.tokenizer.encoding import BYTE_SYMBOLS
from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers.bad_inputs import WRONG_INPUTS
from helpers.models import make_model
from helpers.processes import run


ROOT = Path(__file__).parents[2]
SPECIALS = {"<boe>": 0, "<s>": 1, "</s>": 2, "<bpe>": 3}
MIXED = "naïve café — 你好，世界! Привет 🚀👩‍👩‍👧 עברית हिन्दी x\u0301\n\ttab </p>"
# Likely to go wrong: markers, parts of markers, blanks around them, characters of 1 to 4 bytes, combining marks
ATOMS = [
    "</s>",
    "<s>",
    "<boe>",
    "<bpe>",
    "<",
    "/s>",
    "foo",
    "foobar",
    "<|x|>",
    " lst",
    "  lst",
    "rst  ",
    "one",
    "bone",
]
ATOMS += [
    "one!",
    "é",
    "你",
    "é你",
    " é你 ",
    "🚀",
    "ไ",
    "x\u0301",
    "\u3000",
    "\x00",
    "\ufffd",
    "  ",
    "\n",
    "12",
    "don't",
    "",
]
texts = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=8).map("".join)
raw_bytes = st.binary(max_size=60) | st.lists(st.sampled_from([b"<s>", b"</s>", b"\xff\xfc", b"\xe4\xbd", b"a"])).map(
    b"".join
)


@pytest.fixture
def tokenizer() -> BltTokenizer:
    return BltTokenizer()


def rust(tokenizer: BltTokenizer) -> PreTrainedTokenizerFast:
    """What a plain transformers makes of the backend that we save."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map, **sides)


def oracle(text: str | bytes, parse: bool = True) -> list[int]:
    """Ids without BOS, one position after the other."""
    data = text.encode() if isinstance(text, str) else text
    ids, position = [], 0
    while position < len(data):
        found = [name for name in SPECIALS if parse and data.startswith(name.encode(), position)]
        ids.append(SPECIALS[found[0]] if found else data[position] + 4)
        position += len(found[0]) if found else 1
    return ids


def oracle_batch(rows: list[list[int]], length: int, side: str) -> tuple[list[list[int]], list[list[int]]]:
    ids, mask = [], []
    for row in rows:
        missing = max(0, length - len(row))
        ids.append([0] * missing + row if side == "left" else row + [0] * missing)
        mask.append([0] * missing + [1] * len(row) if side == "left" else [1] * len(row) + [0] * missing)
    return ids, mask


def test_ids_are_bytes_plus_four(tokenizer):
    assert tokenizer(bytes(range(256)), add_special_tokens=False).input_ids == list(range(4, 260))
    assert tokenizer("hé").input_ids == [1, 108, 199, 173]
    assert (tokenizer.vocab_size, len(tokenizer), len(tokenizer.get_vocab())) == (260, 260, 260)
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS} == SPECIALS
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.boe_token_id, tokenizer.bpe_token_id, tokenizer.unk_token_id) == (0, 3, None)
    assert tokenizer.all_special_ids == [1, 2, 0, 3]
    assert tokenizer.is_fast and tokenizer("a").is_fast
    assert tokenizer.padding_side == "left" and tokenizer.add_bos_token and not tokenizer.add_eos_token


@given(raw_bytes)
def test_every_byte_string_comes_back(data):
    tokenizer = BltTokenizer()
    for given_data in (data, bytearray(data), memoryview(data)):
        ids = tokenizer(given_data).input_ids
        assert ids == [1] + [byte + 4 for byte in data]
        assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode_bytes(tokenizer([data, data]).input_ids) == [data, data]
    arrays = tokenizer([data], return_tensors="np").input_ids
    assert tokenizer.decode_bytes(arrays) == [data] and tokenizer.decode_bytes(torch.from_numpy(arrays)[0]) == data
    escaped = tokenizer.decode(ids, skip_special_tokens=True, errors="surrogateescape")
    assert tokenizer(escaped, split_special_tokens=True).input_ids == ids
    for errors in ("replace", "ignore", "backslashreplace", "surrogateescape"):
        assert tokenizer.decode(ids[1:], errors=errors) == data.decode("utf-8", errors)


@pytest.mark.parametrize("batches", [2, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_million_byte_strings(tokenizer, batches):
    """1,000 random strings a batch: all of them come back, from lists and from padded tensors."""
    generator = np.random.default_rng(0)
    for number in range(batches):
        lengths = generator.integers(0, 40, 1000)
        # Half of the batches are bytes of any value, half are ASCII with many markers in it
        raw = generator.integers(0, 256 if number % 2 else 128, lengths.sum(), dtype=np.uint8).tobytes()
        ends = lengths.cumsum().tolist()
        rows = [raw[end - length : end] for end, length in zip(ends, lengths.tolist())]
        side = ("left", "right")[number // 2 % 2]
        ids = tokenizer(rows).input_ids
        assert ids == [[1, *(byte + 4 for byte in row)] for row in rows]
        assert tokenizer.decode_bytes(ids) == rows
        batch = tokenizer(rows, padding=True, padding_side=side, return_tensors="np")
        assert tokenizer.decode_bytes(batch.input_ids) == rows
        assert batch.attention_mask.sum(axis=1).tolist() == (1 + lengths).tolist()
        if number % 10 == 0:  # plain Python is slow
            texts = [row.decode("latin-1") + name for row, name in zip(rows, [*SPECIALS, ""] * 200)]
            found = [[1, *oracle(text)] for text in texts]
            width = max(map(len, found))
            assert tokenizer(texts, padding=True).input_ids == [[0] * (width - len(row)) + row for row in found]


@given(st.text(alphabet=st.characters(), max_size=40))
def test_every_str_comes_back(text):
    """Lone surrogates too: those that stand for a byte, and those that stand for themselves."""
    tokenizer = BltTokenizer()
    ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert ids == oracle(text, parse=False) and tokenizer.decode(ids, errors="strict") == text
        offsets = tokenizer(text, return_offsets_mapping=True, split_special_tokens=True).offset_mapping
        assert len(offsets) == len(ids) + 1
    assert tokenizer.decode_bytes(ids) == b"".join(
        c.encode("utf-8", "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass") for c in text
    )


@given(texts)
def test_special_tokens_in_a_text(text):
    tokenizer = BltTokenizer()
    assert tokenizer(text).input_ids == [1, *oracle(text)]
    assert tokenizer.encode(text) == [1, *oracle(text)]
    assert tokenizer(text, split_special_tokens=True).input_ids == [1, *oracle(text, parse=False)]
    assert BltTokenizer(split_special_tokens=True)(text).input_ids == [1, *oracle(text, parse=False)]
    assert tokenizer(text.encode()).input_ids == [1, *oracle(text, parse=False)]
    assert tokenizer(text.encode(), split_special_tokens=False).input_ids == [1, *oracle(text)]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == oracle(text)
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text == tokenizer.decode(oracle(text))


@given(
    st.lists(texts | raw_bytes, max_size=5),
    st.sampled_from(["left", "right"]),
    st.sampled_from([None, 1, 7]),
    st.booleans(),
    st.sampled_from([None, 6, 20]),
)
@example([b"</s>", "</s>"], "left", None, False, None)  # the name of a token, once as bytes
def test_batches_against_the_oracle(rows, side, multiple, eos, max_length):
    tokenizer = BltTokenizer(add_eos_token=eos, padding_side=side)
    room = None if max_length is None else max_length - 1 - eos
    expected = [[1, *oracle(row, parse=isinstance(row, str))[:room], *[2] * eos] for row in rows]
    options = {"truncation": max_length is not None, "max_length": max_length}
    batch = tokenizer(rows, **options)
    assert batch.input_ids == expected and batch.attention_mask == [[1] * len(row) for row in expected]

    longest = max(map(len, expected), default=0)
    ids, mask = oracle_batch(expected, longest + -longest % (multiple or 1), side)
    if multiple is not None and max_length is not None:
        return  # transformers refuses a `max_length` that is not a multiple
    options |= {"padding": True, "pad_to_multiple_of": multiple}
    batch = tokenizer(rows, **options)
    assert batch.input_ids == ids and batch.attention_mask == mask
    for kind in ("pt", "np"):
        batch = tokenizer(rows, return_tensors=kind, **options)
        assert isinstance(batch.input_ids, torch.Tensor if kind == "pt" else np.ndarray)
        assert str(batch.input_ids.dtype).endswith("int64") and str(batch.attention_mask.dtype).endswith("int64")
        assert batch.input_ids.tolist() == ids and batch.attention_mask.tolist() == mask
    if {*map(type, rows)} <= {str}:  # what the backend says of the same rows
        for i, row in enumerate(batch.encodings):
            assert row.ids == ids[i] and row.attention_mask == mask[i]
    other_side = "left" if side == "right" else "right"
    flipped = tokenizer(rows, padding_side=other_side, return_tensors="pt", **options)
    assert flipped.input_ids.tolist() == oracle_batch(expected, batch.input_ids.shape[1], other_side)[0]


@st.composite
def calls(draw):
    """A text or batch, of texts, pairs or lists of words, with options of every kind."""
    words, batched, paired = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    one = st.lists(texts, max_size=4) if words else texts
    count = draw(st.integers(1, 3))
    text = draw(st.lists(one, min_size=count, max_size=count) if batched else one)
    pair = draw(st.lists(one, min_size=count, max_size=count) if batched else one) if paired else None
    if not batched and not pair:
        pair = None  # transformers takes an empty second text for none, only outside of batches
    options = {"is_split_into_words": words, "verbose": False}
    some = {
        "padding": st.sampled_from([True, "max_length"]),
        "padding_side": st.sampled_from(["left", "right"]),
        "truncation": st.sampled_from(["only_first", "only_second", "longest_first"]),
        "max_length": st.sampled_from([8, 16, 24]),
        "stride": st.integers(0, 2),
        "pad_to_multiple_of": st.sampled_from([1, 8]),
        "return_token_type_ids": st.just(True),
        "return_overflowing_tokens": st.just(True),
        "return_special_tokens_mask": st.just(True),
        "return_offsets_mapping": st.just(True),
        "return_length": st.just(True),
        "add_special_tokens": st.just(False),
        "split_special_tokens": st.just(True),
    }
    for name, values in some.items():
        if draw(st.booleans()):
            options[name] = draw(values)
    sides = {"truncation_side": draw(st.sampled_from(["left", "right"])), "padding_side": "left"}
    flags = {"add_bos_token": draw(st.booleans()), "add_eos_token": draw(st.booleans())}
    return text, pair, options, sides | flags


EXTRA_TOKENS = [
    AddedToken("foo"),
    AddedToken("foobar"),
    AddedToken("<|x|>", normalized=False),
    AddedToken(" lst", lstrip=True),
    AddedToken("rst", rstrip=True),
    AddedToken("one", single_word=True),
    AddedToken("é你", normalized=False, lstrip=True, rstrip=True),
]
PROPERTIES = ["ids", "type_ids", "offsets", "word_ids", "sequence_ids", "special_tokens_mask", "attention_mask"]


@settings(max_examples=max(300, settings().max_examples))
@given(calls(), st.booleans())
def test_everything_that_the_backend_answers(call, with_extra_tokens):
    """Pairs, words, strides, overflow, offsets, added tokens that eat blanks: equal to the library's Rust code."""
    text, pair, options, settings = call
    ours = BltTokenizer(**settings)
    if with_extra_tokens:
        assert ours.add_tokens(EXTRA_TOKENS) == len(EXTRA_TOKENS)
        assert ours.convert_tokens_to_ids("foo") == 260 and len(ours) == 260 + len(EXTRA_TOKENS)
    theirs = rust(ours)
    try:
        expected = theirs(text, pair, **options)
    except BaseException:  # the library panics for a stride as large as the room, and has its own error types
        with pytest.raises(ValueError):
            ours(text, pair, **options)
        return
    try:
        result = ours(text, pair, **options)
    except ValueError as error:  # refused before it is known whether a text is so long that the library would panic
        assert "`stride` must be less than what" in str(error) and options["stride"] > 0
        return
    assert dict(result) == dict(expected)
    assert len(result.encodings) == len(expected.encodings)
    for row, other in zip(result.encodings, expected.encodings):
        for name in PROPERTIES:
            assert getattr(row, name) == getattr(other, name), name
        if not with_extra_tokens:  # the library calls a token that ate blanks by what it ate
            assert row.tokens == other.tokens
        assert row.n_sequences == other.n_sequences and len(row) == len(other)
        for token in range(len(row)):
            assert row.token_to_chars(token) == other.token_to_chars(token)
            assert row.token_to_word(token) == other.token_to_word(token)
            assert row.token_to_sequence(token) == other.token_to_sequence(token)
        for sequence in range(row.n_sequences):
            for index in range(12):
                for name in ("char_to_token", "char_to_word", "word_to_tokens", "word_to_chars"):
                    assert getattr(row, name)(index, sequence) == getattr(other, name)(index, sequence), name
        for skip in (False, True):
            assert ours.decode(row.ids, skip_special_tokens=skip) == theirs.decode(row.ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 260), max_size=40))
def test_decoding_any_ids(ids):
    tokenizer = BltTokenizer()
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    theirs = rust(tokenizer)
    for skip in (False, True):
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert text == theirs.decode(ids, skip_special_tokens=skip)
        for other in (tuple(ids), np.array(ids, dtype=np.int32), torch.tensor(ids, dtype=torch.int64)):
            assert tokenizer.decode(other, skip_special_tokens=skip) == text
        assert tokenizer.batch_decode([ids, ids], skip_special_tokens=skip) == [text, text]
    assert tokenizer.decode_bytes(ids) == bytes(i - 4 for i in ids if 4 <= i < 260)


@given(st.lists(st.integers(0, 400) | st.just(10**6), max_size=40))
def test_ids_beyond_the_tokenizer_are_skipped(ids):
    """A model whose embedding has more rows than there are tokens can write them; the library skips them too."""
    tokenizer = BltTokenizer()
    tokenizer.add_tokens(["<tool>"])
    known = [i for i in ids if i < len(tokenizer)]
    for skip in (False, True):
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert text == tokenizer.decode(known, skip_special_tokens=skip)
        assert text == rust(tokenizer).decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(torch.tensor([ids], dtype=torch.int64), skip_special_tokens=skip) == [text]
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.int64)) == tokenizer.decode_bytes(known)


def test_a_model_with_more_rows_than_tokens_writes_a_text(tokenizer):
    model = make_model()
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.config.vocab_size == 320
    prompt = tokenizer("Hé", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer)

    def write_beyond(ids, scores):  # every second byte of the text is an id without a token
        ids = ids.shape[1] + 60 if ids.shape[1] % 2 else 300
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(ids), 0.0)

    ids = model.generate(**prompt, max_new_tokens=8, logits_processor=[write_beyond], streamer=streamer)
    assert (ids == 300).sum() == 4
    text = tokenizer.decode(ids[0])
    assert text.startswith("<s>Hé") and len(text) == 9 and "".join(streamer) == text


def test_arguments_of_every_tokenizer(tokenizer):
    """What clients pass to `decode` and `batch_decode` of any tokenizer; none of it changes the text."""
    arguments = {"clean_up_tokenization_spaces": False, "use_source_tokenizer": False}
    assert tokenizer.decode([69, 2], skip_special_tokens=True, **arguments) == "A"
    assert tokenizer.batch_decode([[69], [70]], **arguments) == ["A", "B"]


def test_forms_of_ids(tokenizer):
    assert tokenizer.decode(69) == tokenizer.decode(torch.tensor(69)) == tokenizer.decode(np.int64(69)) == "A"
    assert tokenizer.decode([]) == "" and tokenizer.decode([[], [69]]) == ["", "A"]
    assert tokenizer.decode([torch.tensor(69), torch.tensor(70)]) == "AB"
    assert tokenizer.decode([torch.tensor([69]), torch.tensor([70, 71])]) == ["A", "BC"]
    assert tokenizer.decode(tokenizer(["a", "b"])) == ["<s>a", "<s>b"]
    assert tokenizer.decode([1, 69, 2], clean_up_tokenization_spaces=True) == "<s>A</s>"


def test_errors_policy(tokenizer):
    broken = tokenizer(b"ok \xf0\x9f").input_ids
    assert tokenizer.decode(broken, skip_special_tokens=True) == "ok \ufffd"
    strict = BltTokenizer(errors="strict")
    with pytest.raises(UnicodeDecodeError):
        strict.decode(broken)
    assert strict.decode(broken, errors="ignore") == "<s>ok "
    strict.errors = "backslashreplace"
    assert strict.decode(broken[1:]) == "ok \\xf0\\x9f"
    for bad in ("stric", "xmlcharrefreplace", None, 3):
        with pytest.raises(ValueError, match="errors"):
            BltTokenizer(errors=bad)
        with pytest.raises(ValueError, match="errors"):
            strict.errors = bad
    with pytest.raises(ValueError, match="errors"):
        tokenizer.decode(broken, errors="nothing")


def test_offsets(tokenizer):
    batch = tokenizer("a€</s>b", return_offsets_mapping=True)
    assert batch.offset_mapping == [(0, 0), (0, 1), (1, 2), (1, 2), (1, 2), (2, 6), (6, 7)]
    assert batch.char_to_token(1) == 2 and batch.char_to_token(4) == 5 and batch.token_to_chars(3) == (1, 2)
    assert tokenizer(b"a\xe2\x82\xac", return_offsets_mapping=True).offset_mapping == batch.offset_mapping[:5]
    words = tokenizer(["New", "York"], is_split_into_words=True)
    assert words.word_ids() == [None, 0, 0, 0, 1, 1, 1, 1] and words.word_to_tokens(1) == (4, 8)
    arrays = tokenizer(["a", "bc"], padding=True, return_offsets_mapping=True, return_tensors="pt")
    assert arrays.offset_mapping.tolist() == [[[0, 0], [0, 0], [0, 1]], [[0, 0], [0, 1], [1, 2]]]


@pytest.mark.parametrize("text", [b"ab\xff", "\udce2x", "\ud83dx", b"a</s>", b"a<tool>"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda tokenizer, text: tokenizer(text, return_offsets_mapping=True),
        lambda tokenizer, text: tokenizer(["a", text], return_special_tokens_mask=True),
        lambda tokenizer, text: tokenizer("a", text),
        lambda tokenizer, text: tokenizer([text], is_split_into_words=True),
        lambda tokenizer, text: tokenizer(text).word_ids(),
    ],
)
def test_only_ids_and_masks_of_what_is_no_text(tokenizer, text, ask):
    """The backend reads UTF-8, and would find added tokens in bytes, which are data."""
    tokenizer.add_tokens(["<tool>"])
    ids = tokenizer([text, "a"], padding="max_length", truncation=True, max_length=4, return_tensors="pt")
    assert ids.input_ids.shape == (2, 4) and tokenizer.decode_bytes(ids.input_ids[1]) == b"a"
    with pytest.raises(ValueError, match="`text` must be UTF-8 for pairs, words, offsets"):
        ask(tokenizer, text)


def test_words_and_offsets_of_bytes_that_are_text(tokenizer):
    assert tokenizer("x</s>y z").word_ids() == [None, 0, 1, 2, 3, 3]
    assert tokenizer(b"x</s>y z", split_special_tokens=False).word_ids() == [None, 0, 1, 2, 3, 3]
    assert tokenizer(b"ab 12").word_ids() == [None, 0, 0, 1, 1, 1]


def test_rows_of_a_tokenizer_that_was_changed_since(tokenizer):
    batch = tokenizer("abc")
    tokenizer.add_bos_token = False
    with pytest.raises(RuntimeError, match="changed after this call"):
        batch.tokens()


def test_encodings_are_made_on_demand(tokenizer):
    batch = tokenizer([MIXED] * 3, padding=True, return_tensors="pt")
    assert isinstance(batch, BatchEncoding) and len(batch.encodings) == 3 and batch.n_sequences == 1
    assert [row.ids for row in batch.encodings] == batch.input_ids.tolist()
    assert batch[-1].ids == batch[2].ids and [row.ids for row in batch[:2]] == batch.input_ids[:2].tolist()
    revived = pickle.loads(pickle.dumps(batch))
    assert revived.tokens(1) == batch.tokens(1) == tokenizer.convert_ids_to_tokens(batch.input_ids[1])
    assert "num_tokens" in repr(batch.encodings[0])
    assert tokenizer.backend_tokenizer.padding is None


def test_added_tokens(tokenizer):
    assert tokenizer.add_tokens(["<tool>", "<tool>"]) == 1
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<call a>"]}) == 1
    assert tokenizer("x<tool><call a>").input_ids == [1, 124, 260, 261]
    assert tokenizer("x<tool><call a>", split_special_tokens=True).input_ids[:3] == [1, 124, 260]
    assert tokenizer.decode([124, 260, 261]) == "x<tool><call a>"
    assert tokenizer.decode([124, 260, 261], skip_special_tokens=True) == "x<tool>"
    tokenizer.backend_tokenizer.add_tokens(["<late>"])
    assert tokenizer("<late>").input_ids == [1, 262]
    with pytest.raises(ValueError, match="0xE9"):
        tokenizer.add_tokens(["é"])
    assert tokenizer("<tool>", add_special_tokens=False, return_tensors="pt", padding=True).input_ids.tolist() == [
        [260]
    ]


names = st.text(alphabet="ab<é>", min_size=2, max_size=5)


@settings(max_examples=max(300, settings().max_examples))
@given(
    st.dictionaries(names, st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.lists(st.text(alphabet="ab<é>", max_size=3), max_size=4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@example({"<|im_end|>": (True, False), "<|im": (False, True)}, ["x"], True, random.Random(0))
def test_added_tokens_that_overlap(tokens, pieces, split_special, generator):
    """One is the beginning, the end or the middle of another: the same ids with and without offsets."""
    tokenizer = BltTokenizer()
    for name, (special, normalized) in tokens.items():
        tokenizer.add_tokens([AddedToken(name, normalized=normalized, special=special)], special_tokens=special)
    pieces = [*pieces, *tokens, *tokens]
    generator.shuffle(pieces)
    text = "".join(pieces)
    options = {"split_special_tokens": split_special}
    ids = tokenizer(text, **options).input_ids
    assert ids == tokenizer(text, return_offsets_mapping=True, **options).input_ids
    assert ids == tokenizer([text, "a"], padding=True, **options).input_ids[0][-len(ids) :]
    assert tokenizer.decode(ids[1:]) == text


def test_bos_and_eos(tokenizer):
    tokenizer.add_eos_token = True
    assert tokenizer("a").input_ids == [1, 101, 2]
    tokenizer.add_bos_token = False
    assert tokenizer("a", "b").input_ids == [101, 2, 102, 2]
    assert tokenizer("a", add_special_tokens=False).input_ids == [101]
    assert tokenizer.num_special_tokens_to_add() == 1 and tokenizer.num_special_tokens_to_add(pair=True) == 2
    assert tokenizer.get_special_tokens_mask([101], [102]) == [0, 1, 0, 1]
    assert tokenizer.get_special_tokens_mask([1, 101, 3], already_has_special_tokens=True) == [1, 0, 1]
    tokenizer.eos_token = None
    assert tokenizer("a").input_ids == [101]
    tokenizer.eos_token = "<bpe>"
    assert tokenizer(["a"], return_tensors="np").input_ids.tolist() == [[101, 3]]
    renamed = BltTokenizer(bos_token="[BOS]", pad_token="<bpe>")
    assert renamed("[BOS]<s>").input_ids == [1, 1, 64, 119, 66] and renamed.pad_token_id == 3


def test_pairs_and_empty_inputs(tokenizer):
    assert tokenizer([("a", "b"), ["c", "d"]]).input_ids == [[1, 101, 1, 102], [1, 103, 1, 104]]
    assert tokenizer("a", text_pair=b"b", return_token_type_ids=True).token_type_ids == [0, 0, 1, 1]
    assert tokenizer(["a"], [""]).input_ids == [[1, 101, 1]]
    assert dict(tokenizer([], [])) == {"input_ids": [], "attention_mask": []}
    assert dict(tokenizer([])) == {"input_ids": [], "attention_mask": []}
    assert tokenizer([], return_tensors="pt").input_ids.shape == (0, 0)
    assert tokenizer("", add_special_tokens=False, return_tensors="pt").input_ids.shape == (1, 0)
    assert tokenizer("", add_special_tokens=False, return_tensors="pt").input_ids.dtype == torch.int64
    assert tokenizer(text="a", text_target="b").labels == [1, 102]


def test_pad(tokenizer):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}]
    padded = tokenizer.pad(rows, return_tensors="pt")
    assert padded.input_ids.tolist() == [[0, 1, 2], [1, 2, 3]] and padded.attention_mask.tolist() == [
        [0, 1, 1],
        [1, 1, 1],
    ]
    assert tokenizer.pad(rows, padding_side="right", pad_to_multiple_of=4).input_ids[0] == [1, 2, 0, 0]


@pytest.mark.parametrize("case", list(WRONG_INPUTS))
def test_wrong_input_is_named(tokenizer, case):
    error, message, arguments = WRONG_INPUTS[case]
    with pytest.raises(error, match=message):
        tokenizer(**arguments)


def test_wrong_ids_and_files_are_named(tokenizer, tmp_path):
    for bad in ([-100], [69, -1], [10**6, -1], torch.tensor([-1])):
        with pytest.raises(ValueError, match="`token_ids` must be at least 0; got -1"):
            tokenizer.decode(bad)
    for bad in ([1.5], "abc", None, [[[69]]], torch.tensor([0.5])):
        with pytest.raises(TypeError, match="token_ids"):
            tokenizer.decode(bad)
    with pytest.raises(TypeError, match="'skip_specials'"):
        tokenizer.decode([69], skip_specials=True)
    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    other.save(str(tmp_path / "tokenizer.json"))
    for build in (BltTokenizer.from_pretrained, lambda folder: BltTokenizer(tokenizer_file=folder / "tokenizer.json")):
        with pytest.raises(ValueError, match="byte 0x00 .* must have id 4; got None"):
            build(tmp_path)
    with pytest.raises(ValueError, match="four different"):
        BltTokenizer(bos_token="<boe>")
    with pytest.raises(ValueError, match="merges"):
        BltTokenizer(merges=[("a", "b")])
    with pytest.raises(ValueError, match="add_prefix_space"):
        BltTokenizer(add_prefix_space=True)
    with pytest.raises(NotImplementedError, match="nothing to train"):
        tokenizer.train_new_from_iterator([["a"]], 300)


def test_the_garbage_collector_of_the_process_is_left_alone(tokenizer, monkeypatch):
    """It belongs to all threads."""
    for name in ("disable", "enable", "collect", "freeze"):
        monkeypatch.setattr(gc, name, lambda *args, name=name: pytest.fail(f"gc.{name} was called"))
    tokenizer(["a"] * 9)
    with pytest.raises(ValueError):
        tokenizer(["a", "bc"], return_tensors="pt")


def test_too_long_a_text_is_told(tokenizer, caplog):
    tokenizer.model_max_length = 4
    assert tokenizer("abcdef", truncation=True).input_ids == [1, 101, 102, 103]
    tokenizer("abcdef")
    assert "longer than the specified maximum" in caplog.text


def test_a_normalizer_of_the_user_is_honoured(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer("ABC", truncation=True, max_length=3, padding="max_length").input_ids == [1, 101, 102]
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé </p>"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<s>system: Be brief.\n\nuser: Hé </p>\n\nassistant: "
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == oracle(prompt) and ids.count(1) == 1 and 2 not in ids

    full = [*chat, {"role": "assistant", "content": "Oui 🎉"}]
    text = tokenizer.apply_chat_template(full, tokenize=False)
    assert text == prompt + "Oui 🎉</s>"
    longer = [*full, {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}]}]
    assert tokenizer.apply_chat_template(longer, tokenize=False) == text + "\n\nuser: And?"
    continued = tokenizer.apply_chat_template(full, continue_final_message=True, tokenize=False)
    assert continued == prompt + "Oui 🎉"

    tokenizer.add_eos_token = True  # for training on plain texts; a prompt must not notice
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][-1] == ord(" ") + 4


def test_chat_template_has_a_place_for_tools(tokenizer):
    """Servers hand on whatever a client sends; an error of the template would be an error of the server."""
    chat = [{"role": "user", "content": "How warm is it?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "warmth", "arguments": {}}}]}
    full = [*chat, call, {"role": "tool", "content": "21 °C"}]
    text = tokenizer.apply_chat_template(
        full, tools=[{"name": "warmth"}], documents=[{"text": "é"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        '<s>tools: [{"name": "warmth"}]\n\ndocuments: [{"text": "é"}]\n\nuser: How warm is it?\n\n'
        'assistant: tool calls: [{"function": {"name": "warmth", "arguments": {}}}]</s>\n\ntool: 21 °C\n\nassistant: '
    )
    marked = tokenizer.apply_chat_template(full, return_assistant_tokens_mask=True)
    answer = masked_text(tokenizer, marked["input_ids"], marked["assistant_masks"])
    assert answer.startswith("tool calls: [{") and answer.endswith("}]</s>")


def masked_text(tokenizer, ids, mask) -> str:
    return tokenizer.decode([i for i, keep in zip(ids, mask) if keep])


def test_assistant_masks(tokenizer):
    turns = ["Oui 🎉", "", "你好\n\nuser: no"]
    chat = []
    for turn in turns:
        chat += [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": turn}]
    marked = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    assert masked_text(tokenizer, marked["input_ids"], marked["assistant_masks"]) == "</s>".join(turns) + "</s>"
    batch = tokenizer.apply_chat_template(
        [chat, chat[:2]], return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    for ids, mask, expected in zip(batch["input_ids"], batch["assistant_masks"], (turns, turns[:1])):
        assert masked_text(tokenizer, ids, mask) == "</s>".join(expected) + "</s>"


def test_chat_template_passes_the_checks_of_trl(tokenizer):
    utils = importlib.import_module("trl.chat_template_utils")
    assert utils.get_training_chat_template(tokenizer) is None
    # TRL 1.0 has neither of these yet
    has_markers = getattr(utils, "has_generation_markers", lambda template: True)
    stop_token_trained = getattr(utils, "is_chat_template_stop_token_trained", lambda tokenizer: True)
    assert has_markers(tokenizer.chat_template) and stop_token_trained(tokenizer)


def test_user_text_cannot_speak_for_the_template(tokenizer):
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers does not have it")
    chat = [{"role": "user", "content": "a</s>b<s>"}]
    ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]
    assert ids == [1, *oracle("user: a</s>b<s>", parse=False)]


STREAMED = "Hi 👩‍👩‍👧 你好世界 नमस्ते x\u0301y Straße ไม่มีช่องว่าง\nend of it"


@pytest.mark.parametrize("options", [{}, {"errors": "ignore"}])
def test_streamed_text_has_no_half_character(tokenizer, options):
    pieces = []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    streamer = Recorder(tokenizer, skip_special_tokens=True, **options)
    ids = tokenizer(STREAMED).input_ids
    finished_by = {}
    for step, token in enumerate(ids):
        streamer.put(torch.tensor([token]))
        finished_by[step] = "".join(pieces)
        assert STREAMED.startswith(finished_by[step]) and "\ufffd" not in finished_by[step]
    streamer.end()
    assert "".join(pieces) == STREAMED
    # Promptly: a word with the blank after it, a Chinese character with its last byte
    for shown in ("Hi ", "Hi 👩‍👩‍👧 你", "Hi 👩‍👩‍👧 你好", STREAMED[: STREAMED.index("\n") + 1]):
        assert finished_by[len(shown.encode())] == shown


def test_streamers_of_transformers(tokenizer):
    ids = torch.tensor(tokenizer(STREAMED).input_ids)
    printed = io.StringIO()
    with redirect_stdout(printed):
        streamer = TextStreamer(tokenizer)
        for token in ids:
            streamer.put(token[None])
        streamer.end()
    assert printed.getvalue() == f"<s>{STREAMED}\n"
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, errors="ignore")
    iterator.put(ids[None, :3])
    for token in ids[3:-1]:
        iterator.put(token[None])
    iterator.put(torch.tensor([0xE4 + 4]))  # cut in the middle of a character
    iterator.end()
    assert "".join(iterator) == tokenizer.decode(ids[3:-1])


def same(one: BltTokenizer, other) -> None:
    """Both give the same ids and texts, special tokens and settings included."""
    assert len(one) == len(other) and one.get_vocab() == other.get_vocab()
    assert one.special_tokens_map == other.special_tokens_map and one.all_special_ids == other.all_special_ids
    for name in ("padding_side", "truncation_side", "model_max_length", "chat_template", "model_input_names"):
        assert getattr(one, name) == getattr(other, name), name
    rows = [MIXED, "a</s>b<tool>", ""]
    for options in ({}, {"padding": True}, {"add_special_tokens": False}):
        assert dict(one(rows, **options)) == dict(other(rows, **options))
    ids = one(b"ab\xff\xe4\xbd cd").input_ids
    assert one.decode(ids) == other.decode(ids)


def customised() -> BltTokenizer:
    tokenizer = BltTokenizer(add_eos_token=True, padding_side="right", model_max_length=77, truncation_side="left")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


@pytest.mark.parametrize("build", [BltTokenizer, customised])
def test_save_load_copy_pickle(build, tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = [BltTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)]
    for other in (*loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is BltTokenizer
        same(tokenizer, other)
        assert (other.add_bos_token, other.add_eos_token) == (tokenizer.add_bos_token, tokenizer.add_eos_token)
    same(tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert BltTokenizer.from_pretrained(tmp_path, add_eos_token=False, errors="strict").errors == "strict"
    assert BltTokenizer.from_pretrained(tmp_path, add_eos_token=False)("a").input_ids[-1] == 101
    assert tokenizer.save_vocabulary(str(tmp_path)) == ()

    loaded[0].errors, loaded[0].add_bos_token, loaded[0].eos_token = "surrogateescape", False, "<bpe>"
    loaded[0].save_pretrained(tmp_path / "again")
    again = BltTokenizer.from_pretrained(tmp_path / "again")
    assert again.errors == "surrogateescape" and not again.add_bos_token
    assert again("a").input_ids == ([101, 3] if build is customised else [101])
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")("a").input_ids == again("a").input_ids


def test_from_a_tokenizer_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    same(tokenizer, BltTokenizer(tokenizer_file=tmp_path / "tokenizer.json"))


CALLS = {
    "call": lambda tokenizer: tokenizer(["a", "bc"], padding="max_length", truncation=True, max_length=2),
    "decode": lambda tokenizer: tokenizer.decode([1, 101, 2, 260]),
    "pairs": lambda tokenizer: tokenizer("a", "b", padding="max_length", truncation=True, max_length=20),
    "offsets": lambda tokenizer: tokenizer("a</s>", return_offsets_mapping=True, split_special_tokens=True),
    "asked later": lambda tokenizer: tokenizer("a").word_ids(),
    "too long": lambda tokenizer: tokenizer("abc" * 99),
    "chat": lambda tokenizer: tokenizer.apply_chat_template([{"role": "user", "content": "a"}]),
    "pad": lambda tokenizer: tokenizer.pad({"input_ids": [[1], [1, 101]]}),
    "tokenize": lambda tokenizer: tokenizer.tokenize("a</s>"),
}


@pytest.mark.parametrize("build", [BltTokenizer, lambda: customised()])
def test_calls_leave_no_trace_in_what_is_saved(build):
    tokenizer = build()
    tokenizer.model_max_length = 100
    saved, fingerprint = pickle.dumps(tokenizer), Hasher.hash(tokenizer)
    for name, call in CALLS.items():
        call(tokenizer)
        assert Hasher.hash(tokenizer) == fingerprint, name
        if name == "too long":  # it is told once; transformers notes that
            tokenizer.deprecation_warnings.clear()
        assert pickle.dumps(tokenizer) == saved, name
    assert "padding_side" in inspect.signature(tokenizer).parameters
    tokenizer.add_tokens(["<another>"])
    assert Hasher.hash(tokenizer) != fingerprint


def test_a_data_set_is_mapped_once(tokenizer, tmp_path):
    """`datasets` finds what it has computed by a fingerprint of the function and all that the function uses."""
    Dataset.from_dict({"text": ["a", "bcd"]}).save_to_disk(tmp_path)
    texts, calls = load_from_disk(tmp_path), tmp_path / "calls"

    def tokenize(rows, tokenizer=tokenizer, calls=str(calls)):
        with open(calls, "a") as file:
            file.write("x")
        return tokenizer(rows["text"])

    for _ in range(3):
        rows = texts.map(tokenize, batched=True)
        tokenizer("b</s>", return_offsets_mapping=True)
    assert rows["input_ids"][1] == [1, 102, 103, 104] and calls.read_text() == "x"


IN_PLAIN_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer, PreTrainedTokenizerFast
folder, text = sys.argv[1:]
assert "blt_hf" not in sys.modules
for tokenizer in (AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)):
    assert type(tokenizer).__module__.startswith("transformers.")
    ids = tokenizer(text).input_ids
    print(json.dumps([ids, tokenizer.decode(ids), tokenizer.decode(ids[:-1], skip_special_tokens=True)]))
"""


def test_without_this_package(tmp_path):
    """A process that has transformers only: its own class, without a word about code."""
    tokenizer = customised()
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    BltConfig().save_pretrained(tmp_path)
    text = MIXED + "</s><tool>[SEP]"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IN_PLAIN_TRANSFORMERS, str(tmp_path), text]
    result = run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr
    ids = tokenizer(text).input_ids
    expected = [ids, tokenizer.decode(ids), tokenizer.decode(ids[:-1], skip_special_tokens=True)]
    assert [json.loads(line) for line in result.stdout.splitlines()[-2:]] == [expected, expected]


LEGACY_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "vocab_size": 260,
    "model_max_length": 1024,
    "model_input_names": ["input_ids", "attention_mask"],
    "add_bos_token": True,
    "add_eos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def write_legacy_files(folder: Path, kind: str) -> Path:
    """The tokenizer files of BLT repositories that transformers' converter made, in the forms that occur."""
    names = ["<boe>", "<s>", "</s>", "<pad>"][: 3 if kind == "pad beyond" else 4]
    vocab = {name: index for index, name in enumerate(names)}
    vocab |= {symbol: byte + 4 for byte, symbol in enumerate(BYTE_SYMBOLS)}
    if kind != "no tokenizer.json":
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], continuing_subword_prefix="", end_of_word_suffix=""))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        eos = " </s>:0" if kind == "template with eos" else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"<s>:0 $A:0{eos}",
            pair=f"<s>:0 $A:0 $B:1{eos}",
            special_tokens=[("<s>", 1), ("</s>", 2)] if eos else [("<s>", 1)],
        )
        specials = {key: LEGACY_CONFIG[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
        (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(LEGACY_CONFIG))
    return folder


@pytest.mark.parametrize("kind", ["usual", "template with eos", "pad beyond", "no tokenizer.json"])
def test_legacy_hub_files(kind, tmp_path):
    folder = write_legacy_files(tmp_path / "legacy", kind)
    tokenizer = BltTokenizer.from_pretrained(folder)
    assert tokenizer("a<unk>").input_ids == [1, *oracle("a<unk>")]
    assert not tokenizer.add_eos_token and tokenizer.model_max_length == 1024 and len(tokenizer) == 260
    assert tokenizer.unk_token is None and tokenizer.padding_side == "left" and tokenizer.chat_template
    assert tokenizer.pad_token_id == (3 if kind in ("usual", "template with eos") else 0)
    assert tokenizer("<boe>", add_special_tokens=False).input_ids == [0] and tokenizer.bpe_token_id == 3
    assert tokenizer(["a", ""], padding=True).input_ids[1] == [tokenizer.pad_token_id, 1]

    assert BltTokenizer.from_pretrained(folder, add_eos_token=True)("a").input_ids == [1, 101, 2]
    tokenizer.add_eos_token = True
    tokenizer.save_pretrained(tmp_path / "ours")
    again = BltTokenizer.from_pretrained(tmp_path / "ours")
    assert again("a").input_ids == [1, 101, 2]  # asked for by somebody who has this class
    same(tokenizer, again)


def test_auto_tokenizer_reads_legacy_files(tmp_path):
    """The files name `PreTrainedTokenizerFast`; the registration in `blt_hf/__init__.py` knows better."""
    folder = write_legacy_files(tmp_path / "legacy", "template with eos")
    BltConfig().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is BltTokenizer
    assert tokenizer("a").input_ids == [1, 101]


def test_legacy_tokens_stay_where_others_follow_them(tmp_path):
    """Ids after `<unk>` have rows in a resized embedding; they must not move."""
    folder = write_legacy_files(tmp_path / "legacy", "usual")
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.add_tokens(["<tool>"])
    plain.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(LEGACY_CONFIG))
    tokenizer = BltTokenizer.from_pretrained(folder)
    assert tokenizer("<tool><unk>", add_special_tokens=False).input_ids == [261, 260]


def test_nothing_but_a_folder(tmp_path):
    same(BltTokenizer(), BltTokenizer.from_pretrained(tmp_path))  # a converted checkpoint may bring no tokenizer
    with pytest.raises(OSError):
        BltTokenizer.from_pretrained(tmp_path / "missing")


def test_benchmark_script():
    """It must not stand in for the standard library's `tokenize` when the scripts beside it import that."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    check = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import tokenize; tokenize.generate_tokens"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)
    command = [sys.executable, str(ROOT / "benchmarks" / "tokenize.py"), "--megabytes", "0.02", "--repeats", "1"]
    result = run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["benchmark"] == "tokenize" and report["rows"]
