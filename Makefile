# `make quickstart` and `make test` set up what they need; the scripts say which variables they read.
.PHONY: coverage links quickstart quality style test test-gpu test-lowest test-newest test-properties test-slow test-vllm test-vllm-fuzz test-vllm-gpu

bin = $(or $(BLT_VENV),.venv)/bin

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

# Minutes each, so in one process with all threads; the time limit is for one test. DeepSpeed, which changes what every Trainer
# imports, is installed for these alone.
test-slow:
	BLT_EXTRAS="dev deepspeed" BLT_TEST_WORKERS=0 bash scripts/test.sh -m slow --timeout 1800

# On a machine with an NVIDIA GPU, with a torch for it in the environment: what only a GPU shows, and tests of the model there.
test-gpu:
	BLT_TEST_DEVICE=cuda bash scripts/test.sh -m "not slow and not hub" tests/gpu tests/model/test_exactness.py \
		$(patsubst %,tests/model/test_%.py,cache_blt continuous_blt decoding generation_blt packed_blt patching_blt speculation) \
		tests/conformance/test_generation_suite.py tests/conformance/test_meta_reference.py

# vLLM's CPU build with the plugin, and Ray; in an environment of their own (2.6 GB). `BLT_VLLM_VERSION=0.29.0 make test-vllm`: the
# oldest that is supported.
test-vllm:
	bash scripts/test_vllm.sh

# A thousand random texts in the same environment, to integrations/vllm/results. `bash scripts/test_vllm.sh --fuzz --cases 100`: fewer.
test-vllm-fuzz:
	bash scripts/test_vllm.sh --fuzz

# The plugin on an NVIDIA GPU, in the environment that is active, with `vllm`: tests, random texts, a benchmark. Not run yet.
test-vllm-gpu:
	bash scripts/test_vllm_gpu.sh

# The oldest versions that are supported, in an environment of their own (some GB).
test-lowest:
	bash scripts/test_lowest.sh

# The newest versions (constraints/newest.txt), in an environment of their own (some GB).
test-newest:
	bash scripts/test_newest.sh

# The code beside the bundled weights, after a module of the model was added, renamed or removed.
links:
	python3 scripts/link_code.py
# Ten thousand new random cases of the laws of exactness (8 properties of 1,250 cases), and as many of each other property;
# and a million byte strings through the tokenizer.
test-properties:
	BLT_PROPERTY_CASES=1250 bash scripts/test.sh tests/model/test_exactness.py tests/model/test_cache_blt.py \
		tests/tokenizer/test_tokenization.py --timeout 3600 -m "not hub and not gpu"

# Which lines of the package the default tests run; `htmlcov/index.html` shows them.
coverage:
	bash scripts/test.sh --cov=blt_hf --cov-report=term-missing:skip-covered --cov-report=html

quality:
	bash scripts/setup.sh dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .

style:
	bash scripts/setup.sh dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
