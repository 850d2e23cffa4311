"""Text from bytes as they come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_hf import BltTokenizer
from blt_hf.serving.streaming import TextStream
from blt_hf.tokenizer.encoding import byte_ids


tokenizer = BltTokenizer()


@given(st.text(max_size=30), st.integers(1, 5))
def test_pieces_are_the_text(text, size):
    ids = byte_ids(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.close() == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_nothing_of_a_stop_string_is_given(text, stop, size):
    """And the first one counts, wherever it lies among the pieces."""
    stream, found = TextStream(tokenizer, stop), ""
    ids = byte_ids(text)
    for start in range(0, len(ids), size):
        found += stream.push(ids[start : start + size])
        if stream.is_stopped:
            break
    found += stream.close()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert stream.is_stopped == bool(ends)
    if not ends:
        assert found == text
    elif size == 1:  # byte by byte, the string that is complete first ends the answer
        assert any(found + s == text[: min(ends)] for s in stop)
    assert not any(s in found for s in stop)


def test_no_character_is_cut_in_two():
    stream = TextStream(tokenizer)
    pieces = [stream.push([i]) for i in byte_ids("é速")]
    assert pieces == ["", "é", "", "", "速"]


def test_special_tokens_are_left_out_and_added_ones_are_text():
    own = BltTokenizer()
    own.add_tokens(["<think>"])
    index = own.convert_tokens_to_ids("<think>")
    stream = TextStream(own, ["ho"])
    assert stream.push([1, index, *byte_ids("a"), 2]) == "<think>a"
    assert stream.push(byte_ids("h")) == "" and not stream.is_stopped
    assert stream.push(byte_ids("o!")) == "" and stream.is_stopped
    assert stream.push(byte_ids("more")) == ""


@pytest.mark.parametrize("data", [b"\xff", b"a\xe9", b"\xe9\x80"])
def test_bytes_that_are_no_text(data):
    stream = TextStream(tokenizer)
    assert stream.push([b + 4 for b in data]) + stream.close() == data.decode("utf-8", "replace")
