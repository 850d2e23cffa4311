"""Token models as teachers: loading them, and what their tokens are in the ids of a BLT."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..model.patching_blt import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID
from ..tokenizer.encoding import BYTE_SYMBOLS, byte_ids, to_bytes


_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def load_token_model(name: str | os.PathLike, gguf_file: str | None = None):
    """Loads a token model and its tokenizer; what comes from a GGUF file becomes an ordinary model that can be saved.

    Args:
        name: folder or name on the Hub.
        gguf_file: name of a GGUF file in it (needs the package `gguf`).
    Returns:
        the model in float32, in evaluation mode, and the tokenizer.
    """
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if gguf_file is not None:  # classes that hold quantized weights refuse `save_pretrained`
        config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.generation_config = model.generation_config
        model = plain
    return model.eval(), tokenizer


@dataclass
class TokenAlphabet:
    """The ids of a BLT that each token of a token model stands for.

    Attributes:
        ids: of each token; most are bytes.
        end_token: token that ends a text for the token model; it stands before each text, too, in the place of `<s>`.
    """

    ids: list[tuple[int, ...]]
    end_token: int

    @classmethod
    def of(
        cls, tokenizer, special_ids: Mapping[str, int] | None = None, end_token: str | None = None
    ) -> "TokenAlphabet":
        """Reads the vocabulary of a tokenizer of transformers.

        Args:
            tokenizer: byte-level BPE (Llama 3, SmolLM2), or SentencePiece with bytes (Llama 2, Mistral).
            special_ids: id of the BLT for special tokens by their names; the names of others are read as bytes.
            end_token: name of the token that ends a text; None: the tokenizer's `eos_token`.
        Raises:
            ValueError: tokens are not pieces of bytes, or there is no token that ends a text.
        """
        special_ids = dict(special_ids or {})
        vocabulary = tokenizer.get_vocab()
        if unknown := [name for name in special_ids if name not in vocabulary]:
            raise ValueError(f"`special_ids` names tokens that the tokenizer does not have: {', '.join(unknown)}.")
        end_token = tokenizer.eos_token if end_token is None else end_token
        if end_token not in vocabulary:
            raise ValueError(f"`end_token` must be a token of the tokenizer; got {end_token!r}.")
        ids: list[tuple[int, ...]] = [()] * (max(vocabulary.values()) + 1)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        has_byte_tokens = "<0x00>" in vocabulary
        for name, index in vocabulary.items():
            if name in special_ids:
                ids[index] = (special_ids[name],)
            elif name in added:
                ids[index] = tuple(byte_ids(name))
            else:
                ids[index] = _piece_ids(name, has_byte_tokens)
        ids[vocabulary[end_token]] = (EOS_TOKEN_ID,)
        return cls(ids, vocabulary[end_token])

    def text_ids(self, tokens: Iterable[int]) -> list[int]:
        """Joins the ids of tokens."""
        return [index for token in tokens for index in self.ids[token]]

    def table(self, longest: int) -> Tensor:
        """Lists the first ids of each token, int16 `(V, longest)`, padded with -1."""
        table = torch.full((len(self.ids), longest), -1, dtype=torch.int16)
        for token, ids in enumerate(self.ids):
            table[token, : len(ids)] = torch.tensor(ids[:longest], dtype=torch.int16)
        return table


def _piece_ids(name: str, has_byte_tokens: bool) -> tuple[int, ...]:
    if has_byte_tokens:
        if len(name) == 6 and name.startswith("<0x"):
            return (int(name[3:5], 16) + BYTE_OFFSET,)
        return tuple(byte_ids(name.replace("▁", " ")))
    try:
        return tuple(_BYTE_OF_SYMBOL[symbol] + BYTE_OFFSET for symbol in name)
    except KeyError as error:
        raise ValueError(
            f"`tokenizer` has a token {name!r} that is not made of bytes; accepted are byte-level BPE and SentencePiece "
            "with byte tokens."
        ) from error


@dataclass
class AlignedRow:
    """A piece of text as tokens and as ids of a BLT.

    Attributes:
        tokens: the first is the end token.
        input_ids: the first is `<s>`.
        ends: position in `input_ids` at which each token ends.
    """

    tokens: list[int]
    input_ids: list[int]
    ends: list[int]


def align(alphabet: TokenAlphabet, tokenizer, text: str, is_whole: bool = True) -> AlignedRow:
    """Tokenizes a text; `is_whole` puts the end token behind it.

    Raises:
        ValueError: the tokens do not spell the text.
    """
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    row = AlignedRow([alphabet.end_token], [BOS_TOKEN_ID], [0])
    for token in [*tokens, alphabet.end_token] if is_whole else tokens:
        row.input_ids += alphabet.ids[token]
        row.tokens.append(token)
        row.ends.append(len(row.input_ids) - 1)
    return row


def cut_texts(texts: Iterable[str | bytes], max_bytes: int) -> Iterable[tuple[str, bool]]:
    """Cuts texts after whitespace into pieces of at most `max_bytes` bytes, and says which pieces end a text."""
    for text in texts:
        data = to_bytes(text)
        while len(data) > max_bytes:
            cut = max(data.rfind(b" ", 0, max_bytes), data.rfind(b"\n", 0, max_bytes)) + 1
            if cut <= 0:
                cut = max_bytes
                while cut > 1 and data[cut] & 0xC0 == 0x80:  # not inside a character
                    cut -= 1
            yield data[:cut].decode(errors="replace"), False
            data = data[cut:]
        if data:
            yield data.decode(errors="replace"), True


def base_of(token_model: nn.Module) -> nn.Module:
    """Returns the layers of a token model without its head."""
    return getattr(token_model, "base_model", token_model)


class TokenHead(nn.Module):
    """Reads states `(..., W)` behind the last layer as a token model does: its norm, its head; fp32 logits `(..., V)`.

    Args:
        token_model: with its head.
        dtype: of the head's weights; None: as they are.
    """

    def __init__(self, token_model: nn.Module, dtype: torch.dtype | None = None):
        super().__init__()
        self.norm = copy.deepcopy(base_of(token_model).norm).requires_grad_(False)
        weight = token_model.get_output_embeddings().weight.detach()
        self.register_buffer("weight", weight if dtype is None else weight.to(dtype), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        return (self.norm(states.float()).to(self.weight.dtype) @ self.weight.T).float()


__all__ = ["AlignedRow", "TokenAlphabet", "TokenHead", "align", "base_of", "cut_texts", "load_token_model"]
