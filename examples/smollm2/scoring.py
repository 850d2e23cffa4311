"""Bits that a model needs for a text, the same for a BLT and for the token model that it was made from."""

import math

import torch


# SmolLM2's texts begin after the token that ends the text before; its `bos_token` begins turns of a chat.
START_OF_TEXT = {"blt": "<s>", "llama": "<|endoftext|>"}


def start_ids(model, tokenizer) -> list[int]:
    """Returns the ids before a text."""
    return [tokenizer.convert_tokens_to_ids(START_OF_TEXT[model.config.model_type])]


def text_ids(tokenizer, text: str) -> list[int]:
    """Returns the ids of a text, nothing before or after it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def bits(model, context: list[int], target: list[int]) -> float:
    """Returns the bits of the ids `target` after the ids `context`, of which there must be one."""
    ids = torch.tensor([context + target], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, len(context) :], reduction="sum").item() / math.log(2)


def text_bits_per_byte(model, tokenizer, texts: list[str]) -> float:
    """Returns bits per byte of texts; each is read from its start, whole."""
    total = sum(bits(model, start_ids(model, tokenizer), text_ids(tokenizer, text)) for text in texts)
    return total / sum(len(text.encode()) for text in texts)


def prompt_ids(tokenizer, question: str) -> list[int]:
    """Returns the ids of a chat up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def answer_bits(model, tokenizer, question: str, answer: str, ended: bool) -> float:
    """Returns the bits of an answer, and of the end of the turn if it `ended`."""
    target = text_ids(tokenizer, answer)
    if ended:
        target = [*target, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return bits(model, prompt_ids(tokenizer, question), target)
