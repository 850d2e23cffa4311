"""Makes `tests/conformance/meta_reference/`: `python scripts/select_reference.py FOLDER_OF_THE_WHOLE_RECORDING`.

The whole recording is 12 MB, nearly all of it random weights. The selection has every rule and option in under 4 MB, an
archive for each case (`tar xf` opens it) with the files of the recording, less what the tests can do without:

- `entropy_small` is left out. Its options are those of other cases.
- Logits are those of every twelfth position and of the last one, numbered in `<input>/positions`. A wrong state shows in
  later positions too. Entropies, patch lengths and continuations are whole.
- Rows of byte embeddings that no recorded text reads are zeros.
- In cases about a rule alone, the weights that the rule does not need are zeros, and nothing that depends on them is kept:
  of `monotonic` and `threshold_add` entropies and patch lengths remain, of `space` and `static` patch lengths.
"""

import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save


TARGET = Path(__file__).resolve().parents[1] / "tests" / "conformance" / "meta_reference"
LEFT_OUT = ("entropy_small",)
ENTROPIES_ALONE = ("monotonic", "threshold_add")
LENGTHS_ALONE = ("space", "static")
STRIDE = 12
STATES = ("debug.embeds", "debug.encoder_hidden", "debug.global_output")
COPIED = ("config.json", "train_args.json", "entropy_model/params.json")
# Contexts for each of the four bytes of a float: exponents are compressed apart from random digits.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2, "pb": 2}]


def select_case(folder: Path) -> dict[str, bytes]:
    """The files of one case, by their names."""
    case = folder.name
    vectors = json.loads((folder / "vectors.json").read_text())
    tensors = load_file(folder / "vectors.safetensors")
    weights = load_file(folder / "model.safetensors")
    entropy_weights = torch.load(folder / "entropy_model" / "consolidated.pth", weights_only=True)["model"]
    inputs = vectors["inputs"]
    read = {0, 1, 2, 3}.union(
        *(value["ids"] + value.get("greedy", {}).get("new_ids", []) for value in inputs.values())
    )

    if case in ENTROPIES_ALONE + LENGTHS_ALONE:
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for value in inputs.values():
            value["has_logits"] = False
            value.pop("greedy", None)
    if case in LENGTHS_ALONE + ("byte",):
        entropy_weights = {name: torch.zeros_like(tensor) for name, tensor in entropy_weights.items()}
    for some in (weights, entropy_weights):
        for name, tensor in some.items():
            if "tok_embeddings" in name:
                tensor[[row not in read for row in range(tensor.shape[0])]] = 0

    selected = {}
    for name, value in inputs.items():
        if case not in LENGTHS_ALONE and f"{name}/entropies" in tensors:
            selected[f"{name}/entropies"] = tensors[f"{name}/entropies"]
        if value["has_logits"]:
            last = len(value["ids"]) - 1
            positions = torch.tensor(sorted({*range(0, last, STRIDE), last}))
            selected[f"{name}/positions"] = positions
            selected[f"{name}/logits"] = tensors[f"{name}/logits"][positions]
            selected |= {f"{name}/{key}": tensors[f"{name}/{key}"] for key in STATES if f"{name}/{key}" in tensors}

    saved = io.BytesIO()
    torch.save({"model": entropy_weights}, saved)
    return {
        **{name: (folder / name).read_bytes() for name in COPIED},
        "vectors.json": json.dumps(vectors, ensure_ascii=False).encode(),
        "vectors.safetensors": save(selected),
        "model.safetensors": save(weights),
        "entropy_model/consolidated.pth": saved.getvalue(),
    }


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(lzma.compress(content.getvalue(), filters=FILTERS))


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "README.md").is_file():
        sys.exit("usage: python scripts/select_reference.py FOLDER_OF_THE_WHOLE_RECORDING")
    TARGET.mkdir(exist_ok=True)
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        if folder.name not in LEFT_OUT:
            write_archive(TARGET / f"{folder.name}.tar.xz", select_case(folder))
    print(sum(path.stat().st_size for path in TARGET.glob("*.tar.xz")), "bytes")


if __name__ == "__main__":
    main()
