"""The recipe of `blt-smollm2-135m`: its texts, the measurement before training, what is kept, the curve."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import ceiling
import exercises
import letters
import marks
import overlap
import prompts
import pytest
import states
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from blt_hf.conversion.smollm2 import GGUF_FILE
from blt_hf.model.patching_blt import PatchingRule
from blt_hf.training.byteify import byteify
from blt_hf.training.learned import collect
from blt_hf.training.teacher_data import TeacherData, TeacherWriter
from blt_hf.training.token_models import TokenAlphabet
from helpers.token_models import END, make_texts, make_tokenizer


EXAMPLE = Path(ceiling.__file__).parent


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLE / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def make_llama(tokenizer, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **settings}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_what_is_learned_fits_the_budget():
    shape = {"vocab_size": 100, "hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, **shape)
    )
    config = json.loads((EXAMPLE / "config.json").read_text())
    config["decoder_config"]["lexicon_size"] = 100
    blt = byteify(llama, alphabet=TokenAlphabet([(2,)] * 100, 0), **config)
    numbers = sum(tensor.numel() for tensor in collect(blt).values())
    rank, layers, width, hidden, kv = 8, 30, 576, 1536, 192
    adapters = layers * rank * (4 * width + 2 * (width + kv) + 3 * (width + hidden))
    assert numbers + adapters <= 12_000_000


def test_texts_and_prompts_hold_no_question(tmp_path):
    question = json.loads((EXAMPLE / "questions.json").read_text())[0]["question"]
    glosses = "".join(f"word{end}, animal (noun): an animal of a kind\n" for end in "abc") * 40
    adjectives = "big (adj): large, big\n" * 40 + "run (verb): to run\n" * 40
    documents = [
        {"source": "WordNet", "text": glosses + adjectives},
        {"source": "WordNet", "text": f"Somebody asked: {question}"},
        {"source": "handbook, de", "text": "Das Paket " * 40},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    done = run("texts.py", tmp_path, tmp_path / "texts.jsonl", tmp_path / "prompts.txt")
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert texts and question not in prompts
    assert not any(overlap.held_runs(text) for text in [*texts, *prompts])
    assert not any("Paket" in text for text in texts)


def test_prompts_like_the_questions_are_none_of_them():
    words = {part: ["hot", "cold", "clever", "purple", "tall"] for part in ("noun", "verb", "adj")}
    made = prompts.make_prompts(words, ["Rome", "Seneca"], Random(0))
    asked = {entry["question"] for entry in json.loads((EXAMPLE / "questions.json").read_text())}
    assert not asked & set(made) and not any(overlap.held_runs(prompt) for prompt in made)
    assert 'What is the opposite of "clever"?' in made and 'What is the antonym of "clever"?' in made
    # Neither `hot`, of which the opposite is asked, nor the answer.
    assert not any("opposite" in prompt and ("hot" in prompt or "cold" in prompt) for prompt in made)
    assert 'Who wrote the novel "Emma"?' in made and "What is the capital of Finland?" in made


def test_rows_get_the_marks_that_the_token_model_did_not_read(tmp_path):
    tokenizer = make_tokenizer()
    llama = make_llama(tokenizer)
    alphabet, rule = TokenAlphabet.of(tokenizer, {"<|im|>": 261}, END), PatchingRule("space")
    chats = [f"<|im|>user\n{prompt}<|im|>\nthe hill sat on" for prompt in ("of the cat?", "of the mat?")]
    quoted = [chats[0].replace("the cat?", '"the cat"?'), chats[1]]
    for name, texts in (("plain", chats), ("quoted", quoted)):
        list(TeacherWriter(llama, tokenizer, alphabet, rule, tmp_path / name, early_layer=1).write(texts))
    before = [dict(row) for row in TeacherData([tmp_path / "plain"])]
    done = run(
        "prompts.py", "quote", tmp_path / "plain", write(tmp_path / "prompts.txt", 'of "the cat"?\nof a "hat"?')
    )
    assert done.stdout == "1 rows\n", done.stderr
    (first, second), expected = TeacherData([tmp_path / "plain"]), TeacherData([tmp_path / "quoted"])[0]
    assert first["input_ids"].equal(expected["input_ids"])
    assert all(first[name].equal(before[0][name]) for name in ("states", "early_states", "patch_tokens"))
    assert all(second[name].equal(before[1][name]) for name in second)
    marks = (first["input_ids"] == ord('"') + 4).nonzero()[:, 0]
    assert len(marks) == 2
    # The mark is the only target before it; behind it, the targets are those that stood before it.
    assert (first["target_ids"][marks - 1, 0] == ord('"') + 4).all() and (
        first["target_probs"][marks - 1, 0] == 1
    ).all()
    is_old = torch.ones(len(first["input_ids"]), dtype=torch.bool).index_fill(0, marks, False)
    assert first["input_ids"][is_old].equal(before[0]["input_ids"])
    is_old = torch.ones(len(first["input_ids"]), dtype=torch.bool).index_fill(0, marks - 1, False)
    assert all(first[name][is_old].equal(before[0][name]) for name in ("target_ids", "target_probs"))


def test_a_vector_for_a_word_and_its_mark_is_measured():
    tokenizer = make_tokenizer()
    model = make_llama(tokenizer, hidden_size=32, initializer_range=0.5)
    tokens = tokenizer(" the cat, sat on. zz?").input_ids
    groups = marks.group_tokens(tokenizer, tokens)
    assert [tokenizer.decode([tokens[at] for at in group]) for group in groups if len(group) > 1] == [
        " cat,", " on.", "z?"
    ]  # fmt: skip
    figures = marks.measure(model, tokenizer, [(tokens, 0)])
    assert figures.keys() == marks.MIXES.keys() and all(entry["others"] > 0 for entry in figures.values())
    plain = tokenizer(" the cat sat").input_ids
    some = marks.measure(model, tokenizer, [(tokens, 0), (plain, 0)])  # nothing is lost where there are no marks
    assert some["both"]["others"] < figures["both"]["others"] and some["both"]["itself"] == figures["both"]["itself"]


def test_states_are_read_by_the_head_of_the_token_model():
    tokenizer = make_tokenizer()
    llama = make_llama(tokenizer, hidden_size=32, initializer_range=0.5)
    config = json.loads((EXAMPLE / "config.json").read_text())
    local = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    local["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    alphabet = TokenAlphabet.of(tokenizer, {"<|im|>": 261}, END)
    lexicon = {"lexicon_size": len(tokenizer), "lexicon_top_k": 8}
    blt = byteify(
        llama, alphabet=alphabet, **{**config, "encoder_config": local, "decoder_config": {**local, **lexicon}}
    )
    entry = {"question": "the cat?", "answer": " sat on, and ran"}
    found = states.measure(blt, llama, tokenizer, [entry], alphabet)
    assert found["questions"] == 1 and found["patches"] == 4 and 0 <= found["same"] <= 4
    messages = [{"role": "user", "content": entry["question"]}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(before + entry["answer"], add_special_tokens=False).input_ids
    with torch.no_grad():
        said = llama(torch.tensor([[alphabet.end_token, *ids]])).logits[0].argmax(dim=-1)
    # Patches end behind the spaces of ` sat`, ` on`, and with the comma and the space behind ` and`.
    assert set(found["answers"][0]["token_model"]) <= set(tokenizer.convert_ids_to_tokens(said.tolist()))


def test_bits_are_split_by_what_they_are_spent_on():
    tokenizer = make_tokenizer()
    model = make_llama(tokenizer)
    alphabet = TokenAlphabet.of(tokenizer, end_token=END)
    texts = [" the cat, the hilly mat. " * 3]
    figures = ceiling.measure(model, tokenizer, alphabet, texts, ceiling.count_followers(make_texts(20, 0)))
    ids = torch.tensor([[alphabet.end_token, *tokenizer(texts[0]).input_ids]])
    with torch.no_grad():
        nats = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert figures["all"] == pytest.approx(nats / 0.6931 / len(texts[0]), rel=1e-3)
    assert figures["words"] == 15 and figures["bytes"] == len(texts[0])
    assert figures["other tokens of words"] > 0  # `hill` and `y`
    # Words of the counted texts end with spaces.
    assert figures["all, word hidden, any word's"] != figures["all"]


def test_what_is_kept_is_rounded_and_not_too_large(tmp_path):
    joint, own, kept = (tmp_path / f"{name}.safetensors" for name in ("joint", "own", "kept"))
    save_file({"a": torch.ones(3)}, joint, {"format": "pt", "stage": "joint"})
    save_file({"a": torch.full((3,), 2.0)}, own, {"format": "pt", "stage": "decoder"})
    done = run("keep.py", joint, own, "-o", kept, "--note", "sitting=1")
    assert done.returncode == 0 and "'sitting': '1'" in done.stdout and "'stage': 'decoder'" in done.stdout
    assert load_file(kept)["a"].equal(torch.full((3,), 1.5, dtype=torch.bfloat16))
    save_file({"b": torch.ones(3)}, own, {"format": "pt"})
    assert "do not hold the same tensors" in run("keep.py", joint, own, "-o", kept).stderr
    save_file({"a": torch.ones(12_000_001)}, tmp_path / "learned.safetensors", {"format": "pt"})
    done = run("keep.py", tmp_path / "learned.safetensors", "-o", kept)
    assert done.returncode == 1 and "at most 24,000,000" in done.stderr


def test_the_curve_is_drawn_from_the_logs(tmp_path):
    for name, key in (("1-encoder", "state_error"), ("2-decoder", "bits_per_byte")):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 1, key: 3 / step} for step in (1, 2)] + [{"step": 2, f"eval_{key}": 1.5}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("curve.py", tmp_path / "1-encoder", tmp_path / "2-decoder", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "curve.json").read_text())["2-decoder"][1] == {
        "step": 2, "bits_per_byte": 1.5, "eval_bits_per_byte": 1.5,
    }  # fmt: skip
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_sitting_is_a_script_that_sh_reads():
    assert subprocess.run(["sh", "-n", EXAMPLE / "train.sh"], check=False).returncode == 0


def test_a_bundle_for_a_gpu_holds_the_texts_of_a_sitting(tmp_path):
    pytest.importorskip("gguf")
    work = tmp_path / "work"
    work.mkdir()
    read = set(re.findall(r"\$work/(\w+\.txt|texts\.jsonl)", (EXAMPLE / "train.sh").read_text()))
    for name in {*read, GGUF_FILE}:
        write(work / name, name)
    script = EXAMPLE.parents[1] / "scripts/smollm2_gpu.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", script, "bundle", work, work, tmp_path / "bundle"]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PATH": path})
    assert read >= {"texts.jsonl", "prompts.txt", "questions.txt", "plain.txt"}
    assert read <= {path.name for path in (tmp_path / "bundle/2").iterdir()}


def test_exercises_are_right_and_hold_no_word_of_the_test():
    tested, trained = letters.choose_words(100, 500)
    words = exercises.choose_words(
        [f" {word}" for word in [*tested, *trained]] + [" garden", " Paris", "x"], Random(0)
    )
    assert sorted(words) == ["Paris", "garden"]
    texts = exercises.write_texts(words, 20, Random(1))
    asked = "".join(texts).count("<|im_start|>user\n")
    assert asked == "".join(texts).count("<|im_end|>\n<|im_start|>assistant\n") > 100
    for word in words:
        for seed in range(20):
            question, answer = exercises.write_exercise(word, Random(seed))
            found = [letter for letter in answer.split(":")[0] if letter.isalpha()]
            assert word in question and found in ([*word], [*reversed(word)])


def test_targets_of_exercises_are_the_bytes_that_came(tmp_path):
    ids = torch.tensor([1, 40, 41, 1, 42], dtype=torch.int16)
    shard = {
        "input_ids": ids,
        "row_ids": torch.tensor([3, 2]),
        "target_ids": torch.full((5, 8), 7, dtype=torch.int16),
        "target_probs": torch.full((5, 8), 0.125, dtype=torch.float16),
    }
    save_file(shard, tmp_path / "shard-00000.safetensors")
    assert exercises.set_targets(tmp_path) == 1
    shard = load_file(tmp_path / "shard-00000.safetensors")
    assert shard["target_ids"][:, 0].tolist() == [40, 41, 0, 42, 0] and not shard["target_ids"][:, 1:].any()
    assert shard["target_probs"].sum(dim=1).tolist() == [1, 1, 0, 1, 0]  # the last id of a row has no next one
