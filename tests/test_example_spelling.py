"""The spelling example: its examples are right, held-out words stay out of training, and it runs."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from blt_hf import BltTokenizer
from helpers.processes import run_example


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spelling():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import spelling
    finally:
        sys.path.pop(0)
    return spelling


@pytest.fixture(scope="module")
def words(spelling) -> list[str]:
    return spelling.find_words(list(spelling.stdlib_texts(docstrings=False)))


@pytest.fixture(scope="module")
def bpe(spelling):
    return spelling.train_bpe(["the cat sat on the mat with the hat"] * 20, 300)


def test_words_are_lowercase_and_short(spelling, words):
    assert len(words) > 2000
    assert words == sorted(set(words))
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 12 for word in words)
    text = "It's a don't-care: CamelCase, snake_case, x1, to, extraordinarily, plain words"
    assert spelling.find_words([text]) == ["care", "plain", "words"]


def test_held_out_words_are_not_trained_on(spelling, words):
    train, held_out = spelling.split_words(words, 500)
    assert len(held_out) == 500
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == words
    assert (train, held_out) == spelling.split_words(words, 500)


def test_invented_words_repeat_letters_and_leave_out_what_is_held_out(spelling):
    invented = spelling.invent_words(500, [])
    assert all(3 <= len(word) <= 12 and word.isalpha() and word.islower() for word in invented)
    assert sum(len(set(word)) < len(word) for word in invented) > 250
    assert invented == spelling.invent_words(500, [])
    taken = invented[:5]
    assert not set(taken) & set(spelling.invent_words(500, taken))


def test_prompts_and_answers(spelling):
    assert spelling.make_example("spelling", "hello") == ("Spell the word: hello ->", " h e l l o")
    prompt, answer = spelling.make_example("inverse", "hello")
    assert (prompt, answer) == ("Join the letters: h e l l o ->", " hello")


@pytest.mark.parametrize("name", ["blt", "bpe"])
def test_labels_are_the_answer_and_an_eos(spelling, bpe, name):
    tokenizer = BltTokenizer() if name == "blt" else bpe
    row = spelling.encode(tokenizer, "Spell the word: cat ->", " c a t")
    answer = [label for label in row["labels"] if label != -100]
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"][-len(answer) :] == answer
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == " c a t"
    assert tokenizer.decode(row["input_ids"][1 : -len(answer)]) == "Spell the word: cat ->"


def test_known_tokens(spelling, bpe):
    """`cat` and `hat` share their tokens with what is trained on or do not."""
    assert spelling.words_of_known_tokens(bpe, ["the", "cat"], ["the"]) == {"the"}
    assert spelling.words_of_known_tokens(bpe, ["the"], ["zoo"]) == set()


def test_models_of_the_comparison_have_the_same_size(spelling):
    blt = spelling.make_blt(False).num_parameters()
    llama = spelling.make_llama(False, spelling.PreTrainedTokenizerFast(tokenizer_object=bpe_of_size(spelling, 4000)))
    assert abs(llama.num_parameters() / blt - 1) < 0.05


def bpe_of_size(spelling, size: int):
    vocabulary = {f"t{index}": index for index in range(size)}
    return spelling.Tokenizer(spelling.models.BPE(vocab=vocabulary, merges=[]))


@pytest.mark.slow
def test_runs_from_texts_to_accuracies(tmp_path):
    printed = run_example("spelling.py", "--small", "--output-dir", tmp_path)
    report = json.loads(printed.splitlines()[-1])
    assert report["words"] > 2000 and report["held_out_words"] == 40
    assert report["steps"] > 0 and report["examples"] % report["steps"] == 0
    assert report["tokens_per_word"] > 1
    assert list(report["models"]) == ["blt", "bpe"]
    for name, result in report["models"].items():
        assert result["parameters"] > 0 and result["seconds"] > 0
        for task in ("spelling", "inverse"):
            assert 0 <= result[task] <= 1
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = AutoTokenizer.from_pretrained(tmp_path / name)("Spell the word: cat ->", return_tensors="pt")
        assert model(input_ids=ids["input_ids"]).logits.shape[1] == ids["input_ids"].shape[1]
    saved = json.loads((tmp_path / "results-blt-bpe.json").read_text())
    assert saved["models"] == report["models"]
    assert {error["task"] for error in saved["errors"]["blt"]} == {"spelling", "inverse"}
