"""What the benchmarks share: contestants of equal shape, interleaved timing, tables, and the JSON line."""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from blt_hf import BltConfig, BltForCausalLM


BYTES_PER_TOKEN = 4.4  # of Llama 3's tokenizer on English text, to compare tokens with bytes
SHAPES = {
    # width, layers, heads, feed-forward of each stack; k; hash rows
    "tiny": ((64, 2, 2, 128), (64, 1, 2, 128), (64, 2, 2, 128), (128, 2, 4, 256), 2, 500),
    "mid": ((256, 4, 4, 704), (256, 1, 4, 704), (256, 4, 4, 704), (512, 8, 8, 1408), 2, 5000),
    "1b": ((768, 14, 12, 2048), (1024, 1, 16, 2816), (1024, 9, 16, 2816), (2048, 25, 16, 5632), 2, 500002),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TF32, on GPUs that have it")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    parser.add_argument("--patch-bytes", type=float, default=4.5, help="mean bytes a patch")


def set_up(arguments: argparse.Namespace) -> None:
    """What the arguments say of the process."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")


def _stack(width: int, layers: int, heads: int, feed_forward: int, **more) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        **more,
    }


def random_ids(rows: int, length: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, (rows, length), generator=generator)
    ids[:, 0] = 1
    return ids.to(device)


def build_blt(shape: str, patch_bytes: float, device: str, dtype: str, **config) -> BltForCausalLM:
    """A random BLT whose threshold gives `patch_bytes` bytes a patch on random bytes."""
    patcher, encoder, decoder, global_, k, rows = SHAPES[shape]
    torch.manual_seed(0)
    config = BltConfig(
        patcher_config=_stack(*patcher),
        encoder_config=_stack(*encoder, cross_attn_k=k),
        decoder_config=_stack(*decoder, cross_attn_k=k, hidden_size_global=global_[0]),
        global_config=_stack(*global_),
        cross_attn_k=k,
        encoder_hash_byte_group_vocab=rows,
        **config,
    )
    with torch.device(device):
        model = BltForCausalLM(config).eval()
    with torch.no_grad():
        entropies = model(random_ids(1, 8192, device, seed=1), output_patches=True, use_cache=False).entropies
    model.config.patching_threshold = float(entropies.quantile(1 - 1 / patch_bytes))
    return to_dtype(model, dtype)


def to_dtype(model, dtype: str):
    """Casts as `from_pretrained` does: with float16 our patcher stays in fp32."""
    kept = tuple(model._keep_in_fp32_modules or ()) if dtype == "float16" else ()
    for name, weight in model.named_parameters():
        if not name.startswith(kept):
            weight.data = weight.data.to(getattr(torch, dtype))
    return model


def build_in_tree(model: BltForCausalLM):
    """The same weights in transformers' in-tree class."""
    from transformers.models.blt.modeling_blt import BltForCausalLM as InTreeBlt

    with torch.device(model.device):
        in_tree = InTreeBlt(InTreeBlt.config_class.from_dict(model.config.to_dict())).eval()
    in_tree.load_state_dict(model.state_dict())
    return in_tree


def build_pair(arguments: argparse.Namespace) -> tuple[BltForCausalLM, torch.nn.Module, float]:
    """Ours, the in-tree class with the same weights, and how far their logits are apart in fp32."""
    model = build_blt(arguments.shape, arguments.patch_bytes, arguments.device, "float32")
    in_tree = build_in_tree(model)
    difference = check_equal(model, in_tree)
    return to_dtype(model, arguments.dtype), to_dtype(in_tree, arguments.dtype), difference


def build_llama(shape: str, device: str, dtype: str, max_length: int = 32768) -> LlamaForCausalLM:
    """A random Llama of the global transformer's shape, with a small vocabulary so that only the layers count."""
    return _llama(_stack(*SHAPES[shape][3]), device, dtype, max_length)


def llama_of(config, device: str, dtype: str, max_length: int = 32768) -> LlamaForCausalLM:
    """The same for the configuration of a global transformer."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return _llama({name: getattr(config, name) for name in names}, device, dtype, max_length)


def _llama(stack: dict, device: str, dtype: str, max_length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**stack, vocab_size=260, max_position_embeddings=max_length)
    with torch.device(device):
        return to_dtype(LlamaForCausalLM(config).eval(), dtype)


def check_equal(model: BltForCausalLM, in_tree, length: int = 300) -> float:
    """Largest logit difference to the in-tree class; no timing without it."""
    ids = random_ids(1, length, model.device)
    with torch.no_grad():
        difference = float((model(ids, use_cache=False).logits - in_tree(ids, use_cache=False).logits).abs().max())
    if not difference < 1e-3:
        raise SystemExit(f"outputs differ by {difference}: no timing from a wrong result")
    return difference


def adamw(model, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def synchronize(device: str) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


@dataclass
class Contestant:
    """`run` does `units` of work; `repeats` caps how often, for the slow ones."""

    name: str
    run: Callable[[], object]
    units: float
    repeats: int = 5
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict:
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "units_per_s": self.units / median,
            "ms_per_unit": 1000 * median / self.units,
            "spread": (max(self.seconds) - min(self.seconds)) / median,
            "runs": len(self.seconds),
        }


def interleave(contestants: list[Contestant], device: str, warm_up: bool = True) -> list[dict]:
    """Runs the contestants in turns and summarises each, also on stderr, for who waits or has to stop."""
    if warm_up:
        for contestant in contestants:
            if contestant.repeats > 1:
                seconds = timed(contestant.run, device)
                print(f"{contestant.name}: {seconds:.1f} s to warm up", file=sys.stderr, flush=True)
    for turn in range(max(contestant.repeats for contestant in contestants)):
        for contestant in contestants:
            if turn < contestant.repeats:
                contestant.seconds.append(timed(contestant.run, device))
    summaries = [contestant.summary() for contestant in contestants]
    for summary in summaries:
        print(f"{summary['name']}: {summary['ms_per_unit']:.3g} ms", file=sys.stderr, flush=True)
    return summaries


def weight_bytes_a_byte(model: BltForCausalLM, patch_bytes: float) -> float:
    """Bytes of weights that decoding one byte of text reads: the global transformer's once a patch, no tables."""
    parts = dict.fromkeys(("patcher", "local_encoder", "local_decoder", "global_transformer"), 0)
    for name in parts:
        module = getattr(model.model, name)
        tables = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
        parts[name] = sum(p.nbytes for p in module.parameters() if id(p) not in tables)
    parts["global_transformer"] /= patch_bytes
    return sum(parts.values()) + model.lm_head.weight.nbytes


def bandwidth(device: str) -> float:
    """Bytes a second that a sum over 1 GB reads here, the best of five."""
    data = torch.ones(2**28, device=device)
    return data.nbytes / min(timed(data.sum, device) for _ in range(5))


def matmul_peak(device: str, dtype: str) -> float:
    """FLOPs a second of a large matrix product here, the best of five."""
    size = 8192 if str(device).startswith("cuda") else 2048
    a, b = (torch.ones(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def make_step(model, ids: torch.Tensor, optimizer: torch.optim.Optimizer, **inputs) -> Callable[[], None]:
    """A training step on `ids`: forward, backward, optimizer."""

    def step():
        model(ids, labels=ids, use_cache=False, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory_mb(device: str) -> float:
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def environment(arguments: argparse.Namespace) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device, root = arguments.device, f"{Path(__file__).parents[1]}/"
    given = {
        name: value.removeprefix(root) if isinstance(value, str) else value for name, value in vars(arguments).items()
    }
    return {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        **given,  # files of this project by their place in it
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def report(title: str, rows: list[dict], arguments: argparse.Namespace, **facts) -> None:
    """A table for people, and one JSON line for machines, last."""
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v := row.get(column, ""), float) else str(v) for column in columns))
    Console(width=140).print(table)
    print(json.dumps({"benchmark": title, "rows": rows, **facts, "environment": environment(arguments)}), flush=True)
