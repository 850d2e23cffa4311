"""Turn a Llama into a Byte Latent Transformer: its layers become the global transformer, and learn a tenth as fast.

Takes about 10 minutes on two cores with the random Llama.

    python examples/byteify_llama.py [LLAMA] [--entropy-model DIR] [--steps N] [--output-dir DIR] [--small]

LLAMA is a folder or Hub id; without one, a small random Llama stands in, which shows how it goes and is of no use.
Without an entropy model patches are words (`patching_mode="space"`).
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from blt_hf import BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.byteify import byteify, byteify_optimizer
from blt_hf.training.data import BltDataCollator, byte_ids


def random_llama(small: bool) -> LlamaForCausalLM:
    width = 64 if small else 256
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=2 if small else 4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * width,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", nargs="?", help="folder or Hub id of a model of type llama or mistral")
    parser.add_argument("--entropy-model", help="folder or Hub id of a BltPatcher")
    parser.add_argument("--threshold", type=float, default=1.335442066192627, help="nats, with --entropy-model")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the new, local models")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--output-dir", type=Path, default=Path("byteified"))
    parser.add_argument("--small", action="store_true", help="a tiny model and a few steps: seconds, and no sense")
    args = parser.parse_args()
    set_seed(0)

    llama = random_llama(args.small)
    if args.llama is not None:
        llama = AutoModelForCausalLM.from_pretrained(args.llama, dtype=torch.float32)
    patching = {"patching_mode": "space"}
    if args.entropy_model is not None:
        patcher = AutoModelForCausalLM.from_pretrained(args.entropy_model)
        patching = {"patcher": patcher, "patching_threshold": args.threshold}
    model = byteify(llama, encoder_hash_byte_group_vocab=500 if args.small else 20_000, **patching)
    layers = model.model.global_transformer.layers
    taken_over = sum(parameter.numel() for parameter in layers.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{taken_over / 1e6:.2f} of {trained / 1e6:.2f} million weights come from the Llama")

    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = texts[5::10][: 2 if args.small else None]
    length = 128 if args.small else 512
    blocks = [
        {"input_ids": [1, *byte_ids(text[first : first + length])]}
        for text in (text for index, text in enumerate(texts) if index % 10 != 5)
        for first in range(0, len(text), length)
    ]
    arguments = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.steps or (5 if args.small else 300),
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    before = measure_bits_per_byte(model, held_out)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=blocks,
        data_collator=BltDataCollator(),
        optimizer_cls_and_kwargs=byteify_optimizer(model, args.learning_rate),
    )
    for group in trainer.create_optimizer().param_groups:
        print(f"{group['name']}: learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}")
    trainer.train()
    after = measure_bits_per_byte(model.eval(), held_out)
    print(f"bits per byte on held-out text: {before.bits_per_byte:.3f}, then {after.bits_per_byte:.3f}")
    model.save_pretrained(args.output_dir)
    BltTokenizer().save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
