"""The site: it builds without a warning, holds every page and every public name, and asks nothing of other hosts."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import blt_hf


ROOT = Path(__file__).parents[1]
PAGES = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def names_of(nav) -> list[str]:
    """The pages of a navigation, whatever its depth."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in entries for name in names_of(entry)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What `mkdocs build --strict` makes; every warning (a dead link, a lost page) is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation():
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert sorted(names_of(yaml.safe_load(configuration)["nav"])) == PAGES


def test_every_page_is_built(site):
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {page.removesuffix("md") + "html" for page in PAGES} <= built


def test_search_finds_pages_and_names(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    titles = {html.unescape(entry["title"]) for entry in entries}
    assert {"Choosing the threshold", "BltForCausalLM", "calibrate_threshold"} <= titles
    assert {entry["location"].partition("#")[0] for entry in entries} >= {"quickstart.html", "reference/models.html"}


def test_the_reference_has_every_public_name(site):
    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', reference))
    assert {f"blt_hf.{name}" for name in blt_hf.__all__} <= anchors
    assert {
        "blt_hf.BltModel.forward",
        "blt_hf.training.data.BltDataCollator",
        "blt_hf.evaluation.flops.flops_per_byte",
        "blt_hf.conversion.convert_meta_checkpoint",
    } <= anchors
    assert '<span class="doc-section-title">Raises:</span>' in reference  # sections are told apart
    assert not re.search(r"\[<code>Blt\w+</code>\]", reference)  # [`BltModel`] has become a link


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]+href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+href="([^"]+)"[^>]+rel="(?:stylesheet|preconnect|icon)"', text)
        assert not [address for address in loaded if "//" in address], page


def test_links_out_of_the_docs_lead_to_copies(site):
    assert (site / "files" / "examples" / "spelling.py").read_text() == (ROOT / "examples" / "spelling.py").read_text()
    assert 'href="files/examples/spelling.py"' in (site / "spelling.html").read_text()


def test_the_architecture_page_names_every_file_of_the_model():
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {file.name for file in (ROOT / "src" / "blt_hf" / "model").glob("*_blt.py")}
    assert set(re.findall(r"\w+_blt\.py", page)) - {file.name for file in ROOT.glob("tests/*/test_*_blt.py")} == files


def test_every_picture_is_shown():
    pages = "".join((ROOT / "docs" / page).read_text() for page in PAGES) + (ROOT / "README.md").read_text()
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert f"images/{picture.name})" in pages, picture.name
