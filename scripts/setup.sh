#!/usr/bin/env bash
# Makes or reuses a virtual environment and installs this project in it: `bash scripts/setup.sh [EXTRA ...]`.
#
#   BLT_VENV   folder of the environment (default: .venv)
#   PYTHON     interpreter to make it with (default: the first of python3, python3.13 ... python3.10 that is new enough)
#   BLT_TORCH  what to install where torch is missing (default: torch==2.13.0)
#   BLT_CONSTRAINTS  file of versions to install, for pip's `--constraint`; torch's is then the one that it names
#
# A torch that is already in the environment is kept as it is, so install your own build there first if you want another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${BLT_VENV:-.venv}
wanted=${BLT_CONSTRAINTS:-}
torch=${BLT_TORCH:-$(grep -s "^torch==" "$wanted" || echo torch==2.13.0)}
extras=$(IFS=, && echo "$*")

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later found (looked for: ${PYTHON:-python3, python3.13 ... python3.10, python});" \
        "name one with PYTHON=/path/to/python."
}

# pip is part of the test because an interrupted `python -m venv` leaves an environment without it.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv "$venv" ||
        fail "'$python -m venv' failed; on Debian and Ubuntu its package is called python3-venv."
fi
python=$venv/bin/python

# Installing takes a while even when there is nothing to do, so it is done again only when something has changed.
stamp=$venv/.installed-${extras:-none}
state="$PWD $(cat pyproject.toml ${wanted:+"$wanted"} | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi
quiet=()
if [ -n "${CI:-}" ]; then
    quiet=(--quiet --progress-bar off)
fi
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "Installing $torch"
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} "$torch"
fi
constraints=$venv/constraints.txt
"$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$constraints"
echo "Installing blt-hf${extras:+[$extras]}, with $(cat "$constraints")${wanted:+ and $wanted}"
if [ -n "$wanted" ]; then
    grep -v "^torch==" "$wanted" >>"$constraints"
fi
"$python" -m pip install ${quiet[@]+"${quiet[@]}"} --constraint "$constraints" --editable ".${extras:+[$extras]}"
echo "$state" >"$stamp"
