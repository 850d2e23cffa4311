"""The numbers of docs/reliability.md: how many recipes there are, by what they assert, and how many pairs."""

import ast
import re
from pathlib import Path


FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"


def recipes() -> dict[str, list[str]]:
    """Test functions of each file; the numbers of their parameters do not count."""
    found = {}
    for path in sorted(FOLDER.glob("test_*_recipes.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found[path.name] = [function.name for function in functions if function.name.startswith("test_")]
    return found


def test_the_numbers_are_those_of_the_page():
    found, page = recipes(), PAGE.read_text()
    for name, functions in found.items():
        assert re.search(rf"`tests/recipes/{name}` \| {len(functions)} \|", page), f"{name}: {len(functions)}"
    total = sum(map(len, found.values()))
    pairs = re.search(r"NUM_PAIRS = \d+, (\d+)", (FOLDER / "test_generation_recipes.py").read_text()).group(1)
    assert f"{total} recipes and {pairs} pairs" in page, f"{total} recipes and {pairs} pairs"


def test_no_recipe_is_hidden_by_another():
    """A second function of the same name would take the place of the first."""
    for name, functions in recipes().items():
        assert len(functions) == len(set(functions)), name
