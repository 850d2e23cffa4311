"""The package is ready for an index: it builds, its files are complete, and it works away from its clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff", "SECURITY.md")


def run(*command, cwd: Path) -> str:
    """Runs a command as a new shell would: without this test's `PYTHONPATH`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", ".", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def elsewhere(distributions, tmp_path_factory) -> Path:
    """The interpreter of an environment that has the wheel, and this one's other packages (torch is not copied)."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        distributions[1],
        cwd=folder,
    )
    installed = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    assert (installed / "blt_hf" / "__init__.py").is_file()
    # A path named by a `.pth` file comes last, and the `.pth` files in it (an editable install) are not read.
    (installed / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_both_pass_the_check_of_the_index(distributions):
    assert run(sys.executable, "-m", "twine", "check", "--strict", *distributions, cwd=ROOT).count("PASSED") == 2


def test_wheel_holds_the_package_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    source = ROOT / "src"
    modules = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    assert {"blt_hf/py.typed"} | modules <= names
    assert {name.split("/")[0] for name in names} == {"blt_hf", "blt_hf_cli", f"blt_hf-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_is_what_the_wheel_is_built_from(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(BUILT_FROM) <= names
    assert "src/blt_hf/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_metadata_says_what_it_runs_on(distributions):
    wheel = zipfile.ZipFile(distributions[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(classifiers)
    required = [line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} >= {
        "torch",
        "transformers",
        "safetensors",
        "tokenizers",
    }


def test_readme_runs_from_another_folder(elsewhere, tmp_path):
    """The README's first snippet, with the wheel, where no clone is near."""
    snippet = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    model = ROOT / "pretrained" / "blt-5m"
    assert snippet.count('"pretrained/blt-5m"') == 1
    program = snippet.replace('"pretrained/blt-5m"', repr(str(model))) + "\nprint(blt_hf.__file__)\n"
    *printed, file = run(elsewhere, "-c", program, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(elsewhere.parents[1])
    assert printed[0].startswith("The import statement ") and len("\n".join(printed)) > 60


def test_command_is_installed(elsewhere, tmp_path):
    assert "calibrate" in run(elsewhere.with_name("blt-hf"), "--help", cwd=tmp_path)


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert "2412.09871" in paper["url"] and len(paper["authors"]) == 14


def test_workflow_runs_what_every_change_must_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    runs = job["strategy"]["matrix"]["include"]
    versions = [run["python"] for run in runs]
    assert {f"Programming Language :: Python :: {version}" for version in versions} <= set(PROJECT["classifiers"])
    assert PROJECT["requires-python"] == f">={versions[0]}"
    # the tools for the site that the whole run was made with ask for Python 3.11
    assert (runs[0]["constraints"], runs[-1]["constraints"]) == ("constraints/lowest.txt", "")
    assert all((ROOT / run["constraints"]).exists() for run in runs)
    assert workflow["permissions"] == {"contents": "read"}
