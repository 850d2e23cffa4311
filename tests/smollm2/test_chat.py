"""Chats with the folder that is put together: the template's text, the patches of special tokens, and every client."""

import importlib.util
import json
from pathlib import Path

import openai
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from blt_hf.conversion.smollm2 import make_chat_tokenizer
from helpers.cli import run
from helpers.clients import ANSWERS, ask, learn_by_heart, served


CHATS = {
    "question": [{"role": "user", "content": "What is it?"}],
    "system": [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Ünïcode\n\nand breaks "}],
    "turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
}
END = 262
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chatter(folder, tmp_path_factory) -> Path:
    """The folder after a little training, so that its answers are known; saved as any model is."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.enable_grad():
        learn_by_heart(model, tokenizer)
    out = tmp_path_factory.mktemp("chatter") / "blt"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("waits", [False, True])
def test_the_template_s_text_is_smollm2_s_after_a_start(folder, teacher_folder, chat, waits):
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(teacher_folder)
    text = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=waits)
    assert text == "<s>" + teacher.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=waits)


def test_the_template_makes_the_same_ids_in_a_plain_transformers(folder):
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    for chat in CHATS.values():
        ids = make_chat_tokenizer().apply_chat_template(chat, return_dict=True)["input_ids"]
        assert plain.apply_chat_template(chat, return_dict=True)["input_ids"] == ids
        assert ids[:2] == [1, 261] and ids.count(1) == 1 and ids.count(END) == ids.count(261)


def test_content_may_come_in_parts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}]
    whole, split = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHATS["question"], parts))
    assert whole == split


def test_answers_and_their_ends_are_what_an_assistant_s_mask_marks(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marked = tokenizer.apply_chat_template(CHATS["turns"], return_assistant_tokens_mask=True, return_dict=True)
    ids = [index for index, mark in zip(marked["input_ids"], marked["assistant_masks"]) if mark]
    assert tokenizer.decode(ids) == "Two.<|im_end|>"


def test_patches_of_special_tokens(folder):
    """A special token ends a patch. It joins a word that is not over; a break after one joins what follows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "<s><|im_start|>user\nWhat France?<|im_end|>\nIn France<|im_end|>\n<|im_start|>assistant\nYes"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    lengths = model(ids, output_patches=True).patch_lengths[0].tolist()
    lengths[-1] -= 1  # the reference counts the next byte, which belongs to no other patch yet
    pieces = [tokenizer.decode(piece) for piece in ids[0].split(lengths)]
    assert pieces == [
        "<s>", "<|im_start|>", "user\n", "What ", "France?", "<|im_end|>", "\nIn ", "France<|im_end|>", "\n<|im_start|>",
        "assistant\n", "Yes",
    ]  # fmt: skip


def test_generation_stops_at_the_end_of_a_turn(chatter):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chatter), AutoTokenizer.from_pretrained(chatter)
    for question, answer in ANSWERS.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for options in ({}, {"self_speculation_window": 4}):
            ids = model.generate(**inputs, max_new_tokens=60, do_sample=False, **options)[0]
            new = ids[inputs["input_ids"].shape[1] :]
            assert tokenizer.decode(new) == f"{answer}<|im_end|>"


def test_pipeline(chatter):
    chat = pipeline("text-generation", model=str(chatter))
    messages = [{"role": "user", "content": "greet"}]
    written = chat(messages, max_new_tokens=60, do_sample=False)[0]["generated_text"]
    assert written == [*messages, {"role": "assistant", "content": ANSWERS["greet"]}]


def test_command_line(chatter):
    printed = run("generate", "--chat", "--model", chatter, stdin="greet\n/reset\ncount\n/quit\n")
    assert printed.splitlines() == [ANSWERS["greet"], ANSWERS["count"]]


def test_transformers_serve(chatter, tmp_path):
    with served(tmp_path, model=str(chatter)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=100)
        answer = ask(client, "greet", model=str(chatter))
        assert answer.choices[0].message.content == ANSWERS["greet"]
        assert answer.choices[0].finish_reason == "stop"
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in ask(client, "count", model=str(chatter), stream=True)
        ]
        assert "".join(pieces) == ANSWERS["count"]


def test_lora(chatter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chatter)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(chatter)
    ids = tokenizer.apply_chat_template(CHATS["turns"], return_tensors="pt", return_dict=True)["input_ids"]
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits)


def test_page(chatter):
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "examples" / "space" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert "patches" in app.show_patches(str(chatter), "What is it?", None)
    *_, (shown, told) = app.write(str(chatter), "greet", 10, 4, 0, 0, True)
    assert "**10** bytes in" in told or "bytes in" in told and shown


def test_architecture_is_the_package_s(chatter):
    assert json.loads((chatter / "config.json").read_text())["eos_token_id"] == [2, 262]
