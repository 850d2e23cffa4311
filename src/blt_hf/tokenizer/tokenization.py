"""Tokenizer of the Byte Latent Transformer: id = byte + 4, and four special ids.

`BltTokenizer` is a fast tokenizer of transformers. It keeps a `tokenizers` backend (a byte-level BPE without merges)
and saves it as `tokenizer.json`, so that its files load in a plain transformers with the same ids. The input
of models, `input_ids` and `attention_mask`, does not go through the backend: bytes are ids already, and `encoding` shifts
them a hundred times faster. Everything else (offsets, words, pairs, overflow, ...) the backend answers.
"""

import functools
import inspect
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, TensorType

from ..model.patching_blt import BYTE_OFFSET, VOCAB_SIZE
from .encoding import (
    BYTE_SYMBOLS,
    SPECIAL_NAMES,
    AddedTokens,
    LazyEncodings,
    byte_ids,
    check_one_length,
    encode_rows,
    to_arrays,
    to_bytes,
    to_lists,
)


# A prompt ends with `assistant: ` and an answer with EOS, so no text that waits for an answer ends with EOS. The
# answer and its EOS are in `generation`, which `return_assistant_tokens_mask` marks.
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- 'tools: ' + tools | tojson + '\\n\\n' -}}{%- endif -%}
{%- if documents -%}{{- 'documents: ' + documents | tojson + '\\n\\n' -}}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
    {%- endif -%}
    {%- if message['tool_calls'] -%}
        {%- set content = content + 'tool calls: ' + message['tool_calls'] | tojson -%}
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

# The added tokens of each tokenizer, with the size of its vocabulary. They are derived from the backend, so they are no
# attribute: `datasets` takes its fingerprints from all attributes, and a first call must not change them.
_ADDED_TOKENS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

_BYTES = bytes((index - BYTE_OFFSET) % 256 for index in range(256))  # bytes of ids below 256, for `bytes.translate`
_SYMBOL_BYTES = {symbol: bytes([byte]) for byte, symbol in enumerate(BYTE_SYMBOLS)}

# The arguments of a call, with the defaults; some clients pass the languages to every tokenizer.
_PARAMETERS = inspect.signature(PreTrainedTokenizerFast._encode_plus).parameters
_OPTIONS = {name: parameter.default for name, parameter in [*_PARAMETERS.items()][3:] if name != "kwargs"}
_OPTIONS |= {"split_special_tokens": None, "sanitize_control_tokens": False, "src_lang": None, "tgt_lang": None}
_ONLY_BACKEND = [name for name in _OPTIONS if name.startswith("return_")] + ["is_split_into_words"]
for _name in ("return_attention_mask", "return_length", "return_tensors"):
    _ONLY_BACKEND.remove(_name)


def _build_backend(names: Sequence[str]) -> Tokenizer:
    """Returns the `tokenizers` model that maps text to the same ids; `names` are the tokens with ids 0 to 3."""
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


def _at_least(least: int, name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
    return None if value is None else int(value)  # the backend takes no numpy integers


def _split_rows(text, text_pair, has_words: bool) -> list[tuple]:
    """Returns the one or two texts of each row of a call."""

    def is_batch(entry) -> bool:
        return isinstance(entry, (list, tuple)) and (not has_words or (entry and isinstance(entry[0], (list, tuple))))

    if text_pair is not None:
        return [*zip(text, text_pair)] if is_batch(text) else [(text, text_pair)]
    return [tuple(row) if is_batch(row) else (row,) for row in (text if is_batch(text) else [text])]


class BltTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of the Byte Latent Transformer: each byte of the text is one token, id = byte + 4.

    Takes `str` and `bytes`, single or in lists; every byte string comes back unchanged (`decode_bytes`), and every str
    too (`decode`). Special tokens such as `"</s>"` are found in a str unless `split_special_tokens=True`; in `bytes`,
    which are data, no added token is found unless the call says `split_special_tokens=False`.

    Args:
        errors: treatment of bytes that are no UTF-8 in `decode`, as in `bytes.decode`.
        bos_token, eos_token, boe_token, bpe_token: names of ids 1, 2, 0 and 3.
        pad_token: name of the padding, by default that of id 0. Padding is told by `attention_mask`, never by an id.
        add_bos_token: put `bos_token` before each text.
        add_eos_token: put `eos_token` after each text. For training; a prompt must not end with it.
        padding_side: 'left', so that generated bytes follow the prompt, or 'right'.
        tokenizer_file: a `tokenizer.json` to start from; its names of ids 0 to 3 and its added tokens are taken over.
        kwargs: as in any tokenizer of transformers (`model_max_length`, `truncation_side`, `chat_template`, ...).
    Raises:
        ValueError: the file does not map byte b to id b + 4, or `errors` is not a handler for decoding.

    Example: `BltTokenizer()("hé").input_ids` is `[1, 108, 199, 173]`.

    Files that this class did not write may ask for EOS after every text and name tokens beyond the 260 rows of the
    embedding. There `add_eos_token` counts only if the caller passes it, an `unk_token` beyond the 260 is dropped and a
    `pad_token` beyond them becomes id 0 (`integrations/tokenizer_files.py`).
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
        from ..integrations.tokenizer_files import is_foreign  # `integrations` imports this class

        config = {}
        if (path := resolved_vocab_files.get("tokenizer_config_file")) is not None:
            with open(path, encoding="utf-8") as reader:
                config = json.load(reader)
        droppable = ()
        if is_foreign(config):
            droppable = {"pad_token", "unk_token"} - kwargs.keys()  # names that the caller gives stay
            kwargs.setdefault("add_eos_token", False)
        return super()._from_pretrained(resolved_vocab_files, *args, _droppable=droppable, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, _droppable=(), tokenizer_file=None, **kwargs):
        """Turns a `tokenizer.json` into a backend; `from_pretrained` passes all that is to go to `__init__`."""
        from ..integrations.tokenizer_files import drop_tokens, flags_of_template, name_special_ids

        spec, names = None, dict(enumerate(SPECIAL_NAMES))
        if tokenizer_file is not None:
            with open(tokenizer_file, encoding="utf-8") as reader:
                spec = json.load(reader)
            vocab = spec["model"].get("vocab")
            _check_byte_vocabulary(vocab if isinstance(vocab, dict) else {}, f"`{tokenizer_file}`")
            names = name_special_ids(spec, names)
            kwargs = flags_of_template(spec) | kwargs
        kwargs = drop_tokens(spec, names, _droppable, kwargs)
        if spec is not None:
            kwargs["tokenizer_object"] = Tokenizer.from_str(json.dumps(spec))
        return kwargs

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        self.update_post_processor()  # the names of BOS and EOS may have changed since
        # `tokenizer.json` says it all, so the files name a class that every transformers has.
        path = next(name for name in file_names if name.endswith("tokenizer_config.json"))
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        content.pop("auto_map", None)
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Saves no file: the bytes are the vocabulary."""
        return ()

    def train_new_from_iterator(self, *args, **kwargs):
        raise NotImplementedError("A BLT reads bytes: its vocabulary is fixed and there is nothing to train.")

    @property
    def errors(self) -> str:
        """The treatment of bytes that are no UTF-8 in `decode`."""
        return self._errors

    @errors.setter
    def errors(self, value: str):
        self._errors = _check_errors(value)

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        for token in map(str, new_tokens):
            if token in _SYMBOL_BYTES and not token.isascii():
                byte = _SYMBOL_BYTES[token][0]
                raise ValueError(f"{token!r} cannot be added: it is the name of byte 0x{byte:02X} in the vocabulary.")
        _ADDED_TOKENS.pop(self, None)
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _added_tokens(self) -> AddedTokens:
        size = self._tokenizer.get_vocab_size()  # somebody may add to the backend
        known_size, added = _ADDED_TOKENS.get(self, (None, None))
        if size != known_size:
            names = {index: self._tokenizer.id_to_token(index) for index in range(BYTE_OFFSET)}
            added = AddedTokens(self.added_tokens_decoder, names)
            _ADDED_TOKENS[self] = (size, added)
        return added

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """Returns 1 for each special token and 0 for the others, in the row that these ids make (or made already)."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * bool(self.add_bos_token), [1] * bool(self.add_eos_token)
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [value for ids in texts for value in (*bos, *[0] * len(ids), *eos)]

    @functools.wraps(PreTrainedTokenizerFast.__call__, assigned=())
    def __call__(self, text=None, *args, **kwargs) -> BatchEncoding:
        """Tokenizes as every tokenizer of transformers does; texts may be `bytes`. Unknown arguments are an error."""
        kwargs.setdefault("split_special_tokens", None)  # tells a default from a request
        return super().__call__(text, *args, **kwargs)

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return byte_ids(text)

    def _encode_plus(self, text, text_pair=None, **options) -> BatchEncoding:
        _reject_unknown(options.keys() - _OPTIONS.keys(), "__call__")
        options = _OPTIONS | options
        if options["sanitize_control_tokens"]:
            return self._ask_backend(text, text_pair, options)
        if options["padding_side"] is None:
            options["padding_side"] = self.padding_side
        for name, side in (("padding_side", options["padding_side"]), ("truncation_side", self.truncation_side)):
            if side not in ("left", "right"):
                raise ValueError(f"`{name}` must be 'left' or 'right'; got {side!r}.")
        for name, least in (("max_length", 0), ("stride", 0), ("pad_to_multiple_of", 1)):
            options[name] = _at_least(least, name, options[name])
        if options["max_length"] is None:
            options["truncation_strategy"] = TruncationStrategy.DO_NOT_TRUNCATE
        if options["return_tensors"] is not None:
            options["return_tensors"] = TensorType(options["return_tensors"])
        for name in ("token_type_ids", "attention_mask"):
            if options[f"return_{name}"] is None:
                options[f"return_{name}"] = name in self.model_input_names

        batch = self._encode_plainly(text, text_pair, options)
        return self._encode_by_backend(text, text_pair, options) if batch is None else batch

    def _encode_plainly(self, text, text_pair, options: dict) -> BatchEncoding | None:
        """Returns `input_ids` and `attention_mask` of single texts; None where a call asks for more than that."""
        batched = isinstance(text, (list, tuple))
        texts = [*text] if batched else [text]
        truncates = options["truncation_strategy"] != TruncationStrategy.DO_NOT_TRUNCATE
        needs_backend = (
            text_pair is not None
            or any(options[name] for name in _ONLY_BACKEND)
            or not {*map(type, texts)} <= {str, bytes, bytearray, memoryview}
            or (truncates and (options["stride"] or options["truncation_strategy"] == TruncationStrategy.ONLY_SECOND))
            or self._tokenizer.normalizer is not None
        )
        if needs_backend and (texts or options["is_split_into_words"]):
            return None
        split = options["split_special_tokens"]
        max_length, pads = options["max_length"], options["padding_strategy"] != PaddingStrategy.DO_NOT_PAD
        pad_id = self.pad_token_id if pads else 0
        rows = encode_rows(
            texts,
            self._added_tokens(),
            self._ends(options["add_special_tokens"]),
            pad_id,
            self._room(1, options),
            self.truncation_side,
            split_special=self.split_special_tokens if split is None else split,
            parse_bytes=split is False,
        )
        if rows is None:
            return None

        width, longest = 0, max(rows.lengths, default=0)
        if pads:
            has_length = options["padding_strategy"] == PaddingStrategy.MAX_LENGTH and max_length is not None
            width = max_length if has_length else longest
            width += -width % (options["pad_to_multiple_of"] or 1)
        self._eventual_warn_about_too_long_sequence(range(max(width, longest)), max_length, options["verbose"])
        tensor_type = options["return_tensors"]
        make = to_arrays if tensor_type in (TensorType.PYTORCH, TensorType.NUMPY) else to_lists
        columns = dict(zip(("input_ids", "attention_mask"), make(rows, width, options["padding_side"], pad_id)))
        if not options["return_attention_mask"]:
            del columns["attention_mask"]
        if tensor_type == TensorType.PYTORCH:
            columns = {name: torch.from_numpy(column) for name, column in columns.items()}
        if tensor_type is None and not batched:
            columns = {name: column[0] for name, column in columns.items()}
        if options["return_length"]:
            columns["length"] = [max(width, length) for length in rows.lengths]
        ask = functools.partial(self._ask_later, self._settings(), texts, options | {"return_tensors": None})
        return BatchEncoding(columns, LazyEncodings(len(texts), ask), tensor_type, n_sequences=1)

    def _room(self, num_texts: int, options: dict) -> int | None:
        """Returns how many ids truncation leaves for the texts of a row; None without truncation."""
        if options["truncation_strategy"] == TruncationStrategy.DO_NOT_TRUNCATE:
            return None
        num_special = sum(map(len, self._ends(options["add_special_tokens"]))) * num_texts
        if options["max_length"] < num_special:
            raise ValueError(f"`max_length` must hold the {num_special} special tokens; got {options['max_length']}.")
        return options["max_length"] - num_special

    def _ends(self, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Returns the ids before and after each text."""
        bos = self.bos_token_id if add_special_tokens and self.add_bos_token else None
        eos = self.eos_token_id if add_special_tokens and self.add_eos_token else None
        return [] if bos is None else [bos], [] if eos is None else [eos]

    def _settings(self) -> tuple:
        """Returns the settings that the rows of a call depend on."""
        added = self.pad_token_id, self._tokenizer.get_vocab_size(), self.split_special_tokens
        return self._ends(), self.truncation_side, added

    def _ask_later(self, settings: tuple, texts: list, options: dict) -> list[Encoding]:
        """Asks the backend about rows that were made without it."""
        if settings != self._settings():
            raise RuntimeError("the tokenizer was changed after this call; call it again to ask about its rows.")
        return self._encode_by_backend(texts, None, options).encodings

    def _encode_by_backend(self, text, text_pair, options: dict) -> BatchEncoding:
        """Returns everything that a call can ask for, of texts that are UTF-8."""
        text, text_pair = self._to_str(text, options), text_pair and self._to_str(text_pair, options)
        if options["truncation_strategy"] != TruncationStrategy.DO_NOT_TRUNCATE:
            for texts in _split_rows(text, text_pair, options["is_split_into_words"]):
                self._check_stride(texts, options)
        result = self._ask_backend(text, text_pair, options)
        if options["return_tensors"] is not None:
            check_one_length([*map(len, result["input_ids"])])
        return result

    def _to_str(self, text, options: dict):
        """Turns a text, or lists of texts, into the input of the backend."""
        if isinstance(text, (list, tuple)):
            return type(text)([self._to_str(entry, options) for entry in text])
        data = to_bytes(text)
        try:
            if isinstance(text, str):
                return text.encode().decode()
            if options["split_special_tokens"] is not False and data in self._added_tokens():
                raise ValueError("it holds the name of an added token; pass str, or `split_special_tokens=False`")
            return data.decode()
        except ValueError as error:
            raise ValueError(
                "`text` must be UTF-8 for pairs, words, offsets and all else but `input_ids` and `attention_mask`; got "
                f"{text!r:.80}: {error}."
            ) from error

    def _check_stride(self, texts: tuple, options: dict) -> None:
        """Refuses a stride as large as the room for a text: the backend panics there."""
        strategy, stride, room = options["truncation_strategy"], options["stride"], self._room(len(texts), options)
        if len(texts) > 1 and strategy == TruncationStrategy.LONGEST_FIRST:
            room //= 2
        elif len(texts) > 1:
            other, words = texts[strategy == TruncationStrategy.ONLY_FIRST], options["is_split_into_words"]
            room -= len(self._tokenizer.encode(other, is_pretokenized=words, add_special_tokens=False))
        if 0 < stride >= room:
            raise ValueError(f"`stride` must be less than what `max_length` leaves for a text, {room}; got {stride}.")

    def _ask_backend(self, text, text_pair, options: dict) -> BatchEncoding:
        """Calls the method of transformers; the backend forgets truncation and padding of the call afterwards."""
        split = self._tokenizer.encode_special_tokens
        self.update_post_processor()  # the names of BOS and EOS may have changed since
        try:
            return super()._encode_plus(text, text_pair, **options)
        except TypeError as error:
            raise TypeError(
                "`text` must be a text, a pair of texts, or with `is_split_into_words=True` a list of words, or a list of "
                f"these, and `text_pair` be as `text` is; got {text!r:.80} and {text_pair!r:.80}: {error}"
            ) from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            strategy = options["truncation_strategy"].value
            raise ValueError(f"`truncation={strategy!r}` cannot be done: {error}") from error
        finally:
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = split

    def decode_bytes(self, token_ids, skip_special_tokens: bool = True) -> bytes | list[bytes]:
        """Returns the raw bytes of one sequence of ids, or a list of them for a batch.

        Ids from `len(tokenizer)` on are skipped, as fast tokenizers do: a model with padded embeddings can write them.

        Args:
            token_ids: an int, a list, array or tensor of ids, one- or two-dimensional, or a mapping with `input_ids`.
            skip_special_tokens: leave special tokens out; else they appear as the UTF-8 of their names.
        Raises:
            ValueError: an id is negative. TypeError: ids are not integers.
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
        skipped = added.special_ids if skip_special_tokens else ()
        try:  # a list of ids below 256 is several times faster this way than as an array
            raw = bytes(ids) if isinstance(ids, (list, tuple)) else None
        except (TypeError, ValueError):
            raw = None
        if raw is None:
            ids = np.asarray(ids)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError(f"`token_ids` must be integers in one or two dimensions; got {ids!r:.80}")
            if ids.min(initial=0) < 0:
                raise ValueError(f"`token_ids` must be at least 0; got {ids.min()}.")
            ids = ids[ids < len(self)]  # a model may have more rows than there are tokens
            if ids.max(initial=0) > 255:
                names = added.names | {byte + BYTE_OFFSET: bytes([byte]) for byte in range(256)}
                return b"".join([names[index] for index in ids.tolist() if index not in skipped])
            raw = ids.astype(np.uint8).tobytes()
        # Ids 0 to 3 become the bytes 0xFC to 0xFF, which no other id below 256 becomes
        data = raw.translate(_BYTES, bytes(index for index in skipped if index < 256))
        for index in range(BYTE_OFFSET):
            data = data.replace(_BYTES[index : index + 1], added.names[index])
        return data

    def decode(
        self,
        token_ids,
        skip_special_tokens: bool = False,
        errors: str | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
        use_source_tokenizer: bool | None = None,
        **kwargs,
    ) -> str | list[str]:
        """Returns the text of one sequence of ids, or a list of texts for a batch.

        `decode_bytes` lists the accepted forms of ids, and the treatment of ids that are no token.

        Args:
            skip_special_tokens: leave special tokens out.
            errors: for this call, in place of `self.errors`.
            clean_up_tokenization_spaces, spaces_between_special_tokens: taken and not used; text stays as it is.
            use_source_tokenizer: taken and not used; there is one tokenizer.
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
        """Returns the text of tokens as `tokenize` returns them."""
        data = b"".join(_SYMBOL_BYTES[token] if token in _SYMBOL_BYTES else to_bytes(token) for token in tokens)
        return data.decode("utf-8", self._errors)


__all__ = ["DEFAULT_CHAT_TEMPLATE", "BltTokenizer"]
