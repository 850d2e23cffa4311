# %% [markdown]
# # Classification: which language is this?
#
# `AutoModelForSequenceClassification` puts a head on a BLT, and `Trainer` fine-tunes it. The small BLT that comes with
# this project learns to tell 19 languages apart, from snippets of 10 to 80 characters: bytes need no tokenizer that
# favours some scripts. Beside it stands the classic for this task, counts of three bytes in a row.
#
# Takes about 6 minutes on two cores. The text is Debian's installation guide (`apt-get download`, 18 MB); without apt,
# name a folder that holds a folder of `ch*.html` for each language in `BLT_EXAMPLE_TEXTS`.

# %%
import math
import os
import random
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)


SMALL = "BLT_EXAMPLE_SMALL" in os.environ  # seconds instead of minutes, to see that everything runs
ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pretrained").is_dir())
LENGTHS = (10, 20, 40, 80)  # characters of a snippet

# %% [markdown]
# The same pages are held out in every language, so no held-out sentence was seen in translation.


# %%
def fetch() -> Path:
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["apt-get", "download", "installation-guide-amd64"], cwd=folder, check=True)
    subprocess.run(["dpkg-deb", "-x", *folder.glob("*.deb"), folder], check=True)
    return folder / "usr/share/doc/installation-guide-amd64"


def snippets(page: Path, count: int) -> list[str]:
    """Pieces of the page's prose, each from the beginning of a word."""
    text = re.sub(r"<(head|pre|table|code|span|a)\b.*?</\1>|<[^>]+>|&\w+;", " ", page.read_text(), flags=re.S)
    text = " ".join(text.split())
    starts = [match.start() for match in re.finditer(r"\b\w", text[: -max(LENGTHS)])]
    return [text[start:][: chance.choice(LENGTHS)] for start in chance.sample(starts, min(count, len(starts)))]


chance = random.Random(0)
guide = Path(os.environ["BLT_EXAMPLE_TEXTS"]) if "BLT_EXAMPLE_TEXTS" in os.environ else fetch()
languages = sorted(folder.name for folder in guide.iterdir() if folder.is_dir())
learned, held_out = [], []
for label, language in enumerate(languages):
    for number, page in enumerate(sorted((guide / language).glob("ch*.html"))):
        part, count = (held_out, 8) if number % 5 == 4 else (learned, 40)
        part += [(snippet, label) for snippet in snippets(page, count)]
print(f"{len(languages)} languages, {len(learned):,} snippets to learn from, {len(held_out):,} held out")

# %%
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/blt-5m")
model = AutoModelForSequenceClassification.from_pretrained(ROOT / "pretrained/blt-5m", num_labels=len(languages))
schedule = {"max_steps": 2 if SMALL else 150, "warmup_steps": 20, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
other = {"per_device_train_batch_size": 32, "logging_steps": 25, "save_strategy": "no", "report_to": "none"}
settings = TrainingArguments("language-output", **schedule, **other)
rows = [{"input_ids": tokenizer(text).input_ids, "labels": label} for text, label in learned]
Trainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()

# %% [markdown]
# Naive Bayes on counts: a snippet belongs to the language whose texts would most likely hold its triples of bytes.


# %%
def triples(text: str) -> Counter:
    data = text.encode()
    return Counter(data[index : index + 3] for index in range(len(data) - 2))


counts = [sum((triples(text) for text, own in learned if own == label), Counter()) for label in range(len(languages))]
totals = [sum(count.values()) + 0.5 * 2**16 for count in counts]


def by_counts(text: str) -> int:
    def score(label: int) -> float:
        return sum(n * math.log((counts[label][t] + 0.5) / totals[label]) for t, n in triples(text).items())

    return max(range(len(languages)), key=score)


@torch.no_grad()
def by_blt(texts: list[str]) -> list[int]:
    batches = (texts[start : start + 64] for start in range(0, len(texts), 64))
    inputs = (tokenizer(batch, padding=True, return_tensors="pt") for batch in batches)
    return [label for batch in inputs for label in model(**batch).logits.argmax(-1).tolist()]


model.eval()
guesses = {"BLT": by_blt([text for text, _ in held_out]), "counts": [by_counts(text) for text, _ in held_out]}
shown = {name: [] for name in guesses}
print("characters  " + "  ".join(guesses))
for length in LENGTHS:
    chosen = [index for index, (text, _) in enumerate(held_out) if len(text) == length]
    for name, guess in guesses.items():
        shown[name].append(sum(guess[index] == held_out[index][1] for index in chosen) / len(chosen))
    print(f"{length:10}  " + "  ".join(f"{accuracy[-1]:.1%}" for accuracy in shown.values()))
wrong = Counter((languages[own], languages[g]) for (_, own), g in zip(held_out, guesses["BLT"]) if own != g)
print("most often taken for another:", ", ".join(f"{a} for {b} ({n})" for (a, b), n in wrong.most_common(5)))
for name, accuracies in shown.items():
    plt.plot(LENGTHS, accuracies, marker="o", label=name)
plt.xlabel("characters of the snippet")
plt.ylabel("right language")
plt.legend()
plt.savefig("language.png", bbox_inches="tight")
