"""Measures `blt-smollm2-135m` beside the token model that it was made from: one run, one machine, float32 both.

    python examples/pretrain_small/corpus.py corpus              # held-out prose and code
    python examples/smollm2/measure.py blt-smollm2-135m SmolLM2-135M-Instruct.Q4_1.gguf --held-out corpus/heldout.jsonl

Parts: `questions` (the hundred answers of each), `speed` (bytes a second, first byte, memory), `bits` (of prose, code and
chats that the token model writes at temperature 1), `noise` (bits on the clean 64 bytes after 256 noisy ones), `letters`
(spelling and reversal, before and after fine-tuning). Each writes a JSON file to `--output`.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import judge
import letters
import torch
import transformers
from noise import NOISE
from scoring import answer_bits, bits, prompt_ids, start_ids, text_bits_per_byte, text_ids
from speed import measure_memory, measure_speed
from transformers import set_seed
from transformers.utils import logging


SOURCES = {
    "prose": ("handbook, en", "Jargon File", "Devil's Dictionary", "WordNet"),
    "code": ("Python code",),
}
FIRST_SEED = 10_000  # of texts that the token model samples; training uses smaller ones
NOISY_BYTES, CLEAN_BYTES = 256, 64
PARTS = ("questions", "speed", "bits", "noise", "letters")


def read_held_out(path: Path, kind: str, limit: int) -> list[str]:
    """Returns the beginnings of the held-out documents of a kind, `limit` bytes in all, as equal shares."""
    documents = map(json.loads, path.open())
    texts = [document["text"] for document in documents if document["source"] in SOURCES[kind]]
    if not texts:
        raise ValueError(f"{path} has no documents of {', '.join(SOURCES[kind])}.")
    texts = texts[: max(limit // 2000, 1)]
    return [text.encode()[: limit // len(texts)].decode(errors="ignore") for text in texts]


@torch.no_grad()
def sample_chats(model, tokenizer, questions: list[str], longest: int) -> list[dict]:
    """Returns answers that the token model samples at temperature 1, at most `longest` tokens each."""
    chats = []
    for index, question in enumerate(questions):
        set_seed(FIRST_SEED + index)
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0,
        )[0, ids.shape[1] :]  # fmt: skip
        ended = new[-1].item() == model.generation_config.eos_token_id
        # A character that the last token leaves unfinished is no text
        answer, *rest = tokenizer.decode(new, skip_special_tokens=True).split("\ufffd")
        chats.append({"question": question, "answer": answer, "ended": ended and not rest})
    return [chat for chat in chats if chat["answer"]]


def noisy_pieces(texts: list[str], limit: int) -> list[tuple[str, str]]:
    """Cuts ASCII texts into pieces of 256 bytes and the 64 that follow; the second part begins with a space."""
    pieces = []
    for text in texts:
        text = " ".join(text.encode("ascii", "ignore").decode().split())
        while len(text) > 2 * (NOISY_BYTES + CLEAN_BYTES) and len(pieces) < limit:
            cut = text.find(" ", NOISY_BYTES)
            pieces.append((text[:cut], text[cut : cut + CLEAN_BYTES]))
            text = text[cut + CLEAN_BYTES :].lstrip()
    return pieces


def run_questions(pair, arguments) -> dict:
    questions = judge.read_questions()[: arguments.questions]
    found = {
        name: judge.judge(model, tokenizer, questions, arguments.stop_within)
        for name, (model, tokenizer) in pair.items()
    }
    for name, results in found.items():
        judge.write(results, arguments.output / f"answers_{name}.json", name)
    for name in {"blt", "teacher"} - found.keys():  # greedy answers stay as they were
        path = arguments.output / f"answers_{name}.json"
        known = json.loads(path.read_text())["answers"] if path.is_file() else []
        if [result["question"] for result in known] == [entry["question"] for entry in questions]:
            found[name] = known
    counts = {name: judge.count(results) for name, results in found.items()}
    if "teacher" in found and "blt" in found:
        known = [right for right, known in zip(found["blt"], found["teacher"]) if known["right"]]
        counts["of_the_teachers"] = sum(result["right"] for result in known) / max(len(known), 1)
    return counts


def run_speed(pair, arguments) -> dict:
    questions = [entry["question"] for entry in judge.read_questions()[: arguments.questions]]
    settings = {name: (*loaded, {}) for name, loaded in pair.items()}
    if "blt" in pair:
        settings["blt, drafts"] = (*pair["blt"], {"self_speculation_window": "auto"})
    figures = measure_speed(settings, questions, arguments.bytes, lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, tokenizer) in pair.items():
            # Reading GGUF takes more memory than the model does, so both are loaded from files in float32
            model.save_pretrained(Path(folder) / name)
            tokenizer.save_pretrained(Path(folder) / name)
            figures[name] |= measure_memory(str(Path(folder) / name), questions[0], arguments.bytes)
    return figures


def run_bits(pair, arguments) -> dict:
    figures = {}
    for kind in SOURCES:
        texts = read_held_out(arguments.held_out, kind, arguments.text_bytes)
        figures[kind] = {"bytes": sum(len(text.encode()) for text in texts)}
        figures[kind] |= {name: text_bits_per_byte(*loaded, texts) for name, loaded in pair.items()}
    path = arguments.output / "sampled_chats.json"
    questions = [entry["question"] for entry in judge.read_questions()[: arguments.questions]]
    if path.is_file():
        chats = json.loads(path.read_text())
    else:
        chats = sample_chats(*pair["teacher"], questions, arguments.sampled_tokens)
        path.write_text("[\n" + ",\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats) + "\n]\n")
    size = sum(len(chat["answer"].encode()) for chat in chats)
    figures["chat"] = {"bytes": size} | {
        name: sum(answer_bits(*loaded, **chat) for chat in chats) / size for name, loaded in pair.items()
    }
    return figures


def run_noise(pair, arguments) -> dict:
    pieces = noisy_pieces(read_held_out(arguments.held_out, "prose", 50 * arguments.text_bytes), arguments.pieces)
    size = sum(len(clean) for _, clean in pieces)
    figures = {"pieces": len(pieces), "clean_bytes": size, "in_training": arguments.noise_in_training}
    kinds = {"none": lambda text, seed: text, **NOISE}
    for name, (model, tokenizer) in pair.items():
        figures[name] = {}
        for kind, add_noise in kinds.items():
            total = 0.0
            for seed, (before, clean) in enumerate(pieces):
                context = start_ids(model, tokenizer) + text_ids(tokenizer, add_noise(before, seed))
                total += bits(model, context, text_ids(tokenizer, clean))
            value = total / size
            lost = value - figures[name]["none"]["bits_per_byte"] if kind != "none" else 0.0
            figures[name][kind] = {"bits_per_byte": value, "lost": lost}
            print(f"{name}, {kind}: {value:.3f} bits a byte, {lost:+.3f}", flush=True)
    return figures


def run_letters(pair, arguments) -> dict:
    tested, trained = letters.choose_words(arguments.words, arguments.trained_words)
    figures = {"words": len(tested), "examples": 2 * len(trained), "epochs": arguments.epochs, "lora": letters.LORA}
    figures |= {"batch": letters.BATCH, "products of fine-tuning": "bf16"}
    for name, (model, tokenizer) in pair.items():
        before = letters.count_right(model, tokenizer, tested, trained[: letters.NUM_SHOTS])
        started = time.perf_counter()
        adapted = letters.fine_tune(model, tokenizer, trained, arguments.epochs)
        seconds = time.perf_counter() - started
        after = letters.count_right(adapted, tokenizer, tested, [])
        adapted.unload()
        figures[name] = {"as_it_is": before, "fine_tuned": after, "training_seconds": seconds}
        shares = [f"{task} {before[task]['right']:.0%} -> {after[task]['right']:.0%}" for task in letters.TASKS]
        print(f"{name}: {', '.join(shares)}", flush=True)
    return figures


def keep_others(figures: dict, known: dict, names: set[str]) -> dict:
    """Returns `figures` with those of models that were left out, from the file of before."""
    kept = {name: known[name] for name in names if name in known}
    for key, value in figures.items():
        if key != "machine" and isinstance(value, dict) and isinstance(known.get(key), dict):
            kept[key] = value | {name: known[key][name] for name in names if name in known[key]}
    return {**figures, **kept}


def machine() -> dict:
    """Returns what the figures were measured with."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blt", help="folder that `blt-hf get smollm2` made")
    parser.add_argument("teacher", help="the file in GGUF, or a folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=("blt", "teacher"), default=("blt", "teacher"))
    parser.add_argument(
        "--held-out", type=Path, default=Path("corpus/heldout.jsonl"), help="of pretrain_small/corpus.py"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--noise-in-training", nargs="*", choices=[*NOISE], default=["drop", "upper", "random case"])
    parser.add_argument("--questions", type=int, default=100, help="prompts of questions, speed and chats")
    parser.add_argument("--stop-within", type=int, default=600, help="questions: bytes in which an answer is to end")
    parser.add_argument("--bytes", type=int, default=200, help="speed: bytes to write for each prompt")
    parser.add_argument("--text-bytes", type=int, default=16_000, help="bits: bytes of prose and of code")
    parser.add_argument("--sampled-tokens", type=int, default=60, help="bits: longest sampled answer")
    parser.add_argument("--pieces", type=int, default=100, help="noise: pieces of text")
    parser.add_argument("--words", type=int, default=100, help="letters: words tested")
    parser.add_argument("--trained-words", type=int, default=500, help="letters: words trained on, two examples each")
    parser.add_argument("--epochs", type=float, default=3.0, help="letters: epochs of fine-tuning")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    pair = {name: judge.load(getattr(arguments, name)) for name in arguments.models}
    runs = {
        "questions": run_questions,
        "speed": run_speed,
        "bits": run_bits,
        "noise": run_noise,
        "letters": run_letters,
    }
    for part in arguments.parts:
        path = arguments.output / f"{part}.json"
        figures = {"machine": machine(), **runs[part](pair, arguments)}
        if part in ("bits", "noise", "letters") and path.is_file():  # the weights of the other model are as they were
            figures = keep_others(figures, json.loads(path.read_text()), {"blt", "teacher"} - pair.keys())
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps({part: {key: value for key, value in figures.items() if part != "letters"}}))


if __name__ == "__main__":
    main()
