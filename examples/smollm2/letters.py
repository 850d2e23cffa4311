"""Spelling and reversal of words: how often a model is right, as it is and after a little fine-tuning with LoRA."""

import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from scoring import start_ids, text_ids
from transformers import DataCollatorForSeq2Seq, StoppingCriteria, Trainer, TrainingArguments, set_seed


sys.path.append(str(Path(__file__).parents[1]))
from spelling import find_words, stdlib_texts


TASKS = {
    "spelling": lambda word: (f"Spell the word: {word} ->", " " + " ".join(word)),
    "reversal": lambda word: (f"Reverse the word: {word} ->", " " + word[::-1]),
}
BATCH = 4  # rows of a step of fine-tuning
NUM_SHOTS = 4  # solved examples before the question, for a model that was not fine-tuned
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def choose_words(num_tested: int, num_trained: int) -> tuple[list[str], list[str]]:
    """Returns words to test and words to train on, always the same ones, from the language reference of Python."""
    words = find_words(list(stdlib_texts(docstrings=False)))
    words = random.Random(0).sample(words, len(words))
    return words[:num_tested], words[num_tested : num_tested + num_trained]


class _EndOfLine(StoppingCriteria):
    """Stops when the new text has a line break."""

    def __init__(self, tokenizer, prompt_length: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


@torch.no_grad()
def write_line(model, tokenizer, prompt: str, longest: int) -> str:
    """Returns what the model writes after `prompt`, greedily, up to the end of the line; at most `longest` tokens."""
    ids = torch.tensor([start_ids(model, tokenizer) + text_ids(tokenizer, prompt)], device=model.device)
    stop = [_EndOfLine(tokenizer, ids.shape[1])]
    new = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        stopping_criteria=stop,
    )
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def count_right(model, tokenizer, tested: list[str], shots: list[str]) -> dict[str, dict]:
    """Returns for each task the share of exact answers, and every answer."""
    results = {}
    for task, make in TASKS.items():
        before = "".join(f"{prompt}{answer}\n" for prompt, answer in map(make, shots))
        answers = {}
        for word in tested:
            prompt, expected = make(word)
            answers[word] = write_line(model, tokenizer, before + prompt, len(expected) + 2).strip()
        right = [answers[word] == make(word)[1].strip() for word in tested]
        results[task] = {"right": sum(right) / len(right), "answers": answers}
    return results


def fine_tune(model, tokenizer, words: list[str], epochs: float, batch: int = BATCH, learning_rate: float = 1e-3):
    """Returns the model with LoRA on all linear layers, trained on both tasks for each word; the answer alone counts."""
    end = text_ids(tokenizer, "\n")

    def encode(prompt: str, answer: str) -> dict:
        before = start_ids(model, tokenizer) + text_ids(tokenizer, prompt)
        after = text_ids(tokenizer, answer) + end
        return {"input_ids": before + after, "labels": [-100] * len(before) + after}

    set_seed(0)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    data = [encode(*make(word)) for word in words for make in TASKS.values()]
    steps = math.ceil(len(data) / batch * epochs)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            use_cpu=model.device.type == "cpu",
            bf16=True,
        )
        tokenizer.padding_side = "right"
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(adapted, arguments, train_dataset=data, data_collator=collator).train()
    return adapted.eval()
