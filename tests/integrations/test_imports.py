"""Whatever the order of imports and the way to a model: what is loaded is this package's class, or an error is raised."""

import ast
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

import blt_hf
from blt_hf import BltTokenizer
from helpers.models import make_model


pytestmark = pytest.mark.timeout(900)  # new processes that import everything, for machines that are busy
SOURCE = pathlib.Path(blt_hf.__file__).parent
PROGRAM = pathlib.Path(__file__).with_name("import_orders.py")
# The first of each is what a person writes; the other is the one that is farthest from it. `-m slow` has all.
ORDERS = ["blt_hf,transformers,trl,peft", "peft,transformers,trl,blt_hf"]
REMOTE_ORDERS = ["transformers,trl,peft"]
ALL_ORDERS = [",".join(order) for order in itertools.permutations(["blt_hf", "transformers", "trl", "peft"])]
ALL_REMOTE_ORDERS = [",".join(order) for order in itertools.permutations(["transformers", "trl", "peft"])]
OTHERS = [order for order in ALL_ORDERS + ALL_REMOTE_ORDERS if order not in ORDERS + REMOTE_ORDERS]


@pytest.fixture(scope="module")
def run_orders(tmp_path_factory):
    """Runs orders of imports, and returns what each found."""
    folder = tmp_path_factory.mktemp("imports")
    model = make_model()
    for kind in ("code", "plain"):
        model.save_pretrained(folder / kind)
        BltTokenizer().save_pretrained(folder / kind)
    # What is published by others: the in-tree name, and no code.
    config = json.loads((folder / "plain" / "config.json").read_text())
    config["architectures"] = ["BltForCausalLM"]
    del config["auto_map"]
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    for file in (folder / "plain").glob("*.py"):
        file.unlink()
    (folder / "folders.json").write_text(json.dumps({kind: str(folder / kind) for kind in ("code", "plain")}))

    def run(orders: list[str]) -> dict:
        found = {}
        for order in orders:
            result = subprocess.run(
                [sys.executable, str(PROGRAM), str(folder / "folders.json"), order],
                capture_output=True,
                text=True,
                timeout=240,
                cwd=folder,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "HF_HOME": str(folder / "home"),
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
            assert result.returncode == 0, result.stderr[-4000:]
            found[order] = json.loads(result.stdout.splitlines()[-1])
            assert found[order]["order"] == order
        return found

    return run


@pytest.fixture(scope="module")
def found(run_orders):
    return run_orders(ORDERS + REMOTE_ORDERS)


def check(entry: dict) -> None:
    """Everything that was loaded is ours."""
    assert entry["error"] is None, entry["error"]
    remote = "blt_hf" not in entry["order"]
    assert set(entry["loaded"]) == ({"code"} if remote else {"code", "plain"})
    for kind, ways in entry["loaded"].items():
        assert len(ways) >= 7
        for way, name in ways.items():
            expected = "modeling_blt.BltModel" if way == "AutoModel" else "modeling_blt.BltForCausalLM"
            root = "transformers_modules." if remote else "blt_hf.model."
            assert name.startswith(root) and name.endswith(expected), f"{kind}, {way}: {name}"


@pytest.mark.parametrize("order", ORDERS + REMOTE_ORDERS)
def test_every_way_to_a_model_gives_ours(found, order):
    check(found[order])


@pytest.mark.slow
def test_every_order_of_imports(run_orders):
    for entry in run_orders(OTHERS).values():
        check(entry)


# No process is needed to see these.


def imports_of(path: pathlib.Path) -> set[pathlib.Path]:
    """The files of this package that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1]
        base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
        for candidate in [base, *(base / alias.name for alias in node.names)]:
            for file in (candidate.with_suffix(".py"), candidate / "__init__.py"):
                if file.is_file() and file != path:
                    found.add(file)
    return found


def test_no_circle_of_imports():
    files = {path: imports_of(path) for path in SOURCE.rglob("*.py")}
    done: set[pathlib.Path] = set()
    while len(done) < len(files):
        ready = {path for path, needed in files.items() if path not in done and needed <= done}
        left = sorted(str(path.relative_to(SOURCE)) for path in files.keys() - done)
        assert ready, f"these files import each other in a circle: {left}"
        done |= ready


def test_modules_that_travel_change_nothing_in_other_libraries():
    """No finder, and no attribute of another library is set at import; new architectures are added by one module."""
    for path in (SOURCE / "model").glob("*_blt.py"):
        text = path.read_text()
        assert "meta_path" not in text, path.name
        assert "setattr(" not in text or path.name != "names_blt.py", path.name
        for node in ast.walk(ast.parse(text)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in ("transformers", "peft", "torch", "trl"), (
                        f"{path.name}: {target.attr}"
                    )
