#!/usr/bin/env bash
# Makes an environment of the newest versions (constraints/newest.txt, Python 3.13) and runs the tests there with the given
# pytest options. torch comes in the build that the index has; with its libraries it takes some GB. A configuration of pip that
# holds torch back is not read.
#
#   BLT_VENV  folder of the environment (default: .venv-newest)
#   PYTHON    interpreter to make it with (default: python3.13, from the path or from pyenv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export BLT_VENV=${BLT_VENV:-.venv-newest} BLT_CONSTRAINTS=constraints/newest.txt
export PYTHON=${PYTHON:-python3.13 ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.13.*/bin/python}
export PIP_CONFIG_FILE=${PIP_CONFIG_FILE:-/dev/null}
exec bash scripts/test.sh "$@"
