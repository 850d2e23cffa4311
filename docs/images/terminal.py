"""Draws `terminal.png`: what `blt-hf patches` prints in a terminal, as it prints it.

python docs/images/terminal.py [CHROMIUM]        # needs playwright, and Chromium (by default /usr/bin/chromium)
"""

import html
import os
import shlex
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text


COMMANDS = [
    ["patches", "--entropies", "A function call always returns some value, possibly None."],
    ["patches", "for name in sorted(os.listdir(path)):\n\tprint(name)"],
    ["patches", "Größere Änderungen: Это пример текста, 日本語の文 \x1b[31m"],
]
WIDTH = 90
ROOT = Path(__file__).parents[2]
STYLE = """
body { margin: 0; background: #fff }
main { display: inline-block; padding: 14px 18px; font: 17px/1.3 "DejaVu Sans Mono", monospace; color: #1c2430;
  white-space: pre; background: #fbfcfe; border: 1px solid #d8dee6; border-radius: 10px }
i { display: inline-block; width: 2ch; text-align: center; font-style: normal; line-height: 1 }
"""


def shown(argument: str) -> str:
    """As one types it in bash."""
    if argument.isprintable():
        return argument if argument == shlex.quote(argument) else f'"{argument}"'
    return "$'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in argument) + "'"


def as_html(line: Text) -> str:
    """A line of a terminal; a wide character takes two cells, whatever font has it."""
    parts = []
    for text, style, _ in line.render(Console(color_system="truecolor")):
        cells = "".join(f"<i>{c}</i>" if cell_len(c) == 2 else html.escape(c) for c in text)
        css = [f"background:{style.bgcolor.triplet.hex}"] if style and style.bgcolor else []
        css += [f"color:{style.color.triplet.hex}"] if style and style.color else []
        css += ["font-style:italic"] if style and style.italic else []
        css += ["font-weight:bold"] if style and style.bold and style.color is None else []
        parts.append(f'<span style="{";".join(css)}">{cells}</span>')
    return "".join(parts)


def main(chromium: str) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": str(WIDTH)}
    lines = []
    for command in COMMANDS:
        lines.append(Text.assemble(("$ ", "bold"), "blt-hf " + " ".join(map(shown, command))))
        done = subprocess.run(
            [sys.executable, "-m", "blt_hf_cli", *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines += [*Text.from_ansi(done.stdout.rstrip("\n")).split("\n"), Text()]
    drawn = "\n".join(map(as_html, lines[:-1]))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 400}, device_scale_factor=1.6)
        page.set_content(f"<style>{STYLE}</style><main>{drawn}</main>")
        page.locator("main").screenshot(path=Path(__file__).with_name("terminal.png"))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "/usr/bin/chromium")
