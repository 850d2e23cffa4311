"""Megabytes of text per second, from text to ids and back, against other tokenizers that read bytes.

Contestants: `BltTokenizer`; transformers' `ByT5Tokenizer`; and what a plain transformers makes of our `tokenizer.json`, a
byte-level model without merges in the `tokenizers` library. The text is English, code, Chinese, Russian, Arabic, Hindi
and emoji in turns, cut in three ways: one text, batches of 64 documents of 2500 characters, batches of 1000 lines.
Outputs are checked first against plain Python. Contestants take turns in one process; the slow ones get a part of the
text (`--slow-megabytes`), which favours them, since they slow down with size. A result is dropped outside of the clock.

    python benchmarks/tokenize.py --megabytes 10 --repeats 5
"""

import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ != "__main__":
    # Another script of this folder is running, and something imports the `tokenize` of the standard library
    from importlib.machinery import SourceFileLoader
    from types import ModuleType

    standard = ModuleType("tokenize")
    standard.__file__ = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    sys.modules["tokenize"] = standard
    SourceFileLoader("tokenize", standard.__file__).exec_module(standard)
else:
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core for each contestant

    import argparse
    import inspect
    import json
    import platform
    import pydoc_data.topics
    import statistics
    import subprocess
    import time

    import tokenizers
    import torch
    import transformers
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    from blt_hf import BltTokenizer

OURS, BYT5, BACKEND = "BltTokenizer", "ByT5Tokenizer", "our tokenizer.json"


def sample_text(num_bytes: int) -> str:
    """About `num_bytes` of text in several scripts; the English and the code come with every Python."""
    pieces = {
        "English": "\n".join(pydoc_data.topics.topics.values()),
        "code": inspect.getsource(argparse),
        "Chinese": "道可道，非常道；名可名，非常名。无名天地之始，有名万物之母。学而时习之，不亦说乎？\n",
        "Russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n",
        "Arabic": "كان يا ما كان، في قديم الزمان، وسالف العصر والأوان، ملك عظيم الشأن.\n",
        "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n",
        "emoji": "🚀 to the moon 🌕👩‍🚀, café crème naïve — déjà vu 🎉\n",
    }
    parts, size, turn = [], 0, 0
    while size < num_bytes:
        for text in pieces.values():
            text = text * (1 + 1500 // len(text))
            start = turn * 1500 % (len(text) - 1400)
            parts.append(text[start : start + 1500])
            size += len(parts[-1].encode())
        turn += 1
    return "".join(parts).encode()[:num_bytes].decode(errors="ignore")


def cut(text: str, how: str) -> list[list[str]]:
    """Batches of texts."""
    if how == "one text":
        return [[text]]
    texts = [line for line in text.split("\n") if line] if how == "lines" else []
    texts = texts or [text[start : start + 2500] for start in range(0, len(text), 2500)]
    size = 1000 if how == "lines" else 64
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def check(contestants: dict, text: str) -> None:
    """No timing from a wrong result."""
    for batch in cut(text, "documents") + cut(text, "lines"):
        rows = [[byte + 4 for byte in row.encode()] for row in batch]
        width = 1 + max(map(len, rows))
        padded_ids = [[0] * (width - 1 - len(row)) + [1, *row] for row in rows]
        padded_mask = [[0] * (width - 1 - len(row)) + [1] * (1 + len(row)) for row in rows]
        for name in (OURS, BACKEND):
            tokenizer = contestants[name]
            tensors = tokenizer(batch, padding=True, return_tensors="pt")
            if (
                tokenizer(batch)["input_ids"] != [[1, *row] for row in rows]
                or tensors["input_ids"].tolist() != padded_ids
                or tensors["attention_mask"].tolist() != padded_mask
                or tokenizer.batch_decode(rows) != batch
            ):
                raise SystemExit(f"{name} does not do what plain Python does: no timing from a wrong result")
        if contestants[BYT5](batch)["input_ids"] != [[*(index - 1 for index in row), 1] for row in rows]:
            raise SystemExit(f"{BYT5} is not id = byte + 3 and EOS: no comparison")


def race(contestants: dict, work: dict, function, repeats: int, clock) -> list[dict]:
    """Runs `function(tokenizer, batch)` over each one's batches, in turns; `work` maps to `(batches, megabytes)`."""
    rates = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, tokenizer in contestants.items():
            batches, megabytes = work[name]
            function(tokenizer, batches[0])  # pages that the one before gave back are slow on the first touch
            spent = 0.0
            for batch in batches:
                begin = clock()
                result = function(tokenizer, batch)
                spent += clock() - begin
                del result
            rates[name].append(megabytes / spent)
    rows = []
    for name, values in rates.items():
        median = statistics.median(values)
        # Turns are neighbours in time: the median of their ratios is steadier than the ratio of the medians
        ratio = statistics.median(rate / other for rate, other in zip(values, rates[BYT5]))
        spread = (max(values) - min(values)) / median
        row = {"tokenizer": name, "mb_per_s": round(median, 2), "spread": round(spread, 2)}
        rows.append(row | {"times_byt5": round(ratio, 1), "megabytes": round(work[name][1], 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0, help="of text, for BltTokenizer")
    parser.add_argument("--slow-megabytes", type=float, default=1.0, help="of text, for the others")
    parser.add_argument(
        "--to", nargs="+", choices=["lists", "tensors", "decoded"], default=["lists", "tensors", "decoded"]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu where the machine has other work"
    )
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()

    ours = BltTokenizer()
    backend = PreTrainedTokenizerFast(
        tokenizer_object=ours.backend_tokenizer, padding_side="left", **ours.special_tokens_map
    )
    contestants = {OURS: ours, BYT5: ByT5Tokenizer(), BACKEND: backend}
    text = sample_text(int(arguments.megabytes * 1e6))
    slow_text = text.encode()[: int(min(arguments.slow_megabytes, arguments.megabytes) * 1e6)].decode(errors="ignore")
    check(contestants, text[:20000])

    def size(texts: list[str]) -> float:
        return sum(len(text.encode()) for text in texts) / 1e6

    rows = []
    functions = {
        "lists": lambda tokenizer, batch: tokenizer(batch),
        "tensors": lambda tokenizer, batch: tokenizer(batch, padding=True, return_tensors="pt"),
        "decoded": lambda tokenizer, batch: tokenizer.batch_decode(batch),
    }
    for how in ("one text", "documents", "lines"):
        for what in arguments.to:
            function, work = functions[what], {}
            for name, tokenizer in contestants.items():
                batches = cut(text if name == OURS else slow_text, how)
                megabytes = sum(map(size, batches))
                if what == "decoded":
                    batches = [tokenizer(batch)["input_ids"] for batch in batches]
                work[name] = (batches, megabytes)
            results = race(contestants, work, function, arguments.repeats, clock)
            rows += [{"text": how, "to": what, **result} for result in results]

    columns = {"text": 11, "to": 9, "tokenizer": 25, "mb_per_s": 10, "spread": 8, "times_byt5": 12, "megabytes": 11}
    align = {name: "<" if name in ("text", "to", "tokenizer") else ">" for name in columns}
    print("".join(f"{name:{align[name]}{width}}" for name, width in columns.items()))
    for row in rows:
        cells = {name: str(value) for name, value in row.items()} | {"spread": f"{row['spread']:.0%}"}
        print("".join(f"{cells[name]:{align[name]}{width}}" for name, width in columns.items()))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    environment = {**vars(arguments), **versions, "python": platform.python_version(), "commit": commit.strip()}
    print(json.dumps({"benchmark": "tokenize", "rows": rows, "environment": environment}), flush=True)


if __name__ == "__main__":
    main()
