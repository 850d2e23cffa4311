"""Hugging Face's common test suites, as the source distribution of the installed transformers holds them.

The distribution is fetched once with pip from the package registry and unpacked into a git-ignored folder; nothing of
it is part of this repository. It holds the `tests/*.py` files, but not the folders beside them that they import from;
what is missing there is stood in for by the small modules below, in our own words.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn
from unittest import mock

import pytest
import transformers


# Not `tests`: that name belongs to whoever runs pytest.
PACKAGE = "transformers_tests"
ROOT = Path(__file__).parents[2]

# Modules that the distribution lacks, and what they define; to be filled before `load`.
STUBS: dict[str, dict[str, object]] = {}


class SuitesUnavailable(Exception):
    """The source distribution is neither in the cache nor at the package registry."""


def leave_out(reason: str) -> NoReturn:
    """Skips the module that calls it; fails it where `CI` is set, so that these suites cannot be missing unseen."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)


def cache_folder(name: str = "transformers") -> Path:
    """Where distributions are kept between runs: `$BLT_TEST_CACHE`, or `.cache` in the repository."""
    return Path(os.environ.get("BLT_TEST_CACHE") or ROOT / ".cache") / f"{name}-suites"


def fetch(version: str = transformers.__version__, name: str = "transformers") -> Path:
    """The folder that holds the suites of a version of a package as a package `NAME_tests`; downloads them if need be.

    Raises:
        SuitesUnavailable: with what pip said.
    """
    cache, package = cache_folder(name), f"{name}_tests"
    target = cache / version
    if not (target / package).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _unpack(_download(name, version, Path(folder)), Path(folder) / "unpacked", package)
            try:
                (Path(folder) / "unpacked").rename(target)
            except OSError:  # another worker was faster
                if not (target / package).is_dir():
                    raise
    return target


def _download(name: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", name, "--dest", str(folder), "--retries", "1", "--timeout", "15"]
    try:
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise SuitesUnavailable(f"pip did not finish within {error.timeout:.0f} s") from None
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise SuitesUnavailable((done.stderr.strip().splitlines() or ["pip found nothing"])[-1])
    return archives[0]


def _unpack(archive: Path, folder: Path, name: str) -> None:
    """Takes `tests/*.py` out of the archive, into a package of its own."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    # The suites import `../src/transformers/__init__.py` by its path and then use the installed transformers.
    (folder / "src" / "transformers").mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py") and member.isfile():
                with tar.extractfile(member) as source, open(package / parts[2], "wb") as copy:
                    shutil.copyfileobj(source, copy)


def load(name: str) -> ModuleType:
    """Imports a module of the suites, such as `"test_modeling_common"`.

    Raises:
        SuitesUnavailable: they cannot be downloaded.
    """
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not any(isinstance(finder, _StubFinder) for finder in sys.meta_path):
        sys.meta_path.append(_StubFinder())
    with mock.patch.object(pytest, "mark", _NoMarks()):
        return importlib.import_module(f"{PACKAGE}.{name}")


class _StubFinder(MetaPathFinder, Loader):
    """Finds modules of the suites that no file holds: `STUBS` says what they define; all else is an empty class."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{PACKAGE}.") else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(STUBS.get(module.__name__.removeprefix(f"{PACKAGE}."), {}))

        def make_class(name: str) -> type:
            if name.startswith("_"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = make_class


class _NoMarks:
    """`pytest.mark` that decorates with nothing: the suites' marks are not ours, and pytest rejects unknown ones."""

    def __getattr__(self, name: str):
        def mark(*args, **kwargs):
            is_decorator = len(args) == 1 and callable(args[0]) and not kwargs
            return args[0] if is_decorator else lambda decorated: decorated

        return mark


def _define(name: str, content: dict[str, object]) -> None:
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        if parent == PACKAGE:
            importlib.import_module(PACKAGE)
        else:
            _define(parent, {"__path__": []})
    module = sys.modules.setdefault(name, ModuleType(name))
    vars(module).update(content)


def write_tiny_model_summary(folder: Path, tokenizers: dict[str, str | None]) -> None:
    """Writes the list that the pipeline suite reads: for each model class, the tokenizer class that goes with it."""
    summary = {
        name: {"tokenizer_classes": [tokenizer] if tokenizer else [], "processor_classes": [], "model_classes": [name]}
        for name, tokenizer in tokenizers.items()
    }
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


class Summary:
    """A pytest plugin that says at the end of a session how the tests of one file fared."""

    def __init__(self, file: str, subject: str = "our classes", suites: str | None = None):
        self.file, self.subject = Path(file).name, subject
        self.suites = suites or f"transformers {transformers.__version__}"

    def pytest_terminal_summary(self, terminalreporter) -> None:
        tests = {"passed": set(), "failed": set(), "skipped": set(), "xfailed": set()}
        for category, reports in terminalreporter.stats.items():
            outcome = category.rpartition(" ")[2]  # parts of a test count as "subtests failed" and so on
            for report in reports if outcome in tests else ():
                if f"{self.file}::" in report.nodeid:
                    tests[outcome].add(report.nodeid)
        failed, skipped = tests["failed"], tests["skipped"] - tests["failed"]
        passed, refused = tests["passed"] - failed - skipped, tests["xfailed"]
        expected = f", {len(refused)} failed for a reason of BLT's" if refused else ""
        terminalreporter.write_line(
            f"The suites of {self.suites} on {self.subject}: {len(passed | failed | refused)} ran, "
            f"{len(passed)} passed, {len(failed)} failed{expected}; {len(skipped)} skipped."
        )
