"""Tokenizer of the Byte Latent Transformer: id = byte + 4, and four special ids.

`BltTokenizer` is a fast tokenizer of transformers. It keeps a `tokenizers` backend (a byte-level BPE without merges)
and saves it as `tokenizer.json`, so that its files load in a plain transformers with the same ids. Texts themselves do
not go through the backend: bytes are ids already, and `encoding_blt` shifts them a hundred times faster.
"""

import codecs
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, TensorType

from .encoding_blt import (
    BYTE_OFFSET,
    BYTE_SYMBOLS,
    VOCAB_SIZE,
    AddedTokens,
    EncodePlan,
    PausedCollection,
    encode_batch,
    to_bytes,
)


SPECIAL_NAMES = ("<boe>", "<s>", "</s>", "<bpe>")  # ids 0 to 3

# A prompt ends with `assistant: ` and an answer with EOS, so nothing that waits for an answer ends with EOS. What is
# in `generation`, the answer and its EOS, is what `return_assistant_tokens_mask` marks.
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools or documents -%}
    {{- raise_exception("BltTokenizer's default chat template has no place for tools or documents") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if message['tool_calls'] -%}
        {{- raise_exception("BltTokenizer's default chat template has no place for tool calls") -}}
    {%- endif -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
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
"""

_UNSHIFT = bytes((byte - BYTE_OFFSET) % 256 for byte in range(256))
_BYTE_IDS = bytes(range(BYTE_OFFSET, 256))  # those that fit in a byte
_SPECIAL_ID = re.compile(rb"([\0-\3])")
_SYMBOL_BYTES = {symbol: bytes([byte]) for byte, symbol in enumerate(BYTE_SYMBOLS)}


def _build_backend(names: Sequence[str]) -> Tokenizer:
    """The `tokenizers` model that maps text to the same ids; `names` are the tokens with ids 0 to 3."""
    vocab = {str(name): index for index, name in enumerate(names)}
    vocab.update({symbol: byte + BYTE_OFFSET for byte, symbol in enumerate(BYTE_SYMBOLS)})
    if len(vocab) != VOCAB_SIZE:
        raise ValueError(f"the tokens with ids 0 to 3 must be four different strings; got {[*map(str, names)]}.")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(str(name), normalized=False, special=True) for name in names])
    return backend


def _check_byte_vocabulary(vocab: Mapping[str, int], origin: str) -> None:
    for byte, symbol in enumerate(BYTE_SYMBOLS):
        if vocab.get(symbol) != byte + BYTE_OFFSET:
            raise ValueError(
                f"{origin} is not the vocabulary of a BLT: byte 0x{byte:02X} ({symbol!r}) must have id "
                f"{byte + BYTE_OFFSET}; got {vocab.get(symbol)}."
            )
    if len(vocab) > VOCAB_SIZE:
        raise ValueError(f"{origin} has {len(vocab)} entries; a BLT has {VOCAB_SIZE} and no merged tokens.")


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


def _reject_unknown(names: Iterable[str], method: str) -> None:
    if names := sorted(names):
        raise TypeError(f"`BltTokenizer.{method}` got unexpected arguments: {', '.join(map(repr, names))}.")


def _check_side(name: str, value: str) -> None:
    if value not in ("left", "right"):
        raise ValueError(f"`{name}` must be 'left' or 'right'; got {value!r}.")


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")


def _as_items(text, text_pair, is_split_into_words: bool) -> tuple[list, bool]:
    """The texts, as tuples of one or two where there are pairs or words, and whether they came as a batch."""
    listed = (list, tuple)
    batched = isinstance(text, listed) and (not is_split_into_words or (len(text) > 0 and isinstance(text[0], listed)))
    if not batched:
        if isinstance(text_pair, listed) and not is_split_into_words:
            raise TypeError("`text_pair` is a list and `text` is not; pass two texts, or two lists of as many texts.")
        pair = () if text_pair is None else (text_pair,)
        return [(text, *pair) if pair or is_split_into_words else text], False
    if text_pair is not None:
        if not isinstance(text_pair, listed) or len(text) != len(text_pair):
            error = ValueError if isinstance(text_pair, listed) else TypeError
            raise error(f"`text_pair` must be a list of {len(text)} entries like `text`; got {text_pair!r:.80}")
        return list(zip(text, text_pair)), True
    if is_split_into_words:
        items = [tuple(entry) if entry and isinstance(entry[0], listed) else (entry,) for entry in text]
    elif {*map(type, text)} & {*listed}:
        items = [tuple(entry) if isinstance(entry, listed) else (entry,) for entry in text]
    else:
        return list(text), True
    if any(len(item) > 2 for item in items):
        raise ValueError("an entry of `text` is a text or a pair; for lists of words pass `is_split_into_words=True`.")
    return items, True


class BltTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of the Byte Latent Transformer: each byte of the text is one token, id = byte + 4.

    Takes `str` and `bytes`, single or in lists; every byte string comes back unchanged (`decode_bytes`), and every str
    too (`decode`). Special tokens such as `"</s>"` are found in a str unless `split_special_tokens=True`; in `bytes`,
    which are data, no added token is found unless the call says `split_special_tokens=False`.

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

    Files that this class did not write (they have no `errors` in `tokenizer_config.json`) may ask for EOS after every
    text and name tokens beyond the 260 rows of the embedding. There `add_eos_token` counts only when the caller passes
    it, an `unk_token` beyond the 260 is dropped and a `pad_token` beyond them becomes id 0.
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
        self._added = None  # (size of the vocabulary, AddedTokens)
        self._errors = _check_errors(errors)
        backend = kwargs.pop("tokenizer_object", None)
        if kwargs.pop("merges", None):
            raise ValueError("`merges` must be empty: every token of a BLT is one byte.")
        if kwargs.get("add_prefix_space"):
            raise ValueError("`add_prefix_space=True` would add a byte to every text; write the space into the text.")
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

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        config = {}
        if (path := resolved_vocab_files.get("tokenizer_config_file")) is not None:
            with open(path, encoding="utf-8") as reader:
                config = json.load(reader)
        asked = {key: config[key] for key in ("add_bos_token", "add_eos_token") if key in config}
        # What `convert_to_native_format` can no longer tell once the file and the caller's arguments are merged
        origin = {"written_here": "errors" in config, "file_asks": asked, "caller_passed": tuple(kwargs)}
        return super()._from_pretrained(resolved_vocab_files, *args, _origin=origin, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """Turn a `tokenizer.json` into a backend. `from_pretrained` passes all that is to go to `__init__`."""
        origin = kwargs.pop("_origin", {"written_here": True, "file_asks": {}, "caller_passed": tuple(kwargs)})
        spec, vocab = None, dict(zip(SPECIAL_NAMES, range(BYTE_OFFSET)))
        if (path := kwargs.pop("tokenizer_file", None)) is not None:
            with open(path, encoding="utf-8") as reader:
                spec = json.load(reader)
            names = {index: name for name, index in vocab.items()}
            vocab = spec.get("model", {}).get("vocab")
            _check_byte_vocabulary(vocab if isinstance(vocab, dict) else {}, f"`{path}`")
            vocab.update({names[index]: index for index in names.keys() - {*vocab.values()}})

        settings = origin["file_asks"]
        if spec is not None and "single" in (spec.get("post_processor") or {}):
            pieces = ["Sequence" in piece for piece in spec["post_processor"]["single"]]
            settings = {"add_bos_token": not pieces[0], "add_eos_token": not pieces[-1]}
        if not origin["written_here"]:
            settings = {**settings, "add_eos_token": False}
            cls._drop_tokens_beyond(kwargs, origin["caller_passed"], vocab, spec)
        kwargs |= {key: value for key, value in settings.items() if key not in origin["caller_passed"]}
        if spec is not None:
            kwargs["tokenizer_object"] = Tokenizer.from_str(json.dumps(spec))
        return kwargs

    @staticmethod
    def _drop_tokens_beyond(kwargs: dict, caller_passed: tuple, vocab: Mapping[str, int], spec: dict | None) -> None:
        """Forget an `unk_token` or `pad_token` that has no row of the 260, unless other tokens follow it."""
        named = {key: str(kwargs[key]) for key in ("unk_token", "pad_token") if kwargs.get(key)}
        dropped = {key: name for key, name in named.items() if key not in caller_passed and name not in vocab}
        added = spec["added_tokens"] if spec is not None else []
        if {token["content"] for token in added if token["id"] >= VOCAB_SIZE} <= {*dropped.values()}:
            pad = next(name for name, index in vocab.items() if index == 0)
            kwargs |= {key: pad if key == "pad_token" else None for key in dropped}
            added[:] = [token for token in added if token["content"] not in dropped.values()]
            decoder = kwargs.get("added_tokens_decoder") or {}
            kwargs["added_tokens_decoder"] = {i: t for i, t in decoder.items() if str(t) not in dropped.values()}

    def _save_pretrained(self, *args, **kwargs):
        self.update_post_processor()  # the names of BOS and EOS may have changed since
        return super()._save_pretrained(*args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No file: the bytes are the vocabulary."""
        return ()

    def train_new_from_iterator(self, *args, **kwargs):
        raise NotImplementedError("A BLT reads bytes: its vocabulary is fixed and there is nothing to train.")

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
                byte = _SYMBOL_BYTES[token][0]
                raise ValueError(f"{token!r} cannot be added: it is the name of byte 0x{byte:02X} in the vocabulary.")
        self._added = None
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _added_tokens(self) -> AddedTokens:
        size = self._tokenizer.get_vocab_size()  # somebody may add to the backend
        if self._added is None or self._added[0] != size:
            specials = {index: self._tokenizer.id_to_token(index) for index in range(BYTE_OFFSET)}
            self._added = (size, AddedTokens(self.added_tokens_decoder, specials))
        return self._added[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_added": None}  # a first call must not change the hash that `datasets` takes of us

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """1 for each special token, 0 for the others, in the row that these ids make (or made already)."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * bool(self.add_bos_token), [1] * bool(self.add_eos_token)
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [value for ids in texts for value in (*bos, *[0] * len(ids), *eos)]

    @functools.wraps(PreTrainedTokenizerFast.__call__, assigned=())
    def __call__(self, text=None, *args, **kwargs) -> BatchEncoding:
        """As in every tokenizer of transformers; texts may be `bytes` as well. Unknown arguments are an error."""
        kwargs.setdefault("split_special_tokens", None)  # tells a default from a request
        return super().__call__(text, *args, **kwargs)

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return [byte + BYTE_OFFSET for byte in to_bytes(text)]

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
        if kwargs:
            unknown = kwargs.keys() - {"sanitize_control_tokens", "src_lang", "tgt_lang"}
            _reject_unknown(unknown, "__call__")  # the languages are what some clients pass to every tokenizer
        if kwargs.get("sanitize_control_tokens") or self._tokenizer.normalizer is not None:
            arguments = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
            arguments.pop("unknown", None)
            result = super()._encode_plus(**arguments, **kwargs)
            self._tokenizer.no_truncation()  # the backend would remember, and save, what this call asked for
            self._tokenizer.no_padding()
            return result

        padding_side = self.padding_side if padding_side is None else padding_side
        _check_side("padding_side", padding_side)
        _check_side("truncation_side", self.truncation_side)
        _check_at_least(0, max_length=max_length, stride=stride)
        _check_at_least(1, pad_to_multiple_of=pad_to_multiple_of)
        pads = padding_strategy != PaddingStrategy.DO_NOT_PAD
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        bos = self.bos_token_id if add_special_tokens and self.add_bos_token else None
        eos = self.eos_token_id if add_special_tokens and self.add_eos_token else None
        plan = EncodePlan(
            added=self._added_tokens(),
            keep_special=not split,
            parse_bytes=split_special_tokens is False,
            bos=() if bos is None else (bos,),
            eos=() if eos is None else (eos,),
            pad_id=self.pad_token_id if pads else 0,
            pad_type_id=self.pad_token_type_id,
            pad_length=(max_length if padding_strategy == PaddingStrategy.MAX_LENGTH else None) if pads else 0,
            pad_to_multiple_of=pad_to_multiple_of or 1,
            padding_side=padding_side,
            truncation=truncation_strategy,
            truncation_side=self.truncation_side,
            max_length=None if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE else max_length,
            stride=stride,
            overflow=return_overflowing_tokens,
            is_split_into_words=is_split_into_words,
        )
        wanted = (
            ("input_ids", True),
            ("token_type_ids", return_token_type_ids),
            ("attention_mask", return_attention_mask),
            ("special_tokens_mask", return_special_tokens_mask),
            ("offset_mapping", return_offsets_mapping),
        )
        names = [name for name, want in wanted if want or (want is None and name in self.model_input_names)]
        tensor_type = None if return_tensors is None else TensorType(return_tensors)
        as_arrays = tensor_type in (TensorType.PYTORCH, TensorType.NUMPY)

        items, batched = _as_items(text, text_pair, is_split_into_words)
        is_pair = bool(items) and isinstance(items[0], tuple) and len(items[0]) == 2
        with PausedCollection():
            columns, rows, samples = encode_batch(items, plan, names, as_arrays)
            longest = columns["input_ids"].shape[1] if as_arrays else max(map(len, columns["input_ids"]), default=0)
            self._eventual_warn_about_too_long_sequence(range(longest), max_length, verbose)
            if return_length:
                lengths = [*map(len, columns["input_ids"])]
                columns["length"] = np.array(lengths, dtype=np.int64) if as_arrays else lengths
            if return_overflowing_tokens:
                samples = np.array(samples, dtype=np.int64) if as_arrays else [*samples]
                columns["overflow_to_sample_mapping"] = samples

            if tensor_type == TensorType.PYTORCH:
                import torch

                columns = {name: torch.from_numpy(column) for name, column in columns.items()}
            elif tensor_type is None and not batched and not return_overflowing_tokens:
                columns = {name: column if name == "length" else column[0] for name, column in columns.items()}
            return BatchEncoding(columns, rows, None if as_arrays else tensor_type, n_sequences=1 + is_pair)

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
            token_ids = np.atleast_1d(token_ids)
        first = token_ids[0] if len(token_ids) else 0
        if isinstance(first, (list, tuple)) or getattr(first, "ndim", 0):
            rows = (row.detach().cpu().numpy() if hasattr(row, "detach") else row for row in token_ids)
            return [self._join_bytes(row, skip_special_tokens) for row in rows]
        return self._join_bytes(token_ids, skip_special_tokens)

    def _join_bytes(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool) -> bytes:
        added = self._added_tokens()
        if isinstance(ids, (list, tuple)):
            try:  # all below 256, nearly always: several times faster than an array made from a list
                raw = bytes(ids)
            except (ValueError, TypeError):
                pass
            else:
                if skip_special_tokens:
                    raw = raw.translate(None, bytes(index for index in added.special_ids if index < 256))
                if not raw.translate(None, _BYTE_IDS):
                    return raw.translate(_UNSHIFT)
                pieces = _SPECIAL_ID.split(raw)
                pieces[0::2] = [piece.translate(_UNSHIFT) for piece in pieces[0::2]]
                pieces[1::2] = [added.names[piece[0]].encode() for piece in pieces[1::2]]
                return b"".join(pieces)
        ids = np.asarray(ids)
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


__all__ = ["DEFAULT_CHAT_TEMPLATE", "BltTokenizer"]
