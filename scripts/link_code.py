"""Puts the code of the model beside the weights in `pretrained/`, as links into `src/`: what `save_pretrained` ships.

python scripts/link_code.py           # after a module of src/blt_hf/model/ was added, renamed or removed
python scripts/link_code.py --copy    # copies, where links cannot be (a zip file unpacked without them)
"""

import argparse
import os
import re
import shutil
from pathlib import Path


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "blt_hf" / "model"


def needed_files() -> list[str]:
    """The modeling file and all that it reaches by `from .name import`, which is what transformers follows."""
    found, queue = set(), ["modeling_blt.py"]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            text = (SOURCE / name).read_text(encoding="utf-8")
            queue.extend(f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")
    copy = parser.parse_args().copy
    for config in (ROOT / "pretrained").glob("*/config.json"):
        folder = config.parent
        for old in folder.glob("*.py"):
            old.unlink()
        for name in needed_files():
            if copy:
                shutil.copyfile(SOURCE / name, folder / name)
            else:
                (folder / name).symlink_to(os.path.relpath(SOURCE / name, folder))
        print(f"{folder.relative_to(ROOT)}: {len(needed_files())} files")


if __name__ == "__main__":
    main()
