"""Trains the small pretrained BLT and the token model that it is compared with, on the corpus of `corpus.py`.

    python examples/pretrain_small/train.py patcher --corpus corpus --output runs/small
    python examples/pretrain_small/train.py blt     --corpus corpus --output runs/small
    python examples/pretrain_small/train.py llama   --corpus corpus --output runs/small

The entropy model comes first; its threshold is calibrated to 4.5 bytes a patch. The Llama has as many parameters as the
BLT, its BPE tokenizer is trained on the same text, and it trains for as many floating-point operations. Both run
in bf16 autocast, on a GPU or on a CPU; one core of a server does the BLT's 3,000 steps in about an hour. Each writes
its learning curve to `<name>/log.json`.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from blt_hf import BltConfig, BltForCausalLM, BltPatcher, BltPatcherConfig, BltTokenizer
from blt_hf.evaluation.flops import flops_per_byte
from blt_hf.training.calibration import calibrate_threshold


CONTEXT = 1024  # bytes
SHARES = {"handbook": 2.0, "Python's documentation": 0.5, "WordNet": 0.6}  # times a document is seen; others once
VOCABULARY = 4096  # tokens of the Llama's BPE


def read(corpus: Path, part: str) -> list[str]:
    """The documents in the order of the file; for training, as often as their source's share says."""
    chance = random.Random(0)
    texts = []
    for line in (corpus / f"{part}.jsonl").open():
        document = json.loads(line)
        share = 1.0
        if part == "train":
            source = document["source"]
            share = SHARES.get(source.split(",")[0], 1.0)
        texts += [document["text"]] * (int(share) + (chance.random() < share % 1))
    if part == "train":
        chance.shuffle(texts)
    return texts


class Blocks(torch.utils.data.Dataset):
    """Rows of equal length over the texts, one after the other with an EOS between them; each begins with a BOS."""

    def __init__(self, texts: list[str], encode, length: int, bos: int, eos: int):
        ids = np.concatenate([part for text in texts for part in (encode(text), [eos])]).astype(np.int32)
        self.rows = ids[: len(ids) // (length - 1) * (length - 1)].reshape(-1, length - 1)
        self.bos = bos

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.append(self.bos, self.rows[index]).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def byte_blocks(texts: list[str], length: int = CONTEXT) -> Blocks:
    return Blocks(texts, lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 4, length, 1, 2)


def train(model, name: str, blocks: Blocks, held_out: Blocks, bytes_per_id: float, arguments, **settings) -> None:
    """Trains, saves to `<output>/<name>` in fp32, and writes bits per byte on held-out rows as training went."""
    folder = arguments.output / name
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder / "trainer"),
            max_steps=arguments.steps or settings.pop("max_steps"),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=150,
            prediction_loss_only=True,
            save_steps=300,
            save_total_limit=1,
            report_to="none",
            dataloader_pin_memory=False,
            **{key: value for key, value in settings.items() if key != "max_steps"},
        ),
        train_dataset=blocks,
        eval_dataset=torch.utils.data.Subset(held_out, range(min(96, len(held_out)))),
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    model.float().save_pretrained(folder)
    rows = trainer.args.train_batch_size
    curve = [
        {
            "bytes": round(entry["step"] * rows * (blocks.rows.shape[1] + 1) * bytes_per_id),
            "bits_per_byte": entry["eval_loss"] / math.log(2) / bytes_per_id,
        }
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    facts = {"steps": trainer.state.global_step, "rows": rows, "row_ids": CONTEXT, "bytes_per_id": bytes_per_id}
    (folder / "log.json").write_text(json.dumps({**facts, "curve": curve}, indent=1) + "\n")


def train_patcher(arguments) -> None:
    texts, held_out = read(arguments.corpus, "train"), read(arguments.corpus, "heldout")
    patcher = BltPatcher(
        BltPatcherConfig(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=352, sliding_window=128
        )
    )
    settings = {"max_steps": 1_000, "per_device_train_batch_size": 16, "learning_rate": 4e-3}
    train(patcher, "patcher", byte_blocks(texts, 512), byte_blocks(held_out, 512), 1.0, arguments, **settings)
    found = calibrate_threshold(patcher.eval(), held_out[:200], target_patch_size=4.5)
    print(f"{found.threshold:.3f} nats make patches of {found.mean_patch_size:.2f} bytes")
    (arguments.output / "patcher" / "calibration.json").write_text(json.dumps(found.settings, indent=1) + "\n")


def make_blt(patcher: BltPatcher, calibration: dict) -> BltForCausalLM:
    local = {"hidden_size": 128, "num_attention_heads": 2, "hidden_size_global": 256}
    config = BltConfig(
        **calibration,
        patcher_config=patcher.config.to_dict(),
        encoder_hash_byte_group_size=[3, 4, 5],
        encoder_hash_byte_group_vocab=4096,
        encoder_config={**local, "num_hidden_layers": 1, "intermediate_size": 352},
        decoder_config={**local, "num_hidden_layers": 3, "intermediate_size": 352},
        global_config={
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "intermediate_size": 704,
        },
    )
    model = BltForCausalLM(config)
    model.set_patcher(patcher)
    return model


def train_blt(arguments) -> None:
    folder = arguments.output / "patcher"
    model = make_blt(BltPatcher.from_pretrained(folder), json.loads((folder / "calibration.json").read_text()))
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    BltTokenizer().save_pretrained(arguments.output / "blt")
    texts, held_out = read(arguments.corpus, "train"), read(arguments.corpus, "heldout")
    settings = {"max_steps": 3_000, "per_device_train_batch_size": 8, "learning_rate": 2e-3}
    train(model, "blt", byte_blocks(texts), byte_blocks(held_out), 1.0, arguments, **settings)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def train_llama(arguments) -> None:
    texts, held_out = read(arguments.corpus, "train"), read(arguments.corpus, "heldout")
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(arguments.output / "llama")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=656,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    count = sum(len(text.encode()) for text in held_out)
    bytes_per_id = count / sum(len(ids) for ids in tokenizer(held_out)["input_ids"])
    # Rows cover as many bytes as the BLT's, and training costs as many operations, its frozen patcher included.
    length = round(CONTEXT / bytes_per_id)
    blt = make_blt(BltPatcher(BltPatcherConfig.from_pretrained(arguments.output / "patcher")), {}).config
    costs = [flops_per_byte(c, 4.5, CONTEXT, bytes_per_id).training().total for c in (blt, config)]
    steps = round(3_000 * costs[0] / costs[1])
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {bytes_per_id:.2f} bytes a token, {steps} steps")
    print(f"FLOPs of training a byte: BLT {costs[0] / 1e6:.1f} M, Llama {costs[1] / 1e6:.1f} M")

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 2e-3}
    blocks, held = (Blocks(part, encode, length, 0, 1) for part in (texts, held_out))
    train(model, "llama", blocks, held, bytes_per_id, arguments, **settings)


STAGES = {"patcher": train_patcher, "blt": train_blt, "llama": train_llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="another number of training steps")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast; some processors are slow at it"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    arguments = parser.parse_args()
    set_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments)


if __name__ == "__main__":
    main()
