"""What quantizing a BLT costs and saves: bits per byte on held-out text, memory of weights, and whether patches moved.

python benchmarks/quantization.py                                    # trains a small model first, for a minute or two
python benchmarks/quantization.py --model pretrained/blt-5m          # nf4 on a CPU needs widths of multiples of 64

The model is trained on the repository's own text, with the entropy model of `pretrained/blt-5m`. Memory is that of the
tensors themselves, scales included, as the model lies there after loading.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import adamw, report
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from blt_hf import BltConfig, BltForCausalLM
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.training.data import byte_ids, read_texts


ROOT = Path(__file__).parents[1]
KINDS = {
    "none": lambda: None,
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "quanto int4": lambda: QuantoConfig(weights="int4"),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def train(steps: int, texts: list[bytes], context: int = 512, rows: int = 4) -> BltForCausalLM:
    """A small BLT whose widths are multiples of 64, the block of 4-bit weights."""
    source = AutoModelForCausalLM.from_pretrained(ROOT / "pretrained/blt-5m")
    local = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 384}
    torch.manual_seed(0)
    model = BltForCausalLM(
        BltConfig(
            patching_threshold=source.config.patching_threshold,
            patcher_config=source.config.patcher_config,
            encoder_config=local,
            decoder_config={**local, "num_hidden_layers": 2, "hidden_size_global": 256},
            global_config={
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 768,
            },
            encoder_hash_byte_group_size=[3, 4, 5],
            encoder_hash_byte_group_vocab=4096,
        )
    )
    model.set_patcher(source.model.patcher)
    stream = torch.tensor([i for text in texts for i in byte_ids(text)])
    optimizer = adamw(model.train(), 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 10, 1 - 0.9 * step / steps)
        starts = torch.randint(0, len(stream) - context, (rows,))
        ids = torch.stack([stream[first : first + context] for first in starts])
        ids[:, 0] = 1
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"{steps} steps, loss {float(loss):.3f} nats", flush=True)
    return model.eval()


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a subclass of quantized weights consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    total = tensor.nbytes
    # bitsandbytes keeps its scales beside the weight.
    state = getattr(tensor, "quant_state", None)
    for scale in (getattr(tensor, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)):
        total += 0 if scale is None else scale.nbytes
    return total


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the weights of all layers that a quantizer may take: not the entropy model's, not the head."""
    return sum(
        tensor_bytes(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "patcher" not in name and name != "lm_head"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a BLT; without, a small one is trained")
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--bytes", type=int, default=20_000, help="of held-out text")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    held_out = (ROOT / "docs/patching.md").read_bytes()[: arguments.bytes]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "patching.md"]
            train(arguments.steps, read_texts([ROOT / "README.md", ROOT / "src", *pages])).save_pretrained(folder)
        source = arguments.model or folder
        rows, expected = [], None
        ids = torch.tensor([[1, *byte_ids(held_out[:2000])]], device=arguments.device)
        for kind in arguments.kinds or [kind for kind in KINDS if arguments.model is None or "nf4" not in kind]:
            model = AutoModelForCausalLM.from_pretrained(
                source, quantization_config=KINDS[kind](), device_map=arguments.device
            ).eval()
            weights, linear = sum(map(tensor_bytes, (*model.parameters(), *model.buffers()))), linear_bytes(model)
            with torch.no_grad():
                output = model(ids, output_patches=True, use_cache=False)
            expected = expected or output
            found = measure_bits_per_byte(model, [held_out], max_length=1024)
            rows.append(
                {
                    "weights": kind,
                    "bits_per_byte": found.bits_per_byte,
                    "bytes_per_patch": found.bytes_per_patch,
                    "linear_mb": linear / 1e6,
                    "all_mb": weights / 1e6,
                    "same_entropies": torch.equal(output.entropies, expected.entropies),
                    "same_patches": torch.equal(output.patch_lengths, expected.patch_lengths),
                }
            )
    report("quantization: bits per byte, memory, patches", rows, arguments)


if __name__ == "__main__":
    main()
