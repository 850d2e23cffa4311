# %% [markdown]
# # Chat: fine-tune on conversations with TRL
#
# `SFTTrainer` teaches the small BLT that comes with this project to answer in conversations of two turns. Nothing here
# is written for a BLT but the import that makes the Auto classes know it: TRL takes the chat template from the
# tokenizer, and with `assistant_only_loss=True` the answers alone are learned.
#
# Takes about 5 minutes on two cores and downloads nothing.

# %%
import os
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed
from trl import SFTConfig, SFTTrainer

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)


SMALL = "BLT_EXAMPLE_SMALL" in os.environ  # seconds instead of minutes, to see that everything runs
ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pretrained").is_dir())

# %% [markdown]
# Words of Python's documentation, a tenth of them held out. The questions need letters, which bytes have:

# %%
words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", " ".join(topics.values()))))
random.Random(0).shuffle(words)
held_out, learned = words[: len(words) // 10], words[len(words) // 10 :]


def conversation(word: str) -> list[dict]:
    return [
        {"role": "user", "content": f"Write {word} in capitals."},
        {"role": "assistant", "content": word.upper()},
        {"role": "user", "content": "And letter by letter?"},
        {"role": "assistant", "content": " ".join(word)},
    ]


tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/blt-5m")
print(tokenizer.apply_chat_template(conversation("bread"), tokenize=False))

# %%
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(ROOT / "pretrained/blt-5m")
settings = SFTConfig(
    "chat-output",
    assistant_only_loss=True,
    max_steps=2 if SMALL else 300,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=30,
    logging_steps=50,
    gradient_checkpointing=False,
    bf16=False,
    save_strategy="no",
    report_to="none",
)
data = Dataset.from_list([{"messages": conversation(word)} for word in learned])
SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer).train()

# %% [markdown]
# Words that it has not seen. The second question is asked after the right answer to the first:

# %%
chat = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
tested = held_out[: 2 if SMALL else 50]
for turn, name in ((1, "capitals"), (3, "letters")):
    right = 0
    for word in tested:
        asked, expected = conversation(word)[:turn], conversation(word)[turn]["content"]
        answer = chat(asked, max_new_tokens=20, do_sample=False)[0]["generated_text"][-1]["content"]
        right += answer == expected
        if word in tested[:5]:
            print(f"{asked[-1]['content']} {answer}")
    print(f"{name}: {right} of {len(tested)} right")
