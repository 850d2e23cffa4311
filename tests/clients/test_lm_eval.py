"""lm-evaluation-harness as its users run it: its three kinds of request, held to direct calculation."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from blt_hf import BltTokenizer
from blt_hf.cli import app
from helpers.models import make_model
from helpers.processes import run
from helpers.texts import encode


TEXTS = ["To be, or not to be: that is the question.\n", "Zażółć gęślą jaźń — 速い狐 é " * 3, "x"]
QUESTIONS = [
    ("The fox is", "quick", "lazy, brown and red"),
    ("2 + 2 =", "4", "five"),
    ("Ça va ?\nOui,", "très bien", "no"),
]
UNTIL, NEW_BYTES = ["\n", "e "], 12

TASKS = {
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    "local_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[right, wrong]}}"
doc_to_target: 0
metric_list:
  - metric: acc
""",
    "local_answers": f"""
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{right}}}}"
generation_kwargs: {{until: {json.dumps(UNTIL)}, max_gen_toks: {NEW_BYTES}, do_sample: false}}
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Nats of `continuation`, and whether greedy decoding would write it."""
    ids = torch.tensor([context + continuation])
    logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].double()
    targets = torch.tensor(continuation)
    total = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


def answer(model, prompt: list[int]) -> str:
    """Greedy text up to the first of `UNTIL`."""
    written = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_BYTES, do_sample=False)[0, len(prompt) :]
    text = BltTokenizer().decode(written, skip_special_tokens=True)
    for end in UNTIL:
        text = text.split(end)[0]
    return text


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_requests_in_process(model, batch_size):
    """With and without a BOS; a batch is padded, and its answers are those of each row alone."""
    for bos in (True, False):
        client = HFLM(pretrained=model, tokenizer=BltTokenizer(), batch_size=batch_size, add_bos_token=bos)
        pairs = [(context, " " + end) for context, *ends in QUESTIONS for end in ends]
        found = client.loglikelihood(requests("loglikelihood", [*pairs, ("", "alone")]), disable_tqdm=True)
        expected = [log_likelihood(model, encode(context, bos), encode(end, False)) for context, end in pairs]
        expected.append(log_likelihood(model, [1], encode("alone", False)))  # an empty context is a BOS in any case
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for (nats, _), (wanted, _) in zip(found, expected):
            assert nats == pytest.approx(wanted, abs=1e-4)

        rolling = client.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]))
        for nats, text in zip(rolling, TEXTS):
            # The client puts a BOS in front and scores what the tokenizer gives: its own BOS, too, unless told not to.
            wanted, _ = log_likelihood(model, [1], encode(text, bos))
            assert nats == pytest.approx(wanted, abs=1e-3)

        options = {"until": UNTIL, "max_gen_toks": NEW_BYTES, "do_sample": False}
        prompts = [question for question, *_ in QUESTIONS]
        texts = client.generate_until(requests("generate_until", [(p, dict(options)) for p in prompts]), True)
        assert texts == [answer(model, encode(prompt, bos)) for prompt in prompts]


@pytest.fixture(scope="module")
def command_line(model, tmp_path_factory) -> tuple[Path, Path]:
    """Folder of a saved model and files of tasks, and the folder that `lm_eval` wrote its results to."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model.save_pretrained(folder / "model")
    BltTokenizer().save_pretrained(folder / "model")
    rows = {
        "local_text": [{"text": text} for text in TEXTS],
        "local_choices": [{"question": q, "right": right, "wrong": wrong} for q, right, wrong in QUESTIONS],
    }
    rows["local_answers"] = rows["local_choices"]
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        )
        (folder / "tasks" / f"{name}.yaml").write_text(source + task)
    command = [
        "--model", "hf",
        "--model_args", f"pretrained={folder / 'model'},add_bos_token=False,max_length=4096",
        "--trust_remote_code",
        "--tasks", ",".join(TASKS),
        "--include_path", str(folder / "tasks"),
        "--device", "cpu",
        "--batch_size", "2",
        "--output_path", str(folder / "results"),
        "--log_samples",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "data"),
    }
    done = run(
        [sys.executable, "-m", "lm_eval", *command], capture_output=True, text=True, timeout=560, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, folder / "results"


def logged(results: Path, name: str) -> list[dict]:
    (path,) = results.rglob(f"samples_{name}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])


@pytest.mark.timeout(600)
def test_rolling_is_what_evaluate_measures(command_line, model):
    """The two commands of `docs/training.md`."""
    folder, results = command_line
    (path,) = results.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["local_text"]["bits_per_byte,none"]
    run = CliRunner().invoke(
        app, ["evaluate", str(folder / "model"), str(folder / "local_text.jsonl"), "--max-length", "4096", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert found == pytest.approx(json.loads(run.stdout)["bits_per_byte"], rel=1e-6)
    nats = sum(log_likelihood(model, [1], encode(text, False))[0] for text in TEXTS)
    assert found == pytest.approx(-nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-6)


@pytest.mark.timeout(600)
def test_choices_and_answers_on_the_command_line(command_line, model):
    _, results = command_line
    for (question, *ends), row in zip(QUESTIONS, logged(results, "local_choices")):
        for end, ((nats, greedy),) in zip(ends, row["resps"]):
            wanted = log_likelihood(model, encode(question, False), encode(" " + end, False))
            assert (float(nats), str(greedy) == "True") == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    for (question, *_), row in zip(QUESTIONS, logged(results, "local_answers")):
        assert row["resps"] == [[answer(model, encode(question, False))]]
