"""The scripts of `examples/smollm2` import each other by name, as they do when they run."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "examples" / "smollm2"))
