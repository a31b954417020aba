# `make demo` runs the main job offline on what the package carries; `make test` runs the tests. Each sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait by spinning stand still when another program takes a core (see LOG.md): let them sleep.
export OMP_WAIT_POLICY = PASSIVE
THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test check setup clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python recipes/demo.py

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m recipe

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "finetune needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist
