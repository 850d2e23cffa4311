"""Tensor files, read and written piece by piece, so that memory does not depend on the size of a model."""

import json
import math
import os
import pickle
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


_CHUNK_BYTES = 32 * 2**20
_DTYPE_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes are (safetensors), or a memory-mapped tensor (`.pth`)."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    tensor: Tensor | None = field(default=None, repr=False)

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yields elements `start` to `stop` in order, as flat tensors of at most `_CHUNK_BYTES`."""
        stop = math.prod(self.shape) if stop is None else stop
        step = _CHUNK_BYTES // self.dtype.itemsize
        if self.tensor is not None:
            flat = self.tensor.reshape(-1)
            yield from (flat[first : min(first + step, stop)] for first in range(start, stop, step))
            return
        # Reading instead of mapping: mapped pages count as memory of the process until the system drops them.
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            for first in range(start, stop, step):
                buffer = bytearray((min(first + step, stop) - first) * self.dtype.itemsize)
                if file.readinto(buffer) < len(buffer):
                    raise ValueError(f"{self.path} became shorter while it was read.")
                yield torch.frombuffer(buffer, dtype=self.dtype)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if 8 + length > size:
            raise ValueError(f"{path} is not a whole safetensors file: {size} bytes, header of {length} bytes.")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPE_CODES:
            raise ValueError(f"{path}: `{name}` is {entry['dtype']}; supported: {', '.join(_DTYPE_CODES)}.")
        dtype, shape, (first, last) = _DTYPE_CODES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if 8 + length + last > size or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is not a whole safetensors file: `{name}` does not lie inside its {size} bytes.")
        stored[name] = StoredTensor(path, dtype, shape, 8 + length + first)
    return stored


def _open_pth(path: Path) -> dict[str, StoredTensor]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch's zip format cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a file of tensors (weights_only): {error}") from error
    state = state.get("model", state) if isinstance(state, dict) else {"": state}
    stored = {}
    for name, value in state.items():
        # Rotary tables are computed, not learned; older files carry them.
        if not isinstance(value, Tensor) or name.endswith("freqs_cis"):
            continue
        if value.dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"{path}: `{name}` is {value.dtype}; supported: {', '.join(map(str, _CODE_OF_DTYPE))}.")
        stored[name] = StoredTensor(path, value.dtype, tuple(value.shape), tensor=value)
    return stored


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Opens all tensors of `folder`: sharded or single safetensors, or `consolidated.pth`."""
    index, single, pth = (
        folder / name for name in ("model.safetensors.index.json", "model.safetensors", "consolidated.pth")
    )
    if index.is_file():
        stored = {}
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; {index.name} names it.")
            stored |= _open_safetensors(folder / name)
        return stored
    if single.is_file():
        return _open_safetensors(single)
    if pth.is_file():
        return _open_pth(pth)
    raise ValueError(f"{folder} has no weights: expected {single.name}, {index.name} or {pth.name}.")


def check_tensors(stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises a ValueError unless `stored` holds the tensors in `expected` (`name -> shape`) and no others.

    `where` says in the message whose tensors these are.
    """

    def listed(names):
        return ", ".join(f"`{name}`" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    differing = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
    }
    if any(differing.values()):
        problems = "; ".join(f"{kind}: {listed(names)}" for kind, names in differing.items() if names)
        raise ValueError(f"{where} does not hold the tensors that its arguments describe; {problems}.")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{where}: `{name}` has shape {list(stored[name].shape)}; its arguments say {list(shape)}."
            )


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: pieces of stored tensors, one after the other."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[StoredTensor, int, int | None], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        for stored, start, stop in self.parts:
            for piece in stored.pieces(start, stop):
                cast = piece.to(self.dtype)
                if not (cast is piece or cast.isfinite().all() or torch.equal(cast.isfinite(), piece.isfinite())):
                    raise ValueError(
                        f"`{self.name}` holds values that {self.dtype} cannot; choose another dtype, such as bfloat16."
                    )
                yield cast


def write_safetensors(path: Path, outputs: list[OutputTensor], advance) -> None:
    """Writes the safetensors format by hand, since its library wants whole tensors in memory.

    Source: https://github.com/huggingface/safetensors#format (length of the header, JSON header, bytes).
    """
    # Wide dtypes first keeps every tensor aligned to its element size.
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        entry = {"dtype": _CODE_OF_DTYPE[output.dtype], "shape": list(output.shape)}
        header[output.name] = entry | {"data_offsets": [end, end + output.num_bytes]}
        end += output.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for output in outputs:
            for piece in output.pieces():
                file.write(piece.contiguous().view(torch.uint8).numpy())
                advance(piece.numel() * piece.element_size())


def write_shards(folder: Path, outputs: list[OutputTensor], max_shard_bytes: int, advance) -> None:
    """Writes safetensors files of at most `max_shard_bytes`, and their index if there are several.

    A larger tensor gets a file of its own. `advance(num_bytes)` is called as bytes are written.
    """
    shards, size = [[]], 0
    for output in outputs:
        if shards[-1] and size + output.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.num_bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, advance)
        weight_map |= {output.name: name for output in shard}
    total = sum(output.num_bytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file; a ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


@contextmanager
def whole_or_nothing(out: Path, overwrite: bool, sources: list[Path]) -> Iterator[Path]:
    """Yields a new folder that becomes `out` at the end, or disappears if anything fails.

    Args:
        overwrite: `out` may exist and hold files; it is then replaced.
        sources: folders that are read meanwhile; `out` must not contain them.
    Raises:
        ValueError: `out` cannot be made so.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"OUT {out} is not empty; choose another folder or pass --overwrite (overwrite=True).")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"OUT {out} would replace the source {source}; choose another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.{kind}" for kind in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        if out.is_dir():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.is_dir() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a file beside `path`, syncs it, and moves it to `path`: no reader ever sees half a file."""
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}.partial")
    try:
        write(partial)
        if path.exists():
            partial.chmod(path.stat().st_mode)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_space(folder: Path, total: int) -> None:
    """Raises a ValueError if less than `total` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ValueError(f"{folder.parent} has {free / 1e9:.1f} GB free; {total / 1e9:.1f} GB are needed.")


@contextmanager
def progress_bar(total: int, label: str, show: bool):
    """Shows progress over `total` bytes on stderr; yields the function `advance(num_bytes)` that moves it on."""
    if not show:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


__all__ = [
    "OutputTensor",
    "StoredTensor",
    "check_space",
    "check_tensors",
    "open_weights",
    "progress_bar",
    "read_json",
    "whole_or_nothing",
    "write_json",
    "write_safetensors",
    "write_shards",
    "write_whole",
]
