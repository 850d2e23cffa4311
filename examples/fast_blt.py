"""Fine-tunes a BLT into one that also fills in blocks of bytes (Fast BLT), and says what that cost in bits per byte.

    python examples/pretrain_small/corpus.py corpus
    python examples/fast_blt.py --corpus corpus --output runs/fast

Starts from `pretrained/blt-5m` by default. The block size is drawn anew for each step, so that one model decodes with
all of them. Only the decoder, the head and the mask embedding are trained (`--train all` trains everything but the
entropy model), and the next byte is learned along, so its loss does not suffer; `--mask-weight` balances the two.
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

from report import read_groups  # noqa: E402
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
        model.config.diffusion_block_size = max(self.sizes)
        model.config.diffusion_loss_weight = 1.0


@torch.no_grad()
def masked_nats(model: BltForCausalLM, rows: torch.utils.data.Dataset, block_size: int) -> float:
    """The masked loss in nats for each byte of a block, on the same noise at every call."""
    model.eval()
    before, model.config.diffusion_block_size = model.config.diffusion_block_size, block_size
    generator, total, count = torch.Generator().manual_seed(0), 0.0, 0
    for row in rows:
        ids = row["input_ids"][None]
        out = model(ids, labels=ids, noise_generator=generator, num_items_in_batch=1, output_patches=True)
        total += float(out.masked_loss)
        starts = out.patch_lengths[0].cumsum(0)[:-1]
        count += int((ids.shape[1] - starts).clamp(max=block_size).sum())
    model.config.diffusion_block_size = before
    return total / count


def bits_per_byte(model: BltForCausalLM, corpus: Path, limit: int | None) -> dict[str, float]:
    """Of each group of held-out texts, and of all."""
    found, nats, num_bytes = {}, 0.0, 0
    for group, texts in read_groups(corpus, limit).items():
        measured = measure_bits_per_byte(model, texts, max_length=1024)
        found[group] = measured.bits_per_byte
        nats, num_bytes = nats + measured.bits_per_byte * measured.num_bytes, num_bytes + measured.num_bytes
    return {**found, "all": nats / num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "pretrained" / "blt-5m"))
    parser.add_argument("--corpus", type=Path, required=True, help="what pretrain_small/corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 8, 8, 16])
    parser.add_argument("--train", choices=["decoder", "all"], default="decoder")
    parser.add_argument("--mask-weight", type=float, default=1.0, help="of the masked loss, against the next byte's")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=2, help="a step")
    parser.add_argument("--context", type=int, default=512, help="bytes of a row")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--limit", type=int, default=20_000, help="bytes of each held-out group to measure")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    set_seed(arguments.seed)

    model = BltForCausalLM.from_pretrained(arguments.model, diffusion_block_size=max(arguments.block_sizes))
    if arguments.train == "decoder":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("model.local_decoder.", "lm_head.", "mask_embedding.")))
    held_out = byte_blocks(read(arguments.corpus, "heldout"))
    probe = torch.utils.data.Subset(held_out, range(0, len(held_out), max(len(held_out) // 12, 1)))
    facts = {"arguments": {key: str(value) for key, value in vars(arguments).items()}}
    facts["bits per byte before"] = bits_per_byte(model, arguments.corpus, arguments.limit)
    print(json.dumps(facts["bits per byte before"]), flush=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rows,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 12,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_steps=40,
            save_total_limit=1,
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=byte_blocks(read(arguments.corpus, "train"), arguments.context),
        callbacks=[BlockSizes(arguments.block_sizes, arguments.mask_weight, 4.5)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    model.float().eval()
    model.config.use_cache = True  # which Trainer switches off
    model.save_pretrained(arguments.output)
    BltTokenizer().save_pretrained(arguments.output)
    facts["bits per byte after"] = bits_per_byte(model, arguments.corpus, arguments.limit)
    facts["bits of a block's byte after"] = {
        size: masked_nats(model, probe, size) / math.log(2) for size in sorted(set(arguments.block_sizes))
    }
    (arguments.output / "fast_blt.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
