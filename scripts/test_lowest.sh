#!/usr/bin/env bash
# Makes an environment of the oldest versions that are supported (constraints/lowest.txt, Python 3.10) and runs the tests there
# with the given pytest options. torch comes in the build that the index has; with its libraries it takes some GB.
#
#   BLT_VENV  folder of the environment (default: .venv-lowest)
#   PYTHON    interpreter to make it with (default: python3.10, from the path or from pyenv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export BLT_VENV=${BLT_VENV:-.venv-lowest} BLT_CONSTRAINTS=constraints/lowest.txt
export PYTHON=${PYTHON:-python3.10 ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.10.*/bin/python}
exec bash scripts/test.sh "$@"
