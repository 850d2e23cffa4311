"""What a user starts with `accelerate launch`: a BLT, its tokenizer, Trainer. Nothing here knows how it was started.

accelerate launch [--config_file FILE] train_script.py MODEL OUTPUT
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


TEXTS = ["The quick brown fox jumps over 13 lazy dogs.", "Patches are long where the next byte is easy."] * 8
STEPS, ROWS, LENGTH = 3, 4, 40


def main(name: str, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    ids = [tokenizer(text).input_ids[:LENGTH] for text in TEXTS]
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4, "max_steps": STEPS}
    rows = ROWS // int(os.environ.get("WORLD_SIZE", 1))
    trainer = Trainer(
        model,
        TrainingArguments(folder, per_device_train_batch_size=rows, **options),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.train()
    trainer.save_model(f"{folder}/model")
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kind = trainer.accelerator.distributed_type.value
        Path(folder, "result.json").write_text(json.dumps({"losses": losses, "kind": kind}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
