# `make quickstart` and `make test` set up what they need; the scripts say which variables they read.
.PHONY: style quality test test-slow quickstart

bin = $(or $(BLT_VENV),.venv)/bin

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

# Minutes each, so in one process with all threads; the time limit is for one test.
test-slow:
	BLT_TEST_WORKERS=0 bash scripts/test.sh -m slow --timeout 1800

quality:
	bash scripts/setup.sh dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .

style:
	bash scripts/setup.sh dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
