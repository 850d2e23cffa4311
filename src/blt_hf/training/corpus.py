"""Patches of a corpus that is too large for one process: each machine computes one shard, and can be restarted.

A shard is every `n`-th text. Its rows are written to files, and each file appears only when it is complete. So a process
that is killed loses at most one file; the same call continues after the last complete one.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from ..conversion.files import write_whole
from ..model.patching_blt import BOS_TOKEN_ID, EOS_TOKEN_ID, PatchingRule
from ..tokenizer.encoding import byte_ids
from .data import PrecomputePatches, find_files, stream_texts


@dataclass(frozen=True)
class ShardSummary:
    """Numbers of a shard.

    Attributes:
        num_texts: texts of this shard.
        num_rows, num_bytes: rows in its files, and ids in these.
        num_files: files of the shard.
        num_new_files, num_new_bytes: those that this call has written.
        seconds: time to find and write patches.
    """

    num_texts: int
    num_rows: int
    num_bytes: int
    num_files: int
    num_new_files: int
    num_new_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Of the new files; 0 if this call wrote none."""
        return self.num_new_bytes / self.seconds if self.num_new_bytes else 0.0


def write_patches(
    model: nn.Module,
    paths: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    shard: tuple[int, int] = (0, 1),
    context: int = 1024,
    rows_per_file: int = 1024,
    batch_size: int = 16,
    column: str = "text",
    rule: PatchingRule | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ShardSummary:
    """Writes rows of ids with their patches, as [`PrecomputePatches`] finds them, to Parquet files.

    The texts are joined, each followed by an EOS, and cut into rows of a BOS and `context - 1` ids. `Trainer` trains on
    `datasets.load_dataset("parquet", data_files=f"{output}/*.parquet")`, with columns `input_ids` and `patch_lengths`.

    Files are called `patches-00003-of-00016-000000.parquet`. When the shard is complete, its numbers are written to
    `patches-00003-of-00016.json`. `settings.json` records the sources and settings of the files.

    Args:
        model: a BLT, or an entropy model together with `rule`.
        paths: files and folders, as [`read_texts`] takes them. They are read as a stream.
        output: a folder; made if it does not exist.
        shard: `(i, n)`: texts `i`, `i + n`, `i + 2n` ... of the corpus.
        context: ids of a row, at least 2.
        rows_per_file: rows of a file.
        batch_size: rows that the entropy model reads at once.
        column: which field of a `.jsonl` line is the text.
        rule: another rule than the model's.
        on_progress: called with the number of ids of each file, also of existing ones.
    Returns:
        A [`ShardSummary`].
    Raises:
        ValueError: an argument that is not as above, no text, or files in `output` with other settings.
    """
    index, count = shard
    if not (0 <= index < count):
        raise ValueError(f"`shard` must be (i, n) with 0 <= i < n; got {shard!r}.")
    for name, value, least in (("context", context, 2), ("rows_per_file", rows_per_file, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    paths, output = [Path(path) for path in paths], Path(output)
    if any(path.is_dir() and output.resolve().is_relative_to(path.resolve()) for path in paths):
        raise ValueError(f"`output` must not lie in the corpus, of which its files would be a part; got {output}.")
    find = PrecomputePatches(model, rule)
    output.mkdir(parents=True, exist_ok=True)
    settings = _describe(find, paths, column, count, context, rows_per_file)
    _check_settings(output / "settings.json", settings)
    stem = f"patches-{index:05}-of-{count:05}"
    texts = _Texts(stream_texts(paths, column), index, count)
    totals = {"rows": 0, "bytes": 0, "files": 0}
    new_files = new_bytes = 0
    start = time.perf_counter()
    rows = pack_rows(texts, context)
    while part := list(islice(rows, rows_per_file)):
        path, size = output / f"{stem}-{totals['files']:06}.parquet", sum(map(len, part))
        if not path.is_file():
            _write_file(path, part, find, batch_size)
            new_files, new_bytes = new_files + 1, new_bytes + size
        for name, value in (("rows", len(part)), ("bytes", size), ("files", 1)):
            totals[name] += value
        if on_progress is not None:
            on_progress(size)
    if not texts.num_seen:
        raise ValueError(f"no text in {', '.join(map(str, paths))}.")
    write_whole(output / f"{stem}.json", lambda path: path.write_text(json.dumps({"texts": texts.num_own, **totals})))
    for partial in output.glob(f".*-{stem}*"):  # of calls that were stopped
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    return ShardSummary(
        texts.num_own, totals["rows"], totals["bytes"], totals["files"], new_files, new_bytes, seconds
    )  # fmt: skip


class _Texts:
    """Iterates over every `count`-th text from `index` on, and counts all texts and these."""

    def __init__(self, texts: Iterator[bytes], index: int, count: int):
        self._texts, self._index, self._count = texts, index, count
        self.num_seen = self.num_own = 0

    def __iter__(self) -> Iterator[bytes]:
        for number, text in enumerate(self._texts):
            self.num_seen += 1
            if number % self._count == self._index:
                self.num_own += 1
                yield text


def pack_rows(texts: Iterable[bytes], context: int) -> Iterator[list[int]]:
    """Yields rows of `context` ids: texts one after the other, an EOS behind each text and a BOS before each row.

    The last row may be shorter.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*byte_ids(text), EOS_TOKEN_ID]
        whole = len(ids) // (context - 1) * (context - 1)
        for start in range(0, whole, context - 1):
            yield [BOS_TOKEN_ID, *ids[start : start + context - 1]]
        ids = ids[whole:]
    if ids:
        yield [BOS_TOKEN_ID, *ids]


def _describe(find: PrecomputePatches, paths: list, column: str, count: int, context: int, rows_per_file: int) -> dict:
    """Returns all settings that change the content of the files, the same for all shards."""
    finder = find.finder
    files = [(path.relative_to(root).as_posix(), path.stat().st_size) for root in paths for path in find_files([root])]
    return {
        "corpus": hashlib.sha256(json.dumps(files).encode()).hexdigest(),  # names below `paths`, and sizes
        "column": column,
        "shards": count,
        "context": context,
        "rows_per_file": rows_per_file,
        "rule": dataclasses.asdict(finder.rule),
        "newline_reset": finder.documents.newline_reset,
        "mask_documents": finder.documents.mask_documents,
        "entropy_model": None if finder.patcher is None else _hash_weights(finder.patcher),
    }


def _hash_weights(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_settings(path: Path, settings: dict) -> None:
    """Writes `settings`, or compares them with those that another process has written."""
    partial = path.with_name(f".{os.getpid()}-{time.time_ns()}-{path.name}.partial")
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    try:
        os.link(partial, path)  # fails if it is there, whoever comes first
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(partial, path)
            return
    finally:
        partial.unlink(missing_ok=True)
    known = json.loads(path.read_text())
    wrong = [name for name in settings if settings[name] != known.get(name)]
    if wrong:
        raise ValueError(
            f"`output` {path.parent} has files that were made from something else: {', '.join(wrong)} differ from "
            f"{path.name}. Give another folder, or remove this one."
        )


def _write_file(path: Path, rows: list[list[int]], find: PrecomputePatches, batch_size: int) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    lengths: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        lengths += find({"input_ids": rows[start : start + batch_size]})["patch_lengths"]
    kind = pyarrow.list_(pyarrow.int32())
    table = pyarrow.table({"input_ids": pyarrow.array(rows, kind), "patch_lengths": pyarrow.array(lengths, kind)})
    write_whole(path, lambda partial: write_table(table, partial))


__all__ = ["ShardSummary", "pack_rows", "write_patches"]
