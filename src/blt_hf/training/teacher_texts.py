"""Texts that a token model writes itself, to be learned from where no others are at hand."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from .data import check_texts


def write_texts(
    token_model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    path: str | os.PathLike,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    chat: bool = False,
    system: str | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, int]]:
    """Lets a token model continue prompts, and appends each text, prompt included, to a `.jsonl` file.

    Prompts whose texts are in the file already are left out, so that the work can be interrupted and taken up again.

    Args:
        prompts: beginnings of texts; with `chat`, what a user asks.
        path: of the file; a line holds `text`, and `prompt`, its number among the prompts.
        batch_size: prompts that are continued at once.
        temperature: of sampling; 0: the most probable token.
        chat: put each prompt into the tokenizer's chat template. Texts hold its special tokens by name.
        system: what the system message says; None: what the template says.
        seed: of sampling; each batch has its own.
    Yields:
        number of prompts that are done, and of bytes that were written, after each batch.
    Raises:
        ValueError: `prompts` is one text, or the tokenizer has no chat template and `chat` asks for one.
    """
    check_texts(prompts)
    if chat and tokenizer.chat_template is None:
        raise ValueError("`chat=True` needs a tokenizer with a chat template; this one has none.")
    path = Path(path)
    done = _numbers_in(path)
    left = [number for number in range(len(prompts)) if number not in done]
    texts = [prompts[number] for number in left]
    if chat:
        texts = [_as_chat(tokenizer, text, system) for text in texts]
    # Prompts of a like length make batches with little padding.
    order = sorted(range(len(left)), key=lambda index: len(texts[index]))
    written = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        set_seed(seed + left[chosen[0]])
        made = _continue(
            token_model, tokenizer, [texts[index] for index in chosen], max_new_tokens, temperature, top_p
        )
        with open(path, "a", encoding="utf-8") as file:
            for index, text in zip(chosen, made):
                file.write(json.dumps({"prompt": left[index], "text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
        yield len(done) + min(start + batch_size, len(order)), written


def _numbers_in(path: Path) -> set[int]:
    if not path.exists():
        return set()
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["prompt"] for line in file if line.strip()}


def _as_chat(tokenizer, text: str, system: str | None) -> str:
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def _continue(token_model, tokenizer, texts: list[str], max_new_tokens: int, temperature: float, top_p: float):
    """Returns texts with their continuations, each up to the token that ended it, that token left out."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=token_model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=token_model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    made = token_model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
        **(sampling if temperature else {"do_sample": False}),
    )  # fmt: skip
    ends = token_model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    results = []
    for text, row in zip(texts, made[:, width:].tolist()):
        stop = next((index for index, token in enumerate(row) if token in ends), None)
        # An answer that ended keeps the name of the token that ended it, if that token belongs to the template.
        kept = row if stop is None else row[: stop + 1]
        results.append(text + tokenizer.decode(kept, skip_special_tokens=False))
    return results


def strip_end(texts: Iterable[str], end: str) -> Iterator[str]:
    """Takes the name of the end token off the ends of texts, where training puts it anyway."""
    for text in texts:
        yield text.removesuffix(end)


__all__ = ["strip_end", "write_texts"]
