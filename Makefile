# `make quickstart` and `make test` set up what they need; the scripts say which variables they read.
.PHONY: style quality test test-slow test-lowest links quickstart

bin = $(or $(BLT_VENV),.venv)/bin

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

# Minutes each, so in one process with all threads; the time limit is for one test.
test-slow:
	BLT_TEST_WORKERS=0 bash scripts/test.sh -m slow --timeout 1800

# The oldest versions that are supported, in an environment of their own (some GB).
test-lowest:
	bash scripts/test_lowest.sh

# The code beside the bundled weights, after a module of the model was added, renamed or removed.
links:
	python3 scripts/link_code.py

quality:
	bash scripts/setup.sh dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .

style:
	bash scripts/setup.sh dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
