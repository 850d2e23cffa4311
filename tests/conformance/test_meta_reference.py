"""Converted checkpoints against recorded numbers of Meta's code, and the published expectations of a released one.

`meta_reference/` holds a selection of the vectors, which every clone is asked. The whole recording is taken where
`BLT_REFERENCE_DIR` names its folder, or where it lies in `shared/reference` beside the repository.
"""

import importlib.util
import json
import os
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.blt import modeling_blt as in_tree

from blt_hf import BltForCausalLM
from blt_hf.conversion import convert_meta_checkpoint, export_meta_checkpoint
from helpers.models import DEVICE


ROOT = Path(__file__).resolve().parents[2]
SELECTION = Path(__file__).parent / "meta_reference"
BESIDE = ROOT.parent / "shared" / "reference"
REFERENCE = Path(os.environ.get("BLT_REFERENCE_DIR", BESIDE if BESIDE.is_dir() else SELECTION))
IS_WHOLE = not any(REFERENCE.glob("*.tar.xz"))
NOT_SELECTED = () if IS_WHOLE else ("entropy_small",)
CASES = (
    "all_layers_encoder",
    "byte",
    "cross_window",
    "documents",
    "entropy_small",
    "gqa_first_layer_decoder",
    "max_patch_length",
    "monotonic",
    "projection_k4",
    "short_window",
    "space",
    "static",
    "threshold_add",
)
in_every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_SELECTED])
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class Case:
    """One recorded case: its inputs and tensors, and its checkpoint, converted."""

    def __init__(self, name: str, recorded: Path, folder: Path):
        self.name, self.recorded, self.folder = name, recorded, folder
        self.inputs = json.loads((recorded / "vectors.json").read_text())["inputs"]
        self.tensors = load_file(recorded / "vectors.safetensors", device=str(DEVICE))
        self.model = BltForCausalLM.from_pretrained(folder).eval().to(DEVICE)
        # The recorded loop does not stop at eos.
        self.model.generation_config.eos_token_id = None

    @property
    def has_logits(self) -> bool:
        return any(value["has_logits"] for value in self.inputs.values())

    def ids(self, name: str) -> torch.Tensor:
        return torch.tensor([self.inputs[name]["ids"]])

    @torch.no_grad()
    def run(self, input_ids: torch.Tensor, **kwargs):
        return self.model(input_ids, output_patches=True, use_cache=False, **kwargs)

    def check(self, name: str, logits: torch.Tensor, entropies: torch.Tensor | None, patch_lengths: torch.Tensor):
        """Compares one row without its padding: `(N, 260)`, `(N,)` and `(P,)`."""
        if f"{name}/entropies" in self.tensors:
            torch.testing.assert_close(entropies, self.tensors[f"{name}/entropies"], **TOLERANCE)
        if self.name != "static":
            assert patch_lengths[patch_lengths > 0].tolist() == self.inputs[name]["patch_lengths"], name
        if self.inputs[name]["has_logits"]:
            self.check_logits(name, logits)

    def check_logits(self, name: str, logits: torch.Tensor):
        """The selection has the logits of some positions, among them the last."""
        positions = self.tensors.get(f"{name}/positions", slice(None))
        torch.testing.assert_close(logits[positions], self.tensors[f"{name}/logits"], **TOLERANCE)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    opened = {}

    def open_case(name: str) -> Case:
        if name not in opened:
            recorded, folder = REFERENCE / name, tmp_path_factory.mktemp("converted") / name
            if not IS_WHOLE:
                recorded = tmp_path_factory.mktemp("recorded") / name
                unpack(REFERENCE / f"{name}.tar.xz", recorded)
            with warnings.catch_warnings():
                # Static patching is the one case with a note; `test_static_lengths` says why.
                warnings.simplefilter("ignore" if name == "static" else "error")
                convert_meta_checkpoint(recorded, folder)
            opened[name] = Case(name, recorded, folder)
        return opened[name]

    return open_case


def unpack(archive: Path, folder: Path):
    with tarfile.open(archive) as opened:
        # The argument is in no release of Python 3.10 to 3.11.3 (3.14 extracts so by default).
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def test_no_case_is_left_out():
    found = {path.name.removesuffix(".tar.xz") for path in REFERENCE.iterdir() if path.name != "README.md"}
    assert found == set(CASES) - set(NOT_SELECTED)


def test_selection_is_small():
    assert sum(path.stat().st_size for path in SELECTION.iterdir()) <= 4_000_000


@pytest.mark.skipif(not IS_WHOLE, reason="the whole recording is not here (`BLT_REFERENCE_DIR`)")
def test_selection_is_what_its_script_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("select_reference", ROOT / "scripts" / "select_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for case in set(CASES) - set(script.LEFT_OUT):
        unpack(SELECTION / f"{case}.tar.xz", tmp_path / case)
        files = script.select_case(REFERENCE / case)
        assert {str(path.relative_to(tmp_path / case)) for path in (tmp_path / case).rglob("*.*")} == files.keys()
        weights = "entropy_model/consolidated.pth"  # a zip file, which says when it was made
        assert all((tmp_path / case / name).read_bytes() == data for name, data in files.items() if name != weights)
        (tmp_path / "again.pth").write_bytes(files[weights])
        ours, again = (_tensors(path) for path in (tmp_path / case / weights, tmp_path / "again.pth"))
        assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


@in_every_case
def test_each_input_alone(cases, case):
    case = cases(case)
    for name in case.inputs:
        output = case.run(case.ids(name))
        entropies = None if output.entropies is None else output.entropies[0]
        case.check(name, output.logits[0], entropies, output.patch_lengths[0])


@pytest.mark.parametrize("side", ["left", "right"])
@in_every_case
def test_all_inputs_as_one_padded_batch(cases, case, side):
    case = cases(case)
    rows = [case.inputs[name]["ids"] for name in case.inputs]
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    spans = [slice(width - len(row), width) if side == "left" else slice(0, len(row)) for row in rows]
    for row, ids, span in zip(range(len(rows)), rows, spans):
        input_ids[row, span], attention_mask[row, span] = torch.tensor(ids), 1
    output = case.run(input_ids, attention_mask=attention_mask)
    for row, (name, span) in enumerate(zip(case.inputs, spans)):
        entropies = None if output.entropies is None else output.entropies[row, span]
        case.check(name, output.logits[row, span], entropies, output.patch_lengths[row])


@in_every_case
def test_greedy_continuation_through_the_cache(cases, case):
    case = cases(case)
    recorded = {name: value["greedy"] for name, value in case.inputs.items() if "greedy" in value}
    assert recorded or case.name == "static" or not case.has_logits
    for name, greedy in recorded.items():
        ids = case.ids(name)
        output = case.model.generate(ids, max_new_tokens=24, do_sample=False)
        assert output[0, ids.shape[1] :].tolist() == greedy["new_ids"], name
        for step, patch_lengths in enumerate(greedy["step_patch_lengths"]):
            found = case.run(output[:, : ids.shape[1] + step]).patch_lengths[0]
            assert found.tolist() == patch_lengths, (name, step)


@in_every_case
def test_greedy_continuation_in_a_batch(cases, case):
    """The same beside a longer and a shorter text, left-padded."""
    case = cases(case)
    if "greedy" not in case.inputs["ascii"]:
        reason = (
            "the reference model rejects static patches" if case.name == "static" else "the selection has none here"
        )
        pytest.skip(f"no continuation: {reason}")
    rows = [case.inputs[name]["ids"] for name in ("utf8", "ascii", "one_byte")]
    width = max(map(len, rows))
    input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = case.model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=24, do_sample=False)
    assert output[1, width:].tolist() == case.inputs["ascii"]["greedy"]["new_ids"]


@in_every_case
def test_states_inside(cases, case):
    case = cases(case)
    for name in case.inputs:
        if f"{name}/debug.encoder_hidden" not in case.tensors:
            continue
        output = case.run(case.ids(name), output_hidden_states=True)
        for states, key in (
            (output.encoder_hidden_states[0], "embeds"),
            (output.encoder_hidden_states[-1], "encoder_hidden"),
            (output.global_hidden_states[-1], "global_output"),
        ):
            recorded = case.tensors[f"{name}/debug.{key}"]
            # A last patch of just the next, unknown byte has an output in the reference, which nothing reads.
            assert recorded.shape[0] - states.shape[1] in (0, 1)
            torch.testing.assert_close(states[0], recorded[: states.shape[1]], **TOLERANCE)


def test_static_lengths(cases):
    """Where we differ on purpose: the recorded patches are 4, 4, 4, ... from position 0, ours 1, 4, 4, ...

    The reference's own model rejects the recorded ones with an assertion (its decoder needs a first patch of 1 byte),
    so there are no numbers of it to keep. What both agree on is the length of all patches in between.
    """
    case = cases("static")
    for name, value in case.inputs.items():
        found = case.run(case.ids(name)).patch_lengths[0].tolist()
        assert value["patch_lengths"] == _split(len(value["ids"]) + 1)
        assert found == [1, *_split(len(value["ids"]))]


def _split(num_bytes: int) -> list[int]:
    return [4] * (num_bytes // 4) + [num_bytes % 4] * (num_bytes % 4 > 0)


@in_every_case
def test_round_trip(cases, case, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`patcher_config.sliding_window` is 8")  # `short_window`
        back = export_meta_checkpoint(cases(case).folder, tmp_path / "back")
    recorded = cases(case).recorded
    for file in ("config.json", "train_args.json", "entropy_model/params.json"):
        assert json.loads((back / file).read_text()) == json.loads((recorded / file).read_text())
    for file in ("model.safetensors", "entropy_model/consolidated.pth"):
        ours, theirs = (_tensors(folder / file) for folder in (back, recorded))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    "case", [case for case in ("byte", "entropy_small", "short_window") if case not in NOT_SELECTED]
)
def test_converted_checkpoint_in_plain_transformers(cases, case):
    """Cases that the in-tree class can express; the others need fields that it does not have."""
    if case == "short_window" and not hasattr(in_tree, "create_sliding_window_causal_mask"):
        pytest.skip("the in-tree class of this transformers version has no attention windows (5.23 has)")
    case = cases(case)
    model, report = in_tree.BltForCausalLM.from_pretrained(case.folder, output_loading_info=True)
    assert not any(report.values())
    model.to(DEVICE)
    for name in case.inputs:
        if case.inputs[name]["has_logits"]:
            with torch.no_grad():
                logits = model(case.ids(name), use_cache=False).logits[0]
            case.check_logits(name, logits)


@pytest.mark.hub
@pytest.mark.skipif(
    os.environ.get("HF_HUB_OFFLINE", "1") not in ("0", ""),
    reason="offline; run with HF_HUB_OFFLINE=0 pytest -m hub (downloads 9 GB)",
)
def test_published_expectations_of_the_released_1b_model():
    """What transformers' own tests expect of `itazap/blt-1b-hf`: logits, and 200 greedy bytes."""
    model = BltForCausalLM.from_pretrained("itazap/blt-1b-hf").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 42, 21, 12, 43, 23, 1, 4]])).logits[0, 0, :5].float()
    expected = torch.tensor([-10.5, -10.6875, -6.25, -10.5625, -10.3125])
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)

    tokenizer = AutoTokenizer.from_pretrained("itazap/blt-1b-hf")
    inputs = tokenizer("my name is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == (
        "my name is alex and i am a student at the university of michigan. i am a senior majoring in computer science "
        "and minoring in mathematics. i am also a member of the michigan math club and the michigan computer s"
    )
