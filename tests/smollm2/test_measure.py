"""The pair's measurements: the noise, the bits, and all parts at once on tiny models."""

import argparse
import json
import math
import sys
from pathlib import Path

import judge
import letters
import measure
import noise
import pytest
import scoring
import speed
import torch

from blt_hf.evaluation import measure_bits_per_byte
from helpers.processes import run


EXAMPLE = Path(judge.__file__).parent
TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so. " * 40


@pytest.fixture(scope="module")
def pair(folder, teacher_folder):
    return {"blt": judge.load(str(folder)), "teacher": judge.load(str(teacher_folder))}


def test_noise_is_the_paper_s_and_the_same_for_a_seed():
    assert set(noise.NOISE) == {"drop", "repeat", "upper", "random case", "antspeak"}
    for add_noise in noise.NOISE.values():
        assert add_noise(TEXT, 3) == add_noise(TEXT, 3) != TEXT
    assert noise.upper("a b") == "A B" and noise.antspeak("ab c") == "A B   C "
    assert noise.random_case(TEXT, 1).lower() == TEXT.lower()
    capitals = sum(char.isupper() for char in noise.random_case(TEXT, 1)) / sum(char.isalpha() for char in TEXT)
    assert 0.45 < capitals < 0.55
    assert 0.88 < len(noise.drop(TEXT, 1)) / len(TEXT) < 0.92
    assert 1.3 < len(noise.repeat(TEXT, 1)) / len(TEXT) < 1.5  # a fifth becomes three characters on average


def test_bits_are_those_of_the_package(pair):
    model, tokenizer = pair["blt"]
    texts = [TEXT[:200], TEXT[50:300]]
    found = scoring.text_bits_per_byte(model, tokenizer, texts)
    assert found == pytest.approx(measure_bits_per_byte(model, texts).bits_per_byte, rel=1e-5)
    model, tokenizer = pair["teacher"]
    tokenizer.bos_token = "<|endoftext|>"  # what a text of SmolLM2's begins after
    assert scoring.text_bits_per_byte(model, tokenizer, texts) == pytest.approx(
        measure_bits_per_byte(model, texts, tokenizer).bits_per_byte, rel=1e-5
    )
    tokenizer.bos_token = "<|im_start|>"


@pytest.mark.parametrize("name", ["blt", "teacher"])
def test_bits_of_an_answer_are_those_of_its_ids_and_of_its_end(pair, name):
    model, tokenizer = pair[name]
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = ids[:, : -len(after)]
    start = len(scoring.prompt_ids(tokenizer, "What?"))
    with torch.no_grad():
        chances = model(ids).logits[0].float().log_softmax(-1)
    nats = -sum(chances[index - 1, ids[0, index]] for index in range(start, ids.shape[1]))
    found = scoring.answer_bits(model, tokenizer, "What?", "That.", ended=True)
    assert found == pytest.approx(nats.item() / math.log(2), rel=1e-4)
    assert scoring.answer_bits(model, tokenizer, "What?", "That.", ended=False) < found


def test_sampled_answers_are_text_and_the_same_each_time(pair):
    questions = [entry["question"] for entry in judge.read_questions()[:16]]
    chats = measure.sample_chats(*pair["teacher"], questions, 8)
    assert chats == measure.sample_chats(*pair["teacher"], questions, 8)
    assert 3 < len(chats) <= 16 and len({chat["answer"] for chat in chats}) > 3
    assert all(chat["answer"] and "\ufffd" not in chat["answer"] for chat in chats)


def test_the_judge_samples_the_same_answers_each_time(pair):
    questions = judge.read_questions()[:3]
    greedy = judge.judge(*pair["blt"], questions, 30)
    sampled = judge.judge(*pair["blt"], questions, 30, temperature=2.0)
    assert sampled == judge.judge(*pair["blt"], questions, 30, temperature=2.0) != greedy


def test_memory_is_that_of_the_measured_process_alone(folder):
    """A process that starts it may be larger."""
    ballast = torch.ones(300, 2**20)  # 1.2 GB
    found = speed.measure_memory(str(folder), "What?", 4)
    assert found["peak_mb"] < ballast.nbytes / 2**20
    assert found["weights_mb"] < 1


def test_words_to_spell_are_not_those_trained_on():
    tested, trained = letters.choose_words(100, 500)
    assert len({*tested, *trained}) == 600
    assert letters.TASKS["spelling"]("cat") == ("Spell the word: cat ->", " c a t")
    assert letters.TASKS["reversal"]("cat") == ("Reverse the word: cat ->", " tac")


def test_answers_of_the_other_model_are_read(pair, tmp_path):
    settings = argparse.Namespace(questions=2, stop_within=8, output=tmp_path)
    both = measure.run_questions(pair, settings)
    assert measure.run_questions({"blt": pair["blt"]}, settings) == both and "teacher" in both
    settings.questions = 1  # other questions
    assert "teacher" not in measure.run_questions({"blt": pair["blt"]}, settings)


def test_figures_of_the_other_model_are_kept():
    known = {"machine": {"date": "a"}, "prose": {"bytes": 3, "blt": 2.0, "teacher": 1.0}, "teacher": {"none": 0.5}}
    new = {"machine": {"date": "b"}, "prose": {"bytes": 3, "blt": 1.5}, "blt": {"none": 0.7}}
    assert measure.keep_others(new, known, {"teacher"}) == {
        "machine": {"date": "b"}, "prose": {"bytes": 3, "blt": 1.5, "teacher": 1.0}, "blt": {"none": 0.7},
        "teacher": {"none": 0.5},
    }  # fmt: skip
    assert measure.keep_others(new, known, set()) == new


def test_everything_at_once(folder, teacher_folder, tmp_path):
    documents = [("WordNet", TEXT), ("Jargon File", TEXT[30:]), ("Python code", "def f(x):\n    return x\n" * 40)]
    lines = [json.dumps({"source": source, "text": text}) + "\n" for source, text in documents]
    (tmp_path / "heldout.jsonl").write_text("".join(lines))
    # Of the random model's own answers most begin with half a character
    chats = [{"question": "What is it?", "answer": "It is a cat.", "ended": True}]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "sampled_chats.json").write_text(json.dumps(chats))
    small = {
        "--questions": 2, "--stop-within": 10, "--bytes": 12, "--text-bytes": 400, "--sampled-tokens": 8, "--pieces": 2,
        "--words": 2, "--trained-words": 4, "--epochs": 1,
    }  # fmt: skip
    options = [str(part) for option in small.items() for part in option]
    paths = ["--held-out", tmp_path / "heldout.jsonl", "--output", tmp_path / "results"]
    done = run(
        [sys.executable, EXAMPLE / "measure.py", folder, teacher_folder, *options, *paths],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert set(found) == {
        "questions", "answers_blt", "answers_teacher", "speed", "bits", "sampled_chats", "noise", "letters",
    }  # fmt: skip
    assert found["questions"]["blt"]["questions"] == 2 and 0 <= found["questions"]["of_the_teachers"] <= 1
    for name in ("blt", "blt, drafts", "teacher"):
        assert found["speed"][name]["bytes"] >= 24 and found["speed"][name]["bytes_per_second"] > 0
    assert found["speed"]["blt"]["peak_mb"] > found["speed"]["blt"]["weights_mb"] > 0
    for kind in ("prose", "code", "chat"):
        assert found["bits"][kind]["blt"] > 0 and found["bits"][kind]["teacher"] > 0
    assert found["noise"]["pieces"] == 2 and found["noise"]["clean_bytes"] == 128
    assert found["noise"]["blt"]["none"]["lost"] == 0 and set(found["noise"]["blt"]) == {"none", *noise.NOISE}
    assert set(found["letters"]["blt"]) == {"as_it_is", "fine_tuned", "training_seconds"}
    assert (
        found["letters"]["examples"] == 8
        and len(found["letters"]["teacher"]["fine_tuned"]["spelling"]["answers"]) == 2
    )

    card = tmp_path / "card.md"
    card.write_text((EXAMPLE / "card.md").read_text())
    run([sys.executable, EXAMPLE / "report.py", "--results", tmp_path / "results", "--card", card], check=True)
    written = card.read_text()
    for text in (
        "| answered rightly |", "| BLT, with drafts |", "| prose | ", "| upper, used in training |", "| antspeak |",
        "| spelling, fine-tuned on 8 examples |", "both models in float32", "## Limits",
    ):  # fmt: skip
        assert text in written, text
