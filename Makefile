# Each target does its own set-up: Python >= 3.10 and make are all that a machine needs.
#   make PYTHON=python3.12 ...   builds the virtual environment with another Python
#   make test PYTEST_FLAGS=...   replaces the flags of pytest, for example PYTEST_FLAGS="-x -k kernel"

PYTHON ?= python3
PYTEST_FLAGS ?= -n 2 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SOUND := import sys; assert sys.version_info >= (3, 10); import ensurepip, venv

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## the main job on real data: writes report/index.html
	$(BIN)/ntkit demo --out report --force

# One thread of torch per worker: two cores, two workers. No test may ask a model hub for anything.
test: $(READY) ## every test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(READY) ## lint, format, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY) ## speed and memory beside torch.func, recorded in benchmarks/
	$(BIN)/python -m benchmarks.run

clean: ## remove everything that make made
	rm -rf $(VENV) report build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first, at its pinned version: a resolver that meets it as a dependency may take another build. The
# build backend comes with it, so that it is pinned too and pip needs no second environment to build ntkit in.
$(READY): pyproject.toml constraints.txt
	$(if $(shell $(PYTHON) -c '$(SOUND)' 2>/dev/null && echo yes),,$(error ntkit needs Python >= 3.10 with venv and pip, \
		and '$(PYTHON)' is not one: run make PYTHON=/path/to/python3))
	@echo 'Setting up $(VENV) with the versions of constraints.txt: once, some minutes'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
