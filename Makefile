# `make` lists the targets. Every target sets up what it needs.
.DEFAULT_GOAL := help
.PHONY: help setup demo try test test-fast soak slurm check check-constraints bench clean

BIN := .venv/bin
STAMP := .venv/.installed
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 pdsh

# The first Python 3.10 to 3.13 that runs and can create a virtual environment; a name on PATH may be a shim that fails.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 python3; do \
	if $$name -c '$(SUITABLE)' >/dev/null 2>&1; then echo $$name; break; fi; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv with the tested versions; update it when setup.py or constraints.txt change

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "python: found none with venv; expected Python 3.10 to 3.13. Run: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "pip>=25.1"  # the pip of Python 3.11 takes a minute and a half longer to resolve
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests|transformers/models)/' .venv/lib/python3.*/site-packages >/dev/null 2>&1 || true  # on all cores, pip uses one
	touch $@

demo: setup ## train a tiny CogVLM on a generated grounding set (CPU, minutes)
	$(BIN)/python launch/demo.py

try: setup ## rehearse on your own photos: make try PHOTOS=path (CPU, minutes)
	@test -n "$(PHOTOS)" || { echo "PHOTOS: found nothing; expected the folder of your photos. Run make try PHOTOS=path"; exit 2; }
	$(BIN)/python launch/rehearse.py "$(PHOTOS)" $(OPTIONS)

# SLURM=required: install Slurm first, so that the tests that start their own Slurm cluster are not skipped.
ifeq ($(SLURM),required)
export COGVLM_REQUIRE_SLURM := 1
test: slurm
endif

# Otherwise each worker rewrites and compiles all tests again.
unexport PYTHONDONTWRITEBYTECODE

# tests/conftest.py decides what a worker takes together and what comes first. Three workers for two cores: many tests
# wait, for a limit of Slurm or a lost connection.
WORKERS ?= 3
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: setup ## all tests but those that need a GPU: side by side, then those that measure time one by one
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not serial"
	$(BIN)/python -m pytest -m "serial and not gpu" $$(grep -rl "mark.serial" tests)

test-fast: setup ## the tests that take seconds
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not serial"

soak: setup ## kill a run 50 times and compare it with an undisturbed one; try all fuzz inputs (about 20 minutes)
	SOAK_KILLS=50 $(BIN)/python -m pytest -s -m "not gpu" tests/soak
	COGVLM_FUZZ_SCALE=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu" tests/fuzz tests/unit/shards/test_staging.py tests/distributed/test_presets.py

slurm: ## install the packages for the Slurm tests (Debian or Ubuntu, as root)
	@for program in slurmctld slurmd sbatch munged ip pdsh; do command -v $$program >/dev/null || missing=yes; done; \
	if [ -z "$$missing" ]; then echo "Slurm is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -q -y --no-install-recommends $(SLURM_PACKAGES); \
	else echo "no root or no apt-get; expected both to install $(SLURM_PACKAGES). Run sudo make slurm, or install them yourself"; exit 1; fi

check: setup ## run ruff and mypy without changing files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-constraints: ## resolve the pins for Python 3.10 to 3.13 without installing; run it before every release
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/check_constraints.py

bench: setup ## run every benchmark in bench/
	@ls bench/*.py >/dev/null 2>&1 || echo "no benchmark in bench/"
	@for script in $(wildcard bench/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## delete caches; keep .venv and runs
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
