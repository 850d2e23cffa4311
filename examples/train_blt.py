"""Train a BLT from scratch on text files with `Trainer`; texts of a batch are packed into one row, without padding.

Takes about 20 minutes on two cores, or one with `--size tiny`.

    python examples/train_blt.py  # the prose that comes with Python, small model
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_blt.py --files data/*.txt --size 1b

The entropy model that cuts the patches is taken from `--patcher` (see examples/train_entropy_model.py),
with the threshold of its `calibration.json`; without one, patches follow the spaces between words.
"""

import argparse
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from blt_hf import BltConfig, BltForCausalLM, BltPatcher, BltTokenizer
from blt_hf.tokenizer.encoding import byte_ids


SIZES = {  # encoder and decoder width, decoder layers, global width, global layers, rows of a hash table
    "tiny": (32, 1, 64, 1, 500),
    "small": (128, 2, 256, 4, 5_000),
    "1b": (1024, 9, 2048, 25, 500_002),
}


def make_model(size: str, patcher: str | None) -> BltForCausalLM:
    width, decoder_layers, global_width, global_layers, hash_rows = SIZES[size]
    heads = max(width // 64, 2)
    calibration = Path(patcher or "", "calibration.json")
    rule = json.loads(calibration.read_text()) if patcher and calibration.exists() else {}
    local = {"hidden_size": width, "num_attention_heads": heads, "hidden_size_global": global_width}
    config = BltConfig(
        **{"patching_mode": "space" if patcher is None else "entropy", **rule},
        patch_in_forward=patcher is not None,
        encoder_hash_byte_group_vocab=hash_rows,
        patcher_config=None if patcher is None else BltPatcher.from_pretrained(patcher).config.to_dict(),
        encoder_config=local,
        decoder_config={**local, "num_hidden_layers": decoder_layers, "intermediate_size": 11 * width // 4},
        global_config={
            "hidden_size": global_width,
            "num_attention_heads": max(global_width // 128, 2),
            "num_hidden_layers": global_layers,
            "intermediate_size": 11 * global_width // 4,
        },
    )
    model = BltForCausalLM(config)
    if patcher is not None:
        model.set_patcher(BltPatcher.from_pretrained(patcher))
    return model


def pieces(texts: list[str], num_bytes: int) -> Dataset:
    """Texts as ids, each between a BOS (1) and an EOS (2); long ones are cut."""
    rows = []
    for ids in map(byte_ids, texts):
        rows += [[1, *ids[start : start + num_bytes - 2], 2] for start in range(0, len(ids), num_bytes - 2)]
    return Dataset.from_dict({"input_ids": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", type=Path, help="UTF-8 text files; default: Python's own help texts")
    parser.add_argument("--patcher", help="folder or hub id of an entropy model")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--context", type=int, default=1024, help="longest piece of text, in bytes")
    parser.add_argument("--batch", type=int, default=8, help="pieces a step and process")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="blt-from-scratch")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    texts = [path.read_text() for path in arguments.files] if arguments.files else list(topics.values())
    data = pieces(texts, arguments.context).train_test_split(test_size=0.02, seed=0)
    trainer = Trainer(
        model=make_model(arguments.size, arguments.patcher),
        args=TrainingArguments(
            arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=4e-4 if arguments.size == "1b" else 2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=min(2000, arguments.steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=max(arguments.steps // 20, 1),
            save_steps=max(arguments.steps // 4, 1),
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=max(arguments.steps // 4, 1),
            prediction_loss_only=True,
            report_to=[],
            use_cpu=arguments.cpu,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithFlattening(),
        processing_class=BltTokenizer(),
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model(f"{arguments.output}/model")
    print(f"bits per byte on held-out text: {trainer.evaluate()['eval_loss'] / math.log(2):.2f}")


if __name__ == "__main__":
    try:
        main()
    finally:  # with several processes: their connections end before Python does, which could abort otherwise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
