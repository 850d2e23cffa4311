"""The lower bounds in pyproject.toml are the versions of constraints/lowest.txt, which the tests are run with."""

import re
import sys
from pathlib import Path

import pytest


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("train", "quantize", "plot")
BOUNDS = dict(
    re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    for requirement in [
        *PROJECT["dependencies"],
        *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]),
    ]
)
LOWEST = dict(
    line.split("==")
    for line in (ROOT / "constraints" / "lowest.txt").read_text().split()
    if re.match(r"[\w-]+==", line)
)


@pytest.mark.parametrize("name", BOUNDS)
def test_lower_bound_is_the_version_that_is_tested(name):
    numbers = [[int(number) for number in version.split(".")] for version in (BOUNDS[name], LOWEST[name])]
    longest = max(map(len, numbers))
    declared, tested = ([*version, *[0] * (longest - len(version))] for version in numbers)
    assert declared == tested


def test_nothing_else_is_pinned():
    assert LOWEST.keys() == BOUNDS.keys()
    assert PROJECT["requires-python"] == ">=3.10"  # of scripts/test_lowest.sh
    assert "python3.10" in (ROOT / "scripts" / "test_lowest.sh").read_text()


def test_newest_versions_are_within_the_bounds():
    lines = (ROOT / "constraints" / "newest.txt").read_text().split()
    newest = dict(line.split("==") for line in lines if re.match(r"[\w-]+==", line))
    numbers = lambda version: [int(number) for number in version.split(".")]
    assert newest.keys() <= LOWEST.keys()
    assert all(numbers(version) >= numbers(LOWEST[name]) for name, version in newest.items())
    (below,) = (
        re.search(r"<([\d.]+)", line)[1] for line in PROJECT["dependencies"] if line.startswith("transformers")
    )
    assert numbers(newest["transformers"]) < numbers(below)
    assert "constraints/newest.txt" in (ROOT / "scripts" / "test_newest.sh").read_text()
