"""Fine-tunes a BLT into one that also fills in blocks of bytes (Fast BLT), and says what that cost in bits per byte.

    python examples/pretrain_small/corpus.py corpus
    python examples/fast_blt.py --corpus corpus --output runs/fast

Takes about 30 minutes on two cores. Starts from `pretrained/blt-5m`. The block size is drawn anew for each step, so that
one model decodes with all of them. Only decoder, head and mask embedding are trained (`--train all`: everything but the
entropy model), and the next byte is learned along; `--mask-weight` balances the two. `--blend` keeps a share of what
training changed: weights between those before and after know most of the blocks, at less than the share of the cost in
bits per byte.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from blt_hf import BltForCausalLM, BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "pretrain_small"))

from train import byte_blocks, read  # noqa: E402


class BlockSizes(TrainerCallback):
    """Draws a block size for each step; all of them weigh the same, though larger blocks cover a byte more often."""

    def __init__(self, sizes: list[int], weight: float, patch_bytes: float):
        self.sizes, self.weight, self.patch_bytes = sizes, weight, patch_bytes
        self.chance = random.Random(0)

    def on_step_begin(self, arguments, state, control, model=None, **kwargs):
        size = self.chance.choice(self.sizes)
        model.config.diffusion_block_size = size
        model.config.diffusion_loss_weight = self.weight * self.patch_bytes / size

    def on_train_end(self, arguments, state, control, model=None, **kwargs):
        model.config.diffusion_block_size, model.config.diffusion_loss_weight = max(self.sizes), 1.0


@torch.no_grad()
def masked_bits(model: BltForCausalLM, rows, block_size: int) -> float:
    """The masked loss in bits for each byte of a block, on the same noise at every call."""
    model.config.diffusion_block_size, largest = block_size, model.config.diffusion_block_size
    generator, nats, count = torch.Generator().manual_seed(0), 0.0, 0
    for row in rows:
        ids = row["input_ids"][None]
        out = model(ids, labels=ids, noise_generator=generator, num_items_in_batch=1, output_patches=True)
        nats += float(out.masked_loss)
        starts = out.patch_lengths[0].cumsum(0)[:-1]
        count += int((ids.shape[1] - starts).clamp(max=block_size).sum())
    model.config.diffusion_block_size = largest
    return nats / count / math.log(2)


@torch.no_grad()
def blend(model: BltForCausalLM, before: dict[str, torch.Tensor], share: float) -> None:
    """Sets the weights to `share` of the way from those `before` training; the mask embedding is new, and stays."""
    for name, parameter in model.named_parameters():
        if name in before and not name.startswith("mask_embedding."):
            parameter.copy_(torch.lerp(before[name], parameter, share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "pretrained" / "blt-5m"))
    parser.add_argument("--corpus", type=Path, required=True, help="what pretrain_small/corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 8, 8, 16])
    parser.add_argument("--train", choices=["decoder", "all"], default="decoder")
    parser.add_argument("--mask-weight", type=float, default=1.0, help="of the masked loss, against the next byte's")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--rows", type=int, default=2, help="a step")
    parser.add_argument("--context", type=int, default=512, help="bytes of a row")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--blend", type=float, default=1.0, help="share of what training changed that is kept")
    parser.add_argument("--held-out", type=int, default=40, help="documents to measure")
    arguments = parser.parse_args()
    set_seed(1)

    model = BltForCausalLM.from_pretrained(arguments.model, diffusion_block_size=max(arguments.block_sizes)).eval()
    if arguments.train == "decoder":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("model.local_decoder.", "lm_head.", "mask_embedding.")))
    held_out = read(arguments.corpus, "heldout")[: arguments.held_out]
    before = measure_bits_per_byte(model, held_out, max_length=1024).bits_per_byte
    settings = TrainingArguments(
        str(arguments.output / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 12,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=False,
    )
    blocks = byte_blocks(read(arguments.corpus, "train"), arguments.context)
    plain = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    sizes = BlockSizes(arguments.block_sizes, arguments.mask_weight, 4.5)
    Trainer(model, settings, train_dataset=blocks, callbacks=[sizes]).train()
    model.float().eval()
    blend(model, plain, arguments.blend)
    model.config.use_cache = True  # which Trainer switches off
    model.save_pretrained(arguments.output)
    BltTokenizer().save_pretrained(arguments.output)
    after = measure_bits_per_byte(model, held_out, max_length=1024).bits_per_byte
    rows = torch.utils.data.Subset(byte_blocks(held_out, arguments.context), range(4))
    bits = {size: masked_bits(model, rows, size) for size in sorted(set(arguments.block_sizes))}
    facts = {"bits per byte before": before, "after": after, "bits of a block's byte": bits}
    (arguments.output / "fast_blt.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
