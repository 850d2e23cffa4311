"""Patches of a corpus in shards: the rows are those of one process, whoever was stopped where."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from blt_hf.model.patching_blt import PatchingRule
from blt_hf.training.corpus import write_patches
from blt_hf.training.data import BltDataCollator, stream_texts
from helpers.cli import run
from helpers.models import make_model, tiny_config


@pytest.fixture(scope="module")
def model():
    return make_model(tiny_config())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """23 texts in five files, in two forms."""
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)

    def text() -> str:
        return "".join(generator.choices("abc dé\n速 ", k=generator.randrange(1, 150)))

    (folder / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt", "z.txt"):
        (folder / name).write_text(text())
    for name in ("lines.jsonl", "deep/more.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text()}) + "\n" for _ in range(10)))
    return folder


def rows_of(folder: Path, shard: str = "*") -> list[tuple]:
    files = sorted(str(path) for path in folder.glob(f"patches-{shard}-of-*.parquet"))
    if not files:
        return []
    table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return [(row["input_ids"], row["patch_lengths"]) for row in table]


@torch.no_grad()
def test_rows_hold_the_texts_and_the_patches_of_the_model(model, corpus, tmp_path):
    done = write_patches(model, [corpus], tmp_path, context=64, rows_per_file=5)
    rows = rows_of(tmp_path)
    assert (done.num_texts, done.num_rows, done.num_files) == (23, len(rows), -(-len(rows) // 5))
    assert done.num_bytes == sum(len(ids) for ids, _ in rows) == done.num_new_bytes
    ids = [i for row, _ in rows for i in row[1:]]
    assert all(row[0] == 1 for row, _ in rows)
    assert bytes(i - 4 if i != 2 else 0 for i in ids) == b"".join(t + b"\0" for t in stream_texts([corpus]))
    for row, lengths in rows[::7]:
        found = model(torch.tensor([row]), output_patches=True).patch_lengths
        assert [n for n in found[0].tolist() if n] == lengths
    batch = BltDataCollator()([{"input_ids": row, "patch_lengths": lengths} for row, lengths in rows[:4]])
    assert model(**batch).loss > 0


def test_shards_share_the_texts_out(model, corpus, tmp_path):
    summaries = [write_patches(model, [corpus], tmp_path, (i, 4), context=64) for i in range(4)]
    assert [s.num_texts for s in summaries] == [6, 6, 6, 5]
    texts = list(stream_texts([corpus]))
    for index in range(4):
        ids = [i for row, _ in rows_of(tmp_path, f"{index:05}") for i in row[1:]]
        own = b"".join(text + b"\0" for text in texts[index::4])
        assert bytes(i - 4 if i != 2 else 0 for i in ids) == own
        assert json.loads((tmp_path / f"patches-{index:05}-of-00004.json").read_text())["texts"] == len(
            texts[index::4]
        )


def test_a_shard_without_texts_is_complete_and_empty(model, corpus, tmp_path):
    done = write_patches(model, [corpus / "a.txt"], tmp_path, (1, 2))
    assert (done.num_texts, done.num_files, done.bytes_per_second) == (0, 0, 0.0)
    assert (tmp_path / "patches-00001-of-00002.json").is_file()


def test_again_makes_only_what_is_missing(model, corpus, tmp_path):
    first = write_patches(model, [corpus], tmp_path, context=64, rows_per_file=5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    rows = rows_of(tmp_path)
    missing = sorted(before)[2]
    missing.unlink()
    again = write_patches(model, [corpus], tmp_path, context=64, rows_per_file=5)
    assert again.num_new_files == 1 and again.num_files == first.num_files
    changed = [path for path, was in before.items() if path.stat().st_mtime_ns != was]
    assert changed == [missing] and rows_of(tmp_path) == rows


KILLED = """
import sys
import torch
from blt_hf.training.corpus import write_patches
from helpers.models import make_model, tiny_config
torch.set_num_threads(1)
write_patches(make_model(tiny_config()), [sys.argv[1]], sys.argv[2], context=32, rows_per_file=2, batch_size=1)
"""


def test_a_killed_process_leaves_whole_files(model, corpus, tmp_path):
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    for _ in range(1200):
        if len(list((tmp_path / "killed").glob("*.parquet"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list((tmp_path / "killed").glob("*.parquet")))
    assert kept >= 3 and not list((tmp_path / "killed").glob("patches-*.json"))
    options = {"context": 32, "rows_per_file": 2, "batch_size": 1}
    done = write_patches(model, [corpus], tmp_path / "killed", **options)
    assert done.num_new_files == done.num_files - kept
    write_patches(model, [corpus], tmp_path / "whole", **options)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"context": 48}, "context"), ({"rows_per_file": 6}, "rows_per_file"), ({"shard": (0, 2)}, "shards"),
     ({"rule": PatchingRule(threshold=0.5)}, "rule"), ({"paths": "a.txt"}, "corpus")],
)  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused(model, corpus, tmp_path, changed, named):
    options = {"context": 64, "rows_per_file": 5}
    write_patches(model, [corpus], tmp_path, **options)
    paths = [corpus / changed.pop("paths")] if "paths" in changed else [corpus]
    with pytest.raises(ValueError, match=f"something else: .*{named}"):
        write_patches(model, paths, tmp_path, **{**options, **changed})


def test_another_entropy_model_in_the_same_folder_is_refused(model, corpus, tmp_path):
    write_patches(model, [corpus], tmp_path)
    with pytest.raises(ValueError, match="entropy_model differ"):
        write_patches(make_model(tiny_config(), seed=3), [corpus], tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"shard": (2, 2)}, "shard"), ({"shard": (-1, 2)}, "shard"), ({"context": 1}, "context"),
     ({"rows_per_file": 0}, "rows_per_file")],
)  # fmt: skip
def test_arguments_that_cannot_be(model, corpus, tmp_path, options, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        write_patches(model, [corpus], tmp_path, **options)


def test_output_in_the_corpus_and_no_text_are_refused(model, corpus, tmp_path):
    with pytest.raises(ValueError, match="must not lie in the corpus"):
        write_patches(model, [tmp_path], tmp_path / "out")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text in"):
        write_patches(model, [tmp_path / "empty.txt"], tmp_path / "out")


def test_the_command(model, corpus, tmp_path):
    model.save_pretrained(tmp_path / "model")
    options = ("patches", "--model", tmp_path / "model", "--corpus", corpus, "--context", 64)
    printed = run(*options, "--output", tmp_path / "out", "--shard", "1/3", "--quiet")
    assert "1/3, 8 texts" in printed and "1 of them new" in printed
    found = json.loads(run(*options, "--output", tmp_path / "out", "--shard", "1/3", "--json"))
    assert (found["num_texts"], found["num_files"], found["num_new_files"]) == (8, 1, 0)
    assert "--output" in run(*options, status=1)
    for shard in ("3/3", "x", "1", "1/0"):
        assert "i/n" in run(*options, "--output", tmp_path / "out", "--shard", shard, status=1)
    assert "--corpus" in run("patches", "text", "--output", tmp_path / "out", status=1)
