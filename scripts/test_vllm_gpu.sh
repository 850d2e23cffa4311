#!/usr/bin/env bash
# Everything that has to be shown of integrations/vllm on a GPU, in the environment that is active there: the tests, 100 random
# texts, and vLLM against continuous batching, whose result is written to benchmarks/results/serve_vllm_gpu.json. Not run yet.
#
#   pip install . ./integrations/vllm vllm pytest pytest-timeout rich && bash scripts/test_vllm_gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VLLM_USE_V2_MODEL_RUNNER=0 HF_HUB_OFFLINE=1
tests=(python -m pytest -p no:warnings --rootdir integrations/vllm -c integrations/vllm/pyproject.toml integrations/vllm/tests)
python -c "import torch; print(torch.cuda.get_device_name())"
failed=0
"${tests[@]}" "$@" || failed=1
python integrations/vllm/tests/fuzz.py --cases 100 --output integrations/vllm/results/fuzz-gpu.json || failed=1
python benchmarks/serve_vllm.py --device cuda --dtype bfloat16 --rows 32 256 --requests 256 --one-by-one 8 |
    tail -1 >benchmarks/results/serve_vllm_gpu.json || failed=1
exit $failed
