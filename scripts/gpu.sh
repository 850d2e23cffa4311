#!/usr/bin/env bash
# What a machine with a GPU is asked, in eight minutes: the tests of `make test-gpu`, then benchmarks/recorded.py.
#
#   OUT     where the logs and the figures go (default: benchmarks/results)
#   PYTHON  an interpreter that has the package's dependencies, pytest and peft (default: python3)
#
# `bash scripts/gpu.sh cpu`: the same on a CPU that plays a GPU, small, to know that it works.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-benchmarks/results} python=${PYTHON:-python3} device=${1:-cuda}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
mkdir -p "$out"
limit() { timeout --signal=INT --kill-after=10 "$@"; }

if [ "$device" = cpu ]; then
    tests="tests/model/test_cuda_graphs.py" more="-k one_graph" figures="--shape tiny --contexts 64 --prompts 64 --new-bytes 24
        --repeats 1 --rows 2 --tape" seconds="200 200"
else
    export BLT_TEST_DEVICE=cuda
    # As in the Makefile, which also makes an environment.
    tests="tests/gpu $(printf 'tests/model/test_%s.py ' exactness cache_blt continuous_blt decoding generation_blt packed_blt \
        patching_blt speculation) tests/conformance/test_generation_suite.py tests/conformance/test_meta_reference.py"
    more="--maxfail 30" figures="--shape 1b --dtype bfloat16 --seconds 170" seconds="230 230"
fi
set -- $seconds
# First what captured steps rest on, so that it is known even where the time runs out.
limit "$1" "$python" -m pytest -n0 -q --tb=short -p no:warnings -m "not slow and not hub" $more $tests 2>&1 | tee "$out/gpu_tests.log"
passed=${PIPESTATUS[0]}
limit "$2" "$python" benchmarks/recorded.py --device "$device" $figures 2>"$out/recorded.log" | tee "$out/recorded.txt"
measured=${PIPESTATUS[0]}
tail -n 1 "$out/recorded.txt" >"$out/recorded.json"
tail -n 60 "$out/recorded.log"
echo "tests: $passed (124: the time ran out); figures: $measured"
exit $((passed | measured))
