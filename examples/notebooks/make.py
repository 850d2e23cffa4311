"""Writes the notebooks of this folder from the examples of the same names, whose cells begin with `# %%`.

python examples/notebooks/make.py
"""

import json
import re
from pathlib import Path


FOLDER = Path(__file__).parent
NAMES = ("chat_sft", "classify_language", "noise_robustness")


def make_notebook(source: str) -> dict:
    """A notebook without outputs: a cell for each `# %%`, one of text for each `# %% [markdown]`."""
    cells = []
    for number, cell in enumerate(re.split(r"^# %%", source, flags=re.M)[1:]):
        kind, _, text = cell.partition("\n")
        is_text = kind.strip() == "[markdown]"
        text = re.sub(r"^# ?", "", text, flags=re.M) if is_text else text
        cells.append(
            {
                "cell_type": "markdown" if is_text else "code",
                "id": f"cell-{number}",
                "metadata": {},
                "source": text.strip("\n").splitlines(keepends=True),
                **({} if is_text else {"execution_count": None, "outputs": []}),
            }
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    for name in NAMES:
        notebook = make_notebook((FOLDER.parent / f"{name}.py").read_text())
        (FOLDER / f"{name}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
