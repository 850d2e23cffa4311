"""Fine-tune a BLT with LoRA: nothing here is written for a BLT but the import that makes the Auto classes know it.

Takes a minute on two cores.

    python examples/finetune_lora.py                                                       # the bundled model
    python examples/finetune_lora.py --model blt-from-scratch/model --output my-adapter

The task: answer a word with the same word in capital letters.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import blt_hf  # noqa: F401 (registers the classes)


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"
WORDS = ["apple", "bread", "cloud", "dream", "earth", "flame", "grape", "house", "knife", "lemon", "mango", "night"]


def example(tokenizer, word: str) -> dict[str, list[int]]:
    """The answer alone is learned: the question's labels are -100."""
    question = tokenizer(f"{word} -> ")["input_ids"]
    answer = tokenizer(word.upper(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED), help="folder or hub id of a BLT")
    parser.add_argument("--output", default="blt-lora")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    model.print_trainable_parameters()
    data = Dataset.from_list([example(tokenizer, word) for word in WORDS])
    training = TrainingArguments(
        arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=max(arguments.steps // 6, 1),
        save_strategy="no",
        report_to=[],
        use_cpu=arguments.cpu,
    )
    Trainer(model, training, train_dataset=data, data_collator=DataCollatorWithFlattening()).train()
    model.save_pretrained(arguments.output)

    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    tuned = PeftModel.from_pretrained(base, arguments.output).merge_and_unload().eval()
    question = tokenizer("lemon -> ", return_tensors="pt")
    answer = tuned.generate(**question, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
