"""Input that the tokenizer refuses: the error, what it says, and the arguments."""

WRONG_INPUTS = {
    "a text: a number": (TypeError, "`text` must be str or bytes.*int", {"text": 3}),
    "a text: a number of several": (TypeError, "`text` must be str or bytes.*float", {"text": ["a", 1.0]}),
    "a text: None of several": (
        TypeError, "`text` must be str or bytes.*NoneType", {"text": ["a", None], "return_offsets_mapping": True},
    ),
    "a text: None": (ValueError, "text", {"text": None}),
    "a pair: one text and a list": (TypeError, "`text_pair`", {"text": "a", "text_pair": ["b"]}),
    "a pair: a list and one text": (TypeError, "`text_pair`", {"text": ["a"], "text_pair": "b"}),
    "a pair: lists of two lengths": (
        ValueError,
        "length of `text`: 1 does not match .* `text_pair`: 2",
        {"text": ["a"], "text_pair": ["b", "c"]},
    ),
    "a pair: three texts": (TypeError, "a pair of texts, or with `is_split", {"text": [["a", "b", "c"]]}),
    "words: a text": (TypeError, "a list of words", {"text": "a b", "is_split_into_words": True}),
    "padding: a side": (ValueError, "padding_side", {"text": "a", "padding_side": "centre"}),
    "padding: multiples of 0": (
        ValueError, "pad_to_multiple_of", {"text": "a", "padding": True, "pad_to_multiple_of": 0},
    ),
    "padding: none": (ValueError, "padding=True", {"text": ["a", "bc"], "return_tensors": "pt"}),
    "padding: none, with offsets": (
        ValueError, "padding=True", {"text": ["a", "bc"], "return_tensors": "np", "return_offsets_mapping": True},
    ),
    "room: negative": (ValueError, "max_length", {"text": "a", "truncation": True, "max_length": -1}),
    "room: half a token": (ValueError, "max_length", {"text": "a", "truncation": True, "max_length": 2.5}),
    "room: nothing": (
        ValueError, "`max_length` must hold the 1 special", {"text": "a", "truncation": True, "max_length": 0},
    ),
    "room: a stride as large": (
        ValueError, "`stride` .* a text, 2", {"text": "abcd", "truncation": True, "max_length": 3, "stride": 2},
    ),
    "room: a stride as large for the second text": (
        ValueError,
        "`stride` .* a text, 1",
        {"text": "abc", "text_pair": "defg", "truncation": "only_second", "max_length": 6, "stride": 1},
    ),
    "room: a stride as large for a pair": (
        ValueError, "`stride`", {"text": "abc", "text_pair": "de", "truncation": True, "max_length": 5, "stride": 1},
    ),
    "room: a negative stride": (ValueError, "stride", {"text": "a", "stride": -1}),
    "room: of a second text that is not there": (
        ValueError, "only_second", {"text": "abcd", "truncation": "only_second", "max_length": 3},
    ),
    "arguments: a kind of tensors": (ValueError, "return_tensors|TensorType", {"text": "a", "return_tensors": "tensor"}),
    "arguments: an unknown one": (TypeError, "'trucation'", {"text": "a", "trucation": True}),
}  # fmt: skip
