"""Train an entropy model, the small byte LM that says where patches start, and calibrate its threshold.

Takes about 15 minutes on two cores.

    python examples/train_entropy_model.py [TEXTS ...] [--steps N] [--output-dir DIR] [--small]

TEXTS are files and folders (`.jsonl`: a text in each line); without any, the language reference that every Python
carries. The model and a `calibration.json` land in DIR; a BLT takes both over with

    patcher = AutoModelForCausalLM.from_pretrained(DIR)
    model.set_patcher(patcher)
    model.config.update(json.load(open(f"{DIR}/calibration.json")))
"""

import argparse
import json
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

import blt_hf.training.data
from blt_hf import BltPatcher, BltPatcherConfig, BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.calibration import calibrate_threshold
from blt_hf.training.data import BltDataCollator, byte_ids


def read_texts(paths: list[str]) -> list[bytes]:
    if paths:
        return blt_hf.training.data.read_texts(paths)
    from pydoc_data.topics import topics

    return [topics[name].encode() for name in sorted(topics)]


def make_blocks(texts: list[bytes], length: int) -> list[dict]:
    """Rows of `length` ids of the texts, one after the other with an EOS between them; each row begins with a BOS."""
    ids = [i for text in texts for i in (*byte_ids(text), 2)]
    return [{"input_ids": [1, *ids[first : first + length - 1]]} for first in range(0, len(ids), length - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files and folders")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--patch-size", type=float, default=4.5, help="bytes a patch to calibrate for")
    parser.add_argument("--output-dir", type=Path, default=Path("entropy-model"))
    parser.add_argument("--small", action="store_true", help="a tiny model and a few steps: seconds, and no sense")
    args = parser.parse_args()
    set_seed(0)

    texts = read_texts(args.texts)
    held_out = texts[5::10] or texts[-1:]  # whole texts, so that nothing of them was seen
    train = [text for text in texts if text not in held_out] or texts
    if len(texts) == 1:
        print("One text only: it is trained on and measured on. Give more files, or a .jsonl, for honest numbers.")
    if args.small:
        train, held_out = train[:8], held_out[:2]

    width = 32 if args.small else 128
    patcher = BltPatcher(
        BltPatcherConfig(
            hidden_size=width,
            num_hidden_layers=1 if args.small else 4,
            num_attention_heads=4,
            intermediate_size=3 * width,
            sliding_window=64 if args.small else 256,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.steps or (5 if args.small else 500),
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    blocks = make_blocks(train, 128 if args.small else 512)
    Trainer(patcher, arguments, train_dataset=blocks, data_collator=BltDataCollator()).train()

    measured = measure_bits_per_byte(patcher.eval(), held_out)
    print(f"{measured.bits_per_byte:.3f} bits per byte on {measured.num_bytes:,} bytes of held-out text")
    found = calibrate_threshold(patcher, held_out, args.patch_size)
    print(f"{found.threshold:.3f} nats make patches of {found.mean_patch_size:.2f} bytes")
    patcher.save_pretrained(args.output_dir)
    BltTokenizer().save_pretrained(args.output_dir)
    (args.output_dir / "calibration.json").write_text(json.dumps(found.settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
