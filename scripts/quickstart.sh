#!/usr/bin/env bash
# Sets up what is missing, then runs examples/quickstart.py with the given options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh train
exec "${BLT_VENV:-.venv}/bin/python" examples/quickstart.py "$@"
