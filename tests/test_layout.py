"""Where tests stand: what several files need is in `helpers`, and no test file imports another."""

import ast
from pathlib import Path

import pytest

from helpers.transformers_suites import leave_out


TESTS = Path(__file__).parent


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_no_test_file_imports_another():
    names = {path.stem for path in TESTS.rglob("*.py") if "helpers" not in path.relative_to(TESTS).parts}
    wrong = {path.name: imported_modules(path) & names for path in TESTS.rglob("*.py")}
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_suites_that_cannot_be_fetched_fail_in_ci(monkeypatch):
    """What others wrote is the strongest of the tests; where it is missing, somebody has to see it."""
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="pip found nothing"):
        leave_out("pip found nothing")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="pip found nothing"):
        leave_out("pip found nothing")
