"""Pipelines: what a batch, a stream, a file or a string of settings gives is what the model gives."""

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from helpers.recipes import BOTH, CAUSAL, TEXTS, assert_same, logits_of, make, on, tokenizer, write


PROMPTS = list(TEXTS)
LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}


def writer(kind, **kwargs):
    return pipeline("text-generation", model=make(kind), tokenizer=tokenizer, **kwargs)


SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@on(*CAUSAL)
def test_a_batch_of_prompts_is_each_alone(kind):
    write_texts = writer(kind)
    alone = [write_texts(prompt, **SETTINGS)[0]["generated_text"] for prompt in PROMPTS]
    batched = [row[0]["generated_text"] for row in write_texts(PROMPTS, batch_size=3, **SETTINGS)]
    assert batched == alone
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(alone, PROMPTS))


@on(*CAUSAL)
def test_a_pipeline_writes_what_generate_writes(kind):
    write_texts = writer(kind)
    found = write_texts(PROMPTS[0], return_tensors=True, **SETTINGS)[0]["generated_token_ids"]
    prompt = tokenizer(PROMPTS[0]).input_ids
    assert [*map(int, found)] == prompt + write(make(kind), PROMPTS[0], 6)
    new = write_texts(PROMPTS[0], return_full_text=False, **SETTINGS)[0]["generated_text"]
    assert new == tokenizer.decode(write(make(kind), PROMPTS[0], 6), skip_special_tokens=True)


@on(*CAUSAL)
def test_texts_come_from_a_data_set_or_a_generator(kind):
    write_texts = writer(kind)
    expected = [row[0]["generated_text"] for row in write_texts(PROMPTS, **SETTINGS)]
    data = KeyDataset(Dataset.from_dict({"text": PROMPTS}), "text")
    assert [row[0]["generated_text"] for row in write_texts(data, batch_size=2, **SETTINGS)] == expected
    assert [row[0]["generated_text"] for row in write_texts((prompt for prompt in PROMPTS), **SETTINGS)] == expected


@on(*CAUSAL)
def test_a_chat_goes_through_its_template(kind):
    chat = [{"role": "user", "content": "Which bytes?"}]
    found = writer(kind)(chat, **SETTINGS)[0]["generated_text"]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = make(kind).generate(**prompt, **SETTINGS)[0, prompt.input_ids.shape[1] :]
    assert found[-1] == {
        "role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)
    }  # fmt: skip


@on(*CAUSAL)
def test_settings_of_a_pipeline_are_defaults_of_its_calls(kind):
    config = GenerationConfig(
        max_new_tokens=4, do_sample=False, repetition_penalty=3.0, pad_token_id=0, eos_token_id=2
    )
    write_texts = writer(kind, generation_config=config)
    by_default = write_texts(PROMPTS[0], return_tensors=True)[0]["generated_token_ids"]
    assert [*map(int, by_default)][-4:] == write(make(kind), PROMPTS[0], 4, repetition_penalty=3.0)
    longer = write_texts(PROMPTS[0], return_tensors=True, max_new_tokens=7)[0]["generated_token_ids"]
    assert [*map(int, longer)][:-3] == [*map(int, by_default)]


@on(*CAUSAL)
def test_a_pipeline_from_a_folder(kind, tmp_path):
    """Model and tokenizer by one path, with a dtype and a device map in words."""
    model = make(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = pipeline("text-generation", model=str(tmp_path), dtype="float32", device_map="auto")
    assert type(loaded.model) is type(model) and type(loaded.tokenizer) is type(tokenizer)
    assert loaded(PROMPTS, **SETTINGS) == writer(kind)(PROMPTS, **SETTINGS)
    half = pipeline("text-generation", model=str(tmp_path), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16


@on(*BOTH)
def test_classes_of_a_text(kind):
    """Scores are the softmax of each text's own logits, in a batch as alone; all of them, or raw."""
    model = make(kind, "sequence", num_labels=3, **LABELS)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    rows = classify(PROMPTS, batch_size=3, top_k=None)
    raw = classify(PROMPTS, top_k=None, function_to_apply="none")
    for prompt, row, plain in zip(PROMPTS, rows, raw):
        logits = logits_of(model, prompt)[0]
        scores, plain = ({entry["label"]: entry["score"] for entry in one} for one in (row, plain))
        order = [LABELS["id2label"][index] for index in range(3)]
        assert_same(torch.tensor([scores[name] for name in order]), logits.softmax(-1))
        assert_same(torch.tensor([plain[name] for name in order]), logits)
    assert [one["label"] for one in classify(PROMPTS)] == [row[0]["label"] for row in rows]


@on(*BOTH)
def test_classes_of_a_pair_of_texts(kind):
    model = make(kind, "sequence", num_labels=3, **LABELS)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    found = classify({"text": PROMPTS[0], "text_pair": PROMPTS[2]}, top_k=None)
    with torch.no_grad():
        logits = model(**tokenizer(PROMPTS[0], PROMPTS[2], return_tensors="pt")).logits[0]
    assert found[0]["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


@on(*BOTH)
def test_classes_that_were_never_trained(kind):
    """Zero-shot: each label's probability of entailment."""
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    model = make(kind, "sequence", num_labels=2, **labels)
    classify = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    found = classify(PROMPTS[0], ["cats", "computers"], multi_label=True, hypothesis_template="It is about {}.")
    for label, score in zip(found["labels"], found["scores"]):
        inputs = tokenizer(PROMPTS[0], f"It is about {label}.", return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].softmax(-1)[1]
        assert score == pytest.approx(float(expected), abs=1e-5)


@on(*BOTH)
def test_classes_of_bytes(kind):
    """Entities of a text: each byte's class is that of the text alone, in a batch, and spans are where they are."""
    model = make(
        kind, "token", num_labels=3, id2label={0: "O", 1: "B-X", 2: "B-Y"}, label2id={"O": 0, "B-X": 1, "B-Y": 2}
    )
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer)
    texts = [PROMPTS[0], PROMPTS[2]]
    for text, entities in zip(texts, tag(texts, batch_size=2)):
        classes = logits_of(model, text)[0].argmax(-1)[1:]  # without the BOS
        found = {entity["start"]: entity["entity"] for entity in entities}  # all characters are of one byte
        assert found == {i: model.config.id2label[int(c)] for i, c in enumerate(classes) if c}
    assert any(tag(texts))


@on(*BOTH)
def test_features_are_states_of_the_last_layer(kind):
    model = make(kind)
    features = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer)
    for prompt, found in zip(PROMPTS, features(PROMPTS, batch_size=1)):
        with torch.no_grad():
            states = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
        assert_same(torch.tensor(found), states)


@on(*CAUSAL)
def test_a_text_that_is_too_long_is_cut_on_the_left(kind):
    """`handle_long_generation="hole"` leaves room for the answer within the tokenizer's longest text."""
    import copy

    short = copy.deepcopy(tokenizer)
    short.model_max_length = 20
    model = make(kind)
    write_texts = pipeline("text-generation", model=model, tokenizer=short)
    found = write_texts(PROMPTS[1], handle_long_generation="hole", return_tensors=True, **SETTINGS)[0][
        "generated_token_ids"
    ]
    kept = tokenizer(PROMPTS[1], return_tensors="pt").input_ids[:, -14:]
    expected = model.generate(kept, **SETTINGS)[0, -6:].tolist()
    assert [*map(int, found)][-6:] == expected
