# `make` lists what there is. Every target sets up what it needs.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check bench clean

BIN := .venv/bin
STAMP := .venv/.installed

# The first Python 3.10-3.12 that runs and can make a virtual environment: a name on PATH may be a shim that only fails.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3; do \
	if $$name -c '$(SUITABLE)' >/dev/null 2>&1; then echo $$name; break; fi; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the tested versions, again when setup.py or constraints.txt change

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "wanted: Python 3.10, 3.11 or 3.12 with venv; found none. make PYTHON=/path/to/one"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: setup ## train a tiny CogVLM on a made grounding set, from photos to answers (CPU, minutes)
	$(BIN)/python launch/demo.py

test: setup ## all tests but those that need a GPU
	$(BIN)/python -m pytest -m "not gpu"

test-fast: setup ## the tests that take seconds
	$(BIN)/python -m pytest

check: setup ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## run every benchmark in bench/
	@ls bench/*.py >/dev/null 2>&1 || echo "bench/ holds no benchmark yet"
	@for script in $(wildcard bench/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## delete caches; .venv and runs stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
