# `make compare` and `make test` are complete on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py dense_shortcuts/ops/backends/native.cpp
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: compare test test-long test-all families accuracy check bench docs clean

compare: $(VENV)/installed
	$(BIN)/dsnet compare

test: $(VENV)/installed-dev
	$(PYTEST) -m "not accuracy and not families and not long"

test-long: $(VENV)/installed-dev
	$(PYTEST) -m "long and not accuracy and not families"

test-all: test test-long

families: $(VENV)/installed-dev
	$(PYTEST) -m families

accuracy: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m accuracy

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/dsnet bench

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/installed-dev: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed
