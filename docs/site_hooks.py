"""Hooks of mkdocs: links out of `docs/` lead to copies of the files, and [`Name`] in a docstring to its entry."""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
COPIES = "files"  # folder of the site
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
NAME = re.compile(r"\[<code>(?P<name>[\w.]+)</code>\]")


def _target(page_path: str, link: str) -> Path | None:
    """The file that a relative link of a page names, if it lies outside of `docs/`."""
    target = Path(os.path.normpath(ROOT / "docs" / posixpath.dirname(page_path) / link))
    return target if target.exists() and not target.is_relative_to(ROOT / "docs") else None


def on_files(files, config):
    """Adds what pages link to outside of `docs/`, as it is; of a folder its README."""
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            target = _target(page.src_uri, match["path"])
            if target is None:
                continue
            target = target / "README.md" if target.is_dir() else target
            name = f"{COPIES}/{target.relative_to(ROOT).as_posix()}{'.txt' if target.suffix == '.md' else ''}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes those links lead to the copies."""

    def replace(match: re.Match) -> str:
        target = _target(page.file.src_uri, match["path"])
        if target is None:
            return match[0]
        target = target / "README.md" if target.is_dir() else target
        copy = f"{COPIES}/{target.relative_to(ROOT).as_posix()}{'.txt' if target.suffix == '.md' else ''}"
        return posixpath.relpath(copy, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(replace, markdown)


def on_page_content(html, page, config, files):
    """transformers writes [`BltModel`] in docstrings; mkdocs-autorefs finds where that is."""
    return NAME.sub(
        lambda match: f'<autoref identifier="blt_hf.{match["name"]}" optional><code>{match["name"]}</code></autoref>',
        html,
    )
