# Each target makes .venv and installs what it needs if that is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test test-slow bench lint clean

run: .venv/.run
	$(BIN)/python -m mlo run graphs/needs_aware.yaml

test: .venv/.test
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist load

bench: .venv/.test
	$(BIN)/python -m pytest -q -o python_functions='case_*' tests/benchmarks/bench_cases.py

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[test]'
	touch $@

.venv/.lint: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[lint]'
	touch $@
