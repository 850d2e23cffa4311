"""Megabytes of text per second, from text to ids and back, against other tokenizers that read bytes.

Contestants: `BltTokenizer`; transformers' `ByT5Tokenizer`; and the fast tokenizer of a plain transformers with a
byte-level model without merges, which is what our own `tokenizer.json` is without our code. The texts are English, Chinese,
Russian, Arabic, Hindi, emoji and code in turns, cut in several ways: one text, documents of about 4 kB, single lines. All
that is timed is checked first against a loop in plain Python. Contestants take turns in one process; the slow ones get a
part of the text (`--slow-megabytes`), which favours them, since they slow down with size. A run's result is dropped
outside of the clock.

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


def sample_text(num_bytes: int) -> str:
    """About `num_bytes` of text in several scripts; the English and the code come with every Python."""
    import argparse
    import inspect
    import pydoc_data.topics

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


def main() -> None:
    import argparse
    import json
    import platform
    import statistics
    import subprocess
    import time

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core for each contestant
    import tokenizers
    import torch
    import transformers
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    from blt_hf.tokenization_blt import BltTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0, help="of text, for BltTokenizer")
    parser.add_argument("--slow-megabytes", type=float, default=1.0, help="of text, for the others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()

    ours = BltTokenizer()
    contestants = {
        "BltTokenizer": ours,
        "ByT5Tokenizer": ByT5Tokenizer(),
        "byte-level, tokenizers": PreTrainedTokenizerFast(
            tokenizer_object=ours.backend_tokenizer, padding_side="left", **ours.special_tokens_map
        ),
    }
    text = sample_text(int(arguments.megabytes * 1e6))
    slow_text = text.encode()[: int(min(arguments.slow_megabytes, arguments.megabytes) * 1e6)].decode(errors="ignore")
    texts = {name: text if name == "BltTokenizer" else slow_text for name in contestants}

    def lists(tokenizer, batch):
        return tokenizer(batch)

    def tensors(tokenizer, batch):
        return tokenizer(batch, padding=True, return_tensors="pt")

    # Correctness first
    sample = cut(text[:20000], "documents") + cut(text[:20000], "lines")
    for batch in sample:
        expected = [[byte + 4 for byte in row.encode()] for row in batch]
        width = 1 + max(map(len, expected))
        for name in ("BltTokenizer", "byte-level, tokenizers"):
            tokenizer = contestants[name]
            assert lists(tokenizer, batch)["input_ids"] == [[1, *row] for row in expected], name
            padded = tensors(tokenizer, batch)
            assert padded["input_ids"].tolist() == [[0] * (width - 1 - len(r)) + [1, *r] for r in expected], name
            assert padded["attention_mask"].tolist() == [
                [0] * (width - 1 - len(r)) + [1] * (1 + len(r)) for r in expected
            ]
            assert tokenizer.batch_decode(expected) == batch, name
        byt5 = contestants["ByT5Tokenizer"](batch)["input_ids"]  # id = byte + 3, and EOS where BLT has BOS
        assert byt5 == [[*(i - 1 for i in row), 1] for row in expected]

    cases = [
        (how, to, function)
        for how in ("one text", "documents", "lines")
        for to, function in (("lists", lists), ("tensors", tensors))
    ]
    rows = []
    for how, to, function in cases:
        seconds = {name: [] for name in contestants}
        work = {name: cut(texts[name], how) for name in contestants}
        megabytes = {name: sum(len(t.encode()) for batch in work[name] for t in batch) / 1e6 for name in contestants}
        for _ in range(arguments.repeats):
            for name, tokenizer in contestants.items():
                spent = 0.0
                for batch in work[name]:
                    begin = time.perf_counter()
                    result = function(tokenizer, batch)
                    spent += time.perf_counter() - begin
                    del result
                seconds[name].append(spent)
        rates = {name: [megabytes[name] / s for s in values] for name, values in seconds.items()}
        for name, values in rates.items():
            # Turns are neighbours in time: the median of their ratios is steadier than the ratio of the medians
            ratio = statistics.median(rate / other for rate, other in zip(values, rates["ByT5Tokenizer"]))
            spread = (max(values) - min(values)) / statistics.median(values)
            rows.append({"text": how, "to": to, "tokenizer": name, "mb_per_s": round(statistics.median(values), 2)})
            rows[-1] |= {
                "spread": round(spread, 2),
                "times_byt5": round(ratio, 1),
                "megabytes": round(megabytes[name], 2),
            }

    for how in ("one text", "lines"):
        name_ids = {}
        for name, tokenizer in contestants.items():
            name_ids[name] = [ids for batch in cut(texts[name], how) for ids in tokenizer(batch)["input_ids"]]
        seconds = {name: [] for name in contestants}
        for _ in range(arguments.repeats):
            for name, tokenizer in contestants.items():
                begin = time.perf_counter()
                tokenizer.batch_decode(name_ids[name])
                seconds[name].append(time.perf_counter() - begin)
        for name, values in seconds.items():
            size = sum(map(len, name_ids[name])) / 1e6
            ratio = statistics.median(
                (size / s) / (sum(map(len, name_ids["ByT5Tokenizer"])) / 1e6 / other)
                for s, other in zip(values, seconds["ByT5Tokenizer"])
            )
            row = {
                "text": how,
                "to": "text (decode)",
                "tokenizer": name,
                "mb_per_s": round(size / statistics.median(values), 2),
            }
            rows.append(row | {"spread": round((max(values) - min(values)) / statistics.median(values), 2), "times_byt5": round(ratio, 1), "megabytes": round(size, 2)})  # fmt: skip  # noqa: E501

    header = f"{'text':<11}{'to':<15}{'tokenizer':<25}{'MB/s':>9}{'spread':>8}{'x ByT5':>8}{'MB':>7}"
    print(header + "\n" + "-" * len(header))
    for row in rows:
        print(f"{row['text']:<11}{row['to']:<15}{row['tokenizer']:<25}{row['mb_per_s']:>9.2f}{row['spread']:>8.0%}{row['times_byt5']:>8.1f}{row['megabytes']:>7.2f}")  # fmt: skip  # noqa: E501
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    environment = {**vars(arguments), **versions, "python": platform.python_version(), "commit": commit.strip()}
    print(json.dumps({"benchmark": "tokenize", "rows": rows, "environment": environment}), flush=True)


if __name__ == "__main__":
    main()
