"""Peak memory of converting a checkpoint of Meta's code, measured in child processes.

Makes a random checkpoint in Meta's layout (float32, widths of BLT-1B, entropy model of the released size), then
converts it there and back with `blt_hf`, and once the plain way, with every tensor loaded. Peak memory is the
high-water mark of the resident set (`VmHWM`, mapped files included) minus what the imports take. Linux only.

    python benchmarks/convert_memory.py --gigabytes 3
"""

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from blt_hf.conversion import config_from_meta_args, tensor_specs


LAYER_BYTES = 4 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048)
TABLES = 6
ENTROPY_ARGS = {
    "dim": 768,
    "n_layers": 14,
    "n_heads": 12,
    "max_seqlen": 8192,
    "ffn_dim_multiplier": 1.0,
    "vocab_size": 260,
}
PATCHER_ARGS = {"patching_mode": "entropy", "threshold": 1.335442066192627}

CHILD = """
import json, sys, time
from pathlib import Path
import torch, transformers, safetensors.torch
from transformers import GenerationConfig
import transformers.dynamic_module_utils, huggingface_hub.repocard, rich.progress
from blt_hf import conversion
from blt_hf.model import modeling_blt
from blt_hf.tokenizer import tokenization

def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6

def plain(source, out, dtype):
    out.mkdir()
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    names = [f"encoder_hash_tok_embedding.{table}.weight" for table in range(6)]
    tensors["model.encoder_hash_tok_embedding.weight"] = torch.cat([tensors.pop(name) for name in names])
    patcher = torch.load(source / "entropy_model" / "consolidated.pth", weights_only=True)["model"]
    tensors |= {f"model.patcher.{name}": tensor for name, tensor in patcher.items()}
    if dtype != "auto":
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, out / "model.safetensors")

source, out, direction, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
run = {"to transformers": conversion.convert_meta_checkpoint, "to meta": conversion.export_meta_checkpoint, "plain": plain}
before, start = peak_mb(), time.perf_counter()
run[direction](source, out, dtype=dtype) if direction != "plain" else plain(source, out, dtype)
print(json.dumps({"imports_mb": before, "peak_mb": peak_mb() - before, "seconds": time.perf_counter() - start}))
"""


def model_args(gigabytes: float) -> dict:
    """BLT-1B with fewer global layers and hash rows; these take half of the bytes, as in the released checkpoints."""
    layers = max(1, round(gigabytes * 0.4e9 / LAYER_BYTES))
    rows = int(gigabytes * 0.5e9 / (4 * 1024 * TABLES))
    return {
        "vocab_size": 260, "max_seqlen": 4096, "max_encoder_seq_length": 24576, "rope_theta": 500000.0,
        "dim_global": 2048, "dim_local_encoder": 1024, "dim_local_decoder": 1024, "n_heads_global": 16,
        "n_heads_local_encoder": 16, "n_heads_local_decoder": 16, "n_layers_global": layers,
        "n_layers_local_encoder": 1, "n_layers_local_decoder": 1, "local_attention_window_len": 512,
        "cross_attn_encoder": True, "cross_attn_decoder": True, "cross_attn_k": 2, "cross_attn_nheads": 16,
        "cross_attn_init_by_pooling": True, "cross_attn_all_layers_decoder": True, "downsampling_by_pooling": "max",
        "use_local_encoder_transformer": True, "attn_bias_type": "block_causal", "patching_mode": "entropy",
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8], "encoder_hash_byte_group_vocab": rows,
        "encoder_hash_byte_group_nb_functions": 1,
    }  # fmt: skip


def write_checkpoint(folder: Path, gigabytes: float) -> dict:
    """Writes random weights piece by piece; returns sizes in bytes."""
    args = model_args(gigabytes)
    config, _ = config_from_meta_args(args, PATCHER_ARGS, ENTROPY_ARGS)
    specs = tensor_specs(config)
    shapes = {name: spec.source_shape for spec in specs if not spec.in_patcher for name in spec.sources}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    piece = torch.randn(2**20).numpy().tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for begin in range(0, end, len(piece)):
            file.write(piece[: end - begin])
    data = {"patcher_args": PATCHER_ARGS, "tokenizer_args": {"name": "blt"}}
    (folder / "config.json").write_text(json.dumps({"args": args}))
    (folder / "train_args.json").write_text(json.dumps({"data": data, "model": args}))
    (folder / "entropy_model").mkdir()
    (folder / "entropy_model" / "params.json").write_text(json.dumps({"data": data, "entropy_model": ENTROPY_ARGS}))
    state = {name: torch.randn(spec.source_shape) for spec in specs if spec.in_patcher for name in spec.sources}
    torch.save({"model": state}, folder / "entropy_model" / "consolidated.pth")
    largest = max(4 * torch.Size(spec.shape).numel() for spec in specs)
    patcher = sum(4 * tensor.numel() for tensor in state.values())
    return {"checkpoint_bytes": end + patcher, "largest_tensor_bytes": largest, "patcher_bytes": patcher}


def measure(source: Path, out: Path, direction: str, dtype: str) -> dict:
    command = [sys.executable, "-c", CHILD, str(source), str(out), direction, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return {"direction": direction, "dtype": dtype, **json.loads(result.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the byte latent transformer")
    parser.add_argument("--folder", help="where to put the checkpoints; default: the system's temporary folder")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        (folder / "meta").mkdir()
        sizes = write_checkpoint(folder / "meta", arguments.gigabytes)
        rows = [measure(folder / "meta", folder / "auto", "to transformers", "auto")]
        # Gate: what was measured must be right.
        rows.append(measure(folder / "auto", folder / "back", "to meta", "auto"))
        if not _same_tensors(folder / "meta", folder / "back"):
            raise RuntimeError("the round trip changed a tensor; no figures")
        _remove(folder / "auto", folder / "back")
        rows.append(measure(folder / "meta", folder / "bf16", "to transformers", "bfloat16"))
        _remove(folder / "bf16")
        rows.append(measure(folder / "meta", folder / "plain", "plain", "auto"))

    table = Table(title=f"Converting {sizes['checkpoint_bytes'] / 1e9:.2f} GB, largest tensor "
                        f"{sizes['largest_tensor_bytes'] / 1e9:.2f} GB")  # fmt: skip
    for column in ("direction", "dtype", "peak memory", "of the largest tensor", "time"):
        table.add_column(column, justify="left" if column in ("direction", "dtype") else "right")
    for row in rows:
        row["peak_over_largest_tensor"] = row["peak_mb"] * 1e6 / sizes["largest_tensor_bytes"]
        ratio, seconds = f"{row['peak_over_largest_tensor']:.2f}", f"{row['seconds']:.1f} s"
        table.add_row(row["direction"], row["dtype"], f"{row['peak_mb']:.0f} MB", ratio, seconds)
    Console().print(table)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    versions = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "convert_memory", **sizes, "runs": rows, **versions, "cpus": os.cpu_count()}))


def _same_tensors(first: Path, second: Path) -> bool:
    with safe_open(first / "model.safetensors", "pt") as a, safe_open(second / "model.safetensors", "pt") as b:
        return set(a.keys()) == set(b.keys()) and all(
            torch.equal(a.get_tensor(name), b.get_tensor(name))
            for name in a.keys()  # noqa: SIM118 (not a dict)
        )


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
