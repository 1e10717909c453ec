# make run: set up, compare every candidate with upstream, print where the report is.
# make test: the same set-up, then the whole test suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_OPTIONS ?=

.PHONY: run test setup lint clean
.DELETE_ON_ERROR:

run: setup
	$(BIN)/python -m harness run $(RUN_OPTIONS)

test: setup lint
	$(BIN)/python -m pytest --durations=10 --numprocesses=auto --dist=loadfile --no-loadscope-reorder

setup: $(STAMP)
	$(BIN)/python -m reference fetch

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# PyTorch goes first and alone: the others would take the registry's newest build with all of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Cleanroom needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable '.[kernels,harness,oracles,report,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
