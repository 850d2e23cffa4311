"""The README and the pages of `docs/` do what they show: snippets run, commands and links exist.

Snippets load the model that comes with the project, or what the quickstart leaves behind; what they print is not
compared. A snippet after `<!-- not run: reason -->` is compiled only.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import typer
from transformers import set_seed

from blt_hf import BltForCausalLM, BltTokenizer
from blt_hf.cli import app


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```python\n(?P<code>.*?)^```", re.M | re.S)


def snippets(page: Path) -> list[tuple[str, str | None]]:
    return [(match["code"], match["reason"]) for match in SNIPPET.finditer(page.read_text())]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# `converting.md` has a test of its own, which makes the checkpoints that it converts. `troubleshooting.md` raises errors.
WITH_TESTS_OF_THEIR_OWN = ("converting.md", "troubleshooting.md")
# `export.md` records the model three times, which takes minutes; `tests/model/test_export.py` does so with smaller ones.
LONG = ("export.md",)
PAGES_THAT_RUN = [page for page in PAGES if snippets(page) and page.name not in WITH_TESTS_OF_THEIR_OWN]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with the bundled model in it, and `quickstart-output` as the quickstart leaves it."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "pretrained", folder / "pretrained")
    shutil.copytree(ROOT / "pretrained" / "blt-5m", folder / "quickstart-output" / "blt")
    model = BltForCausalLM.from_pretrained(ROOT / "pretrained" / "blt-5m")
    model.model.patcher.save_pretrained(folder / "quickstart-output" / "entropy-model")
    BltTokenizer().save_pretrained(folder / "quickstart-output" / "entropy-model")
    return folder


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (page.name in LONG)) for page in PAGES_THAT_RUN],
)
def test_snippets_run(page, clone, monkeypatch):
    """From top to bottom, each page in a namespace of its own."""
    monkeypatch.chdir(clone)
    set_seed(0)
    namespace = {"__name__": "__main__"}
    for number, (code, reason) in enumerate(snippets(page), start=1):
        code = re.sub(r"\bmax_steps=\d+", "max_steps=2", code)  # the page trains for minutes
        program = compile(code, f"{name_of(page)}, snippet {number}", "exec")
        if reason is None:
            with torch.enable_grad():
                exec(program, namespace)


def test_errors_are_those_of_the_page(clone, monkeypatch):
    """Each snippet of the troubleshooting page raises an error whose message begins as the heading above it."""
    monkeypatch.chdir(clone)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    namespace = {"__name__": "__main__"}
    first, *sections = re.split(r"^### ", page, flags=re.M)
    exec(SNIPPET.search(first)["code"], namespace)
    assert len(sections) > 15
    for section in sections:
        heading = section.splitlines()[0]
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            exec(SNIPPET.search(section)["code"], namespace)
        assert str(raised.value).startswith(heading), heading


def test_options_of_shown_commands_exist():
    """Each `blt-hf` line of a page names options that the command has."""
    commands = typer.main.get_command(app).commands
    shown = [
        shlex.split(line.partition("blt-hf ")[2], comments=True)
        for page in PAGES
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"(\$ )?blt-hf ", line)
    ]
    assert len(shown) > 10
    for name, *arguments in shown:
        command = commands[name]
        while hasattr(command, "commands") and arguments and arguments[0] in command.commands:
            command, arguments = command.commands[arguments[0]], arguments[1:]
        known = {"--help"}.union(*(parameter.opts + parameter.secondary_opts for parameter in command.params))
        used = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
        assert used <= known, (name, used - known)


def test_shown_commands_exist():
    text = "\n".join(page.read_text() for page in PAGES) + (ROOT / "CONTRIBUTING.md").read_text()
    scripts = set(re.findall(r"(?:bash|python) ((?:scripts|examples|docs|\.ci|benchmarks)/[\w./-]+)", text))
    assert {"scripts/quickstart.sh", "scripts/test.sh", ".ci/run"} <= scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)) <= targets
    commands = {command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"(?:`|^\$ )blt-hf ([\w-]+)", text, re.M)) <= commands


def test_the_first_screen_is_run():
    assert {ROOT / "README.md", ROOT / "docs" / "quickstart.md"} <= set(PAGES_THAT_RUN)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        if not target.exists():
            missing.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            if anchor not in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                missing.append(link)
    assert not missing


def test_options_of_the_quickstart_are_those_shown():
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "quickstart.md").read_text()
    lines = re.findall(r"quickstart\.(?:sh|py) ([^`\n#]*)", pages)
    shown = {option for line in lines for option in line.split() if option.startswith("--")}
    source = (ROOT / "examples" / "quickstart.py").read_text()
    assert shown
    assert not [option for option in shown if f'"{option}"' not in source]


@pytest.mark.parametrize("script", sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").glob("*.sh")), ids=str)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_model_of_the_snippets_loads(clone):
    assert BltForCausalLM.from_pretrained(clone / "pretrained" / "blt-5m").config.uses_patcher
