"""A tokenizer of a few words, and texts for tiny token models."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blt_hf.tokenizer.encoding import BYTE_SYMBOLS


WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "hill", "a", "red", "big", "and"]
END, CHAT = "<|end|>", "<|im|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make the words above, with a space before them."""
    vocab = {symbol: index for index, symbol in enumerate(BYTE_SYMBOLS)}
    merges = []
    for word in WORDS:
        piece = "Ġ"
        for letter in word:
            if piece + letter not in vocab:
                merges.append((piece, letter))
                vocab[piece + letter] = len(vocab)
            piece += letter
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, additional_special_tokens=[CHAT])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im|>{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im|>assistant:{% endif %}"
    )
    return tokenizer


def make_texts(count: int, seed: int) -> list[str]:
    """Three words, again and again: who knows the word three back knows the next one."""
    generator = torch.Generator().manual_seed(seed)
    cycles = [torch.randperm(len(WORDS), generator=generator)[:3].tolist() for _ in range(count)]
    return ["".join(" " + WORDS[index] for index in cycle * 8) for cycle in cycles]
