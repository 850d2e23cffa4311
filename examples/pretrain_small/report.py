"""Measures what `train.py` made, and writes the folder that ships: weights in bf16, tokenizer, model card, picture.

python examples/pretrain_small/report.py --corpus corpus --runs runs/small --output pretrained/blt-5m
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from blt_hf import BltForCausalLM, BltPatcher, BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte, write_model_card
from blt_hf.evaluation.flops import flops_per_byte


GROUPS = {  # what the sources of `corpus.py` are
    "English prose": ("handbook, en", "Jargon File", "Devil's Dictionary", "WordNet"),
    "Python's documentation": ("Python's documentation",),
    "Python code": ("Python code",),
    "German, French, Spanish, Portuguese": ("handbook, de", "handbook, fr", "handbook, es", "handbook, pt"),
    "Russian, Japanese, Chinese, Arabic": ("handbook, ru", "handbook, ja", "handbook, zh", "handbook, ar"),
}
PROMPTS = ["The import statement ", "dog (noun): ", "def read(self, ", "Das Paket ", "Le système "]
CARD = (Path(__file__).parent / "card.md").read_text()  # the model card, with names in braces


def read_groups(corpus: Path, limit: int | None) -> dict[str, list[str]]:
    """Held-out documents of each group; each begins where it begins, and `limit` bytes of the group are shared out."""
    documents = [json.loads(line) for line in (corpus / "heldout.jsonl").open()]
    groups = {}
    for group, sources in GROUPS.items():
        texts = [document["text"] for document in documents if document["source"] in sources]
        share = None if limit is None else limit // len(texts)
        groups[group] = [text.encode()[:share].decode(errors="ignore") for text in texts]
    return groups


def ship(runs: Path, output: Path) -> None:
    """Weights rounded to bf16, under a configuration that loads them in fp32; the code is this repository's."""
    model = BltForCausalLM.from_pretrained(runs / "blt").bfloat16()
    model.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["dtype"] = "float32"
    config["use_cache"] = True  # which Trainer switches off
    BltTokenizer().save_pretrained(output)
    tokenizer_config = json.loads((output / "tokenizer_config.json").read_text())
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        values.pop("auto_map", None)
        (output / name).write_text(json.dumps(values, indent=2) + "\n")
    for file in output.glob("*.py"):
        file.unlink()


def draw(runs: Path, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label in (("blt", "BLT"), ("llama", "Llama, BPE of 4,096 tokens"), ("patcher", "entropy model alone")):
        curve = json.loads((runs / name / "log.json").read_text())["curve"]
        axes.plot([p["bytes"] / 1e6 for p in curve], [p["bits_per_byte"] for p in curve], label=label)
    axes.set(xlabel="training text, MB", ylabel="bits per byte, held-out text", ylim=(1.5, 4))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def sample(model, tokenizer, prompt: str) -> str:
    set_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=200, do_sample=True, temperature=0.5, min_p=0.1)
    return tokenizer.decode(text[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to ship")
    parser.add_argument("--hardware", default="two cores of a server", help="what it was trained on")
    parser.add_argument("--limit", type=int, help="bytes of each group to measure; all by default")
    parser.add_argument("--note", default="", help="a sentence on how the two runs compare")
    parser.add_argument("--comment", default="", help="a sentence under the table")
    arguments = parser.parse_args()

    ship(arguments.runs, arguments.output)
    blt = BltForCausalLM.from_pretrained(arguments.output).eval()
    llama = AutoModelForCausalLM.from_pretrained(arguments.runs / "llama").eval()
    llama_tokenizer = AutoTokenizer.from_pretrained(arguments.runs / "llama")
    patcher = BltPatcher.from_pretrained(arguments.runs / "patcher").eval()
    logs = {name: json.loads((arguments.runs / name / "log.json").read_text()) for name in ("blt", "llama")}
    bytes_per_token = logs["llama"]["bytes_per_id"]
    llama_window = round(1024 / bytes_per_token)

    lines = ["| text | held-out kB | BLT | Llama | entropy model | bytes a patch |", "|---|---|---|---|---|---|"]
    total, results = {}, {}
    for group, texts in read_groups(arguments.corpus, arguments.limit).items():
        measured = {
            "blt": measure_bits_per_byte(blt, texts, max_length=1024),
            "llama": measure_bits_per_byte(llama, texts, llama_tokenizer, max_length=llama_window),
            "patcher": measure_bits_per_byte(patcher, texts, max_length=1024),
        }
        bits = {name: found.bits_per_byte for name, found in measured.items()}
        results[group] = measured["blt"]
        size = measured["blt"].num_bytes
        for name, value in bits.items():
            total[name] = total.get(name, 0) + value * size
        total["bytes"] = total.get("bytes", 0) + size
        total["patches"] = total.get("patches", 0) + size / measured["blt"].bytes_per_patch
        lines.append(
            f"| {group} | {size / 1000:.0f} | {bits['blt']:.3f} | {bits['llama']:.3f} | {bits['patcher']:.3f} | "
            f"{measured['blt'].bytes_per_patch:.2f} |"
        )
        print(lines[-1], flush=True)
    blt_bits, llama_bits, patcher_bits = (total[name] / total["bytes"] for name in ("blt", "llama", "patcher"))
    lines.append(
        f"| all | {total['bytes'] / 1000:.0f} | {blt_bits:.3f} | {llama_bits:.3f} | {patcher_bits:.3f} | "
        f"{total['bytes'] / total['patches']:.2f} |"
    )

    draw(arguments.runs, arguments.output / "learning_curves.png")
    tokenizer = BltTokenizer()
    samples = "\n\n".join(f"```text\n{sample(blt, tokenizer, prompt).strip()}\n```" for prompt in PROMPTS)
    config = blt.config
    costs = [flops_per_byte(c, 4.5, 1024, bytes_per_token).training().total / 1e6 for c in (config, llama.config)]
    log = logs["blt"]
    megabytes = {
        "blt": logs["blt"]["steps"] * logs["blt"]["rows"] * 1024 / 1e6,
        "llama": logs["llama"]["steps"] * logs["llama"]["rows"] * llama_window * bytes_per_token / 1e6,
    }
    card = CARD.format(
        parameters=blt.num_parameters() / 1e6,
        patcher_layers=config.patcher_config.num_hidden_layers,
        patcher_width=config.patcher_config.hidden_size,
        encoder_layers=config.encoder_config.num_hidden_layers,
        decoder_layers=config.decoder_config.num_hidden_layers,
        global_layers=config.global_config.num_hidden_layers,
        local_width=config.encoder_config.hidden_size,
        global_width=config.global_config.hidden_size,
        window=config.local_attention_window_len,
        threshold=config.patching_threshold,
        size=(arguments.output / "model.safetensors").stat().st_size / 1e6,
        hardware=arguments.hardware,
        steps=log["steps"],
        rows=log["rows"],
        megabytes=megabytes["blt"],
        llama_parameters=llama.num_parameters() / 1e6,
        llama_megabytes=megabytes["llama"],
        llama_window=llama_window,
        bytes_per_token=bytes_per_token,
        blt_total=costs[0] * megabytes["blt"],
        llama_total=costs[1] * megabytes["llama"],
        note=arguments.note,
        table="\n".join(lines),
        comment=arguments.comment,
        samples=samples,
    )
    (arguments.output / "README.md").write_text(card)
    languages = ["en", "de", "fr", "es", "pt", "ru", "ja", "zh", "ar", "code"]
    write_model_card(
        arguments.output, language=languages, bits_per_byte=results
    )  # keeps the text, adds to its metadata


if __name__ == "__main__":
    main()
