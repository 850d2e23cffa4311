# %% [markdown]
# # Noise: bytes against tokens
#
# A BLT and a Llama with a BPE tokenizer, of about one size, learn from the same text for the same number of bytes. Then
# both read text that neither has seen, as it is and with noise in it: capitals, lost letters, doubled letters. A token
# model then meets other tokens than those it has learned; a byte model meets the same bytes with a few changed.
#
# Takes about 4 minutes on two cores and downloads nothing: the text is the documentation in Python's own library.

# %%
import ast
import os
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from blt_hf import BltConfig, BltForCausalLM, BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte


SMALL = "BLT_EXAMPLE_SMALL" in os.environ  # seconds instead of minutes, to see that everything runs
ROW = 256  # bytes


def docstrings():
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(path.parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    yield ast.get_docstring(node) or ""


# The language reference and the docstrings of the standard library, a tenth of them held out.
texts = sorted({text for text in (*topics.values(), *docstrings()) if len(text) > 300})
random.Random(0).shuffle(texts)
held_out, learned = texts[: len(texts) // 10], texts[len(texts) // 10 :]
held_out = [text[:1000] for text in held_out][: 1 if SMALL else 100]
learned = learned[:50] if SMALL else learned

# %% [markdown]
# Two models. Patches of the BLT are words (`patching_mode="space"`), so it needs no entropy model:

# %%
set_seed(0)
local = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 176, "hidden_size_global": 64}
config = BltConfig(
    patching_mode="space",
    patch_in_forward=False,
    encoder_config={**local, "num_hidden_layers": 1},
    decoder_config={**local, "num_hidden_layers": 2},
    global_config={**local, "num_hidden_layers": 3},
    encoder_hash_byte_group_size=[3, 4],
    encoder_hash_byte_group_vocab=1000,
    local_attention_window_len=128,
)
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator(learned, vocab_size=2048, special_tokens=["<s>", "</s>"], show_progress=False)
bpe = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 2}
llama = LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **shape))
models = {"BLT": (BltForCausalLM(config), BltTokenizer()), "Llama with BPE": (llama, bpe)}

schedule = {"max_steps": 2 if SMALL else 500, "warmup_steps": 30, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"}
other = {"per_device_train_batch_size": 8, "weight_decay": 0.1, "save_strategy": "no", "report_to": "none"}
windows = {}
for name, (model, tokenizer) in models.items():
    ids = tokenizer(tokenizer.eos_token.join(learned), add_special_tokens=False).input_ids
    windows[name] = size = ROW * len(ids) // sum(len(text.encode()) + 1 for text in learned)  # as many bytes for both
    print(f"{name}: {model.num_parameters() / 1e6:.2f} million weights, {ROW / size:.2f} bytes an id")
    rows = [[tokenizer.bos_token_id, *ids[start : start + size]] for start in range(0, len(ids) - size, size)]
    rows = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, TrainingArguments("noise-output", **schedule, **other), train_dataset=rows).train()

# %% [markdown]
# Bits that each model needs for a byte of the noisy text; in brackets, what the noise adds. Noise that is drawn by
# chance costs every model something, for nobody can foresee it. Capitals throughout are no news after the first word,
# so what they cost is the model's own weakness.

# %%
chance = random.Random(0)


def some(share, change):
    """A function that changes a share of the letters of a text."""
    return lambda text: "".join(change(c) if c.isalpha() and chance.random() < share else c for c in text)


NOISE = {
    "as it is": str,
    "CAPITALS": str.upper,
    "raNdom CaPitals": some(0.3, str.swapcase),
    "lost lettrs": some(0.1, lambda c: ""),
    "doubbled letters": some(0.1, lambda c: c + c),
    "wrokg letters": some(0.1, lambda c: chance.choice("abcdefghijklmnopqrstuvwxyz")),
}
bits = {name: [] for name in models}
for kind, add_noise in NOISE.items():
    noisy = [add_noise(text) for text in held_out]
    for name, (model, tokenizer) in models.items():
        measured = measure_bits_per_byte(model.eval(), noisy, tokenizer, max_length=windows[name])
        bits[name].append(measured.bits_per_byte)
    found = (f"{name} {values[-1]:.2f} ({values[-1] - values[0]:+.2f})" for name, values in bits.items())
    print(f"{kind:18}", ", ".join(found))

for offset, (name, values) in enumerate(bits.items()):
    plt.bar([index + 0.4 * offset for index in range(len(NOISE))], values, width=0.38, label=name)
plt.xticks([index + 0.2 for index in range(len(NOISE))], NOISE, rotation=20)
plt.ylabel("bits per byte")
plt.legend()
plt.savefig("noise.png", bbox_inches="tight")
