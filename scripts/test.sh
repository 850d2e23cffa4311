#!/usr/bin/env bash
# Sets up what is missing, then runs the tests with the given pytest options (such as `-m slow`).
#
#   BLT_TEST_WORKERS  processes to run them in (default: 2)
#   BLT_EXTRAS        what to install this project with (default: dev)
#
# Each process begins with a share of its own, whole files but for one, so that what the tests of a file share is made once;
# the one that is ready first takes from the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh ${BLT_EXTRAS:-dev}
exec "${BLT_VENV:-.venv}/bin/python" -m pytest --numprocesses "${BLT_TEST_WORKERS:-2}" --dist worksteal "$@"
