"""The hundred questions, the judge of answers, and the search for questions in training texts."""

import json
import re
import sys
from pathlib import Path

import judge
import overlap
import pytest

from helpers.processes import run


EXAMPLE = Path(judge.__file__).parent
QUESTIONS = judge.read_questions()


def test_there_are_a_hundred_questions_of_five_kinds():
    assert len({entry["question"] for entry in QUESTIONS}) == 100
    kinds = [entry["kind"] for entry in QUESTIONS]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("capital", "opposite", "animal", "arithmetic", "author"), 20
    )


@pytest.mark.parametrize("entry", QUESTIONS, ids=[entry["question"] for entry in QUESTIONS])
def test_the_given_answer_is_right_and_no_question_gives_it_away(entry):
    assert judge.is_right(entry["answer"], entry["expected"])
    assert len(entry["answer"].encode()) <= judge.MAX_BYTES
    assert not judge.is_right(entry["question"], entry["expected"])
    assert len(list(overlap.word_runs(entry["question"]))) >= 1  # long enough to be searched for


def test_sums_are_right():
    sums = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for entry in QUESTIONS:
        if entry["kind"] == "arithmetic":
            first, operation, second = re.fullmatch(r"How much is (\d) (\w+) (\d)\?", entry["question"]).groups()
            assert entry["expected"][0] == str(sums[operation](int(first), int(second)))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("The capital of France is Paris.", True),
        ("paris", True),
        ("\n\n PARIS!", True),
        ('It is "Paris".', True),
        ("It is **Paris**, of course", True),
        ("It is Lyon. Paris is near.", False),
        ("It is Lyon.\nParis", False),
        ("It is Lyon? Paris?", False),
        ("It is Parisian.", False),
        ("comParis", False),
        ("", False),
    ],
)
def test_the_word_must_stand_whole_in_the_first_sentence(answer, right):
    assert judge.is_right(answer, ["Paris"]) is right


@pytest.mark.parametrize(
    "answer",
    ["They are by J. K. Rowling.", "They are by J.K. Rowling.", "They are by Rowling, who is 3.5 times as rich."],
)
def test_the_full_stop_of_an_initial_ends_no_sentence(answer):
    assert judge.is_right(answer, ["Rowling"])


def test_one_of_several_words_is_enough():
    assert judge.is_right("It is five.", ["5", "five"])
    assert judge.is_right("2 + 3 = 5", ["5", "five"])
    assert not judge.is_right("It is 55.", ["5", "five"])


def test_an_answer_is_cut_between_characters():
    assert judge.cut("ab" * 100, 120) == "ab" * 60
    assert judge.cut("é" * 100, 121) == "é" * 60


def test_counts():
    results = [
        {"kind": "capital", "right": True, "stopped": True},
        {"kind": "capital", "right": False, "stopped": True},
        {"kind": "animal", "right": False, "stopped": False},
    ]
    assert judge.count(results) == {
        "questions": 3, "right": 1, "stopped": 2, "right_by_kind": {"capital": 1, "animal": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, held",
    [
        ("Tell me: what is the capital, of FRANCE - please", True),
        ("I think the capital of France is Paris, is it?", True),
        ("What is the capital of Mongolia?", False),
        ("The capital is Paris; it lies in France.", False),
        ("", False),
    ],
)
def test_texts_that_hold_a_question_are_found(text, held):
    assert bool(overlap.held_runs(text)) is held


def test_texts_that_hold_a_question_are_left_out(tmp_path):
    lines = [
        json.dumps("A text of no interest."),
        json.dumps({"text": "How much is 2 plus 3? Five."}),
        json.dumps({"messages": [{"role": "user", "content": "Who wrote the Harry Potter books?"}]}),
        json.dumps({"text": "Another one."}),
    ]
    (tmp_path / "texts.jsonl").write_text("".join(line + "\n" for line in lines))
    command = [sys.executable, EXAMPLE / "overlap.py", tmp_path / "texts.jsonl"]
    found = run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "entry 1: how much is 2 plus 3" in found.stdout
    assert json.loads(found.stdout.splitlines()[-1]) == {"texts": 4, "texts_that_hold_a_question": 2}
    assert run([*command, "--clean", tmp_path / "clean.jsonl"], capture_output=True).returncode == 0
    assert (tmp_path / "clean.jsonl").read_text().splitlines() == [lines[0], lines[3]]
    assert run([sys.executable, EXAMPLE / "overlap.py", tmp_path / "clean.jsonl"], capture_output=True).returncode == 0


def test_the_project_s_own_texts_hold_no_question():
    root = EXAMPLE.parents[1]
    paths = [*root.glob("examples/**/*.py"), *root.glob("docs/*.md")]
    assert overlap.compare(paths)[1] == []
