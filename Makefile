# Everything runs in .venv, made with a Python that scripts/find_python.sh finds; PYTHON=... names another.
# An install is repeated only when pyproject.toml or constraints.txt has changed since the last one of its extras.

VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help quickstart install test lint docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.installed-train ## train a small model on this machine, from nothing, in a few minutes
	$(BIN)/python -m train configs/quickstart.yaml

install: $(VENV)/.installed-train ## make .venv with the library and the trainer

test: $(VENV)/.installed-test ## run the tests; ARGS="-k name" passes arguments to pytest, ARGS="-m slow" runs the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev ## check style, imports and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(VENV)/.installed-train ## regenerate docs/config.md and the READMEs' tables
	$(BIN)/python -m train.config
	$(BIN)/python -m pallas_kernels.support README.md
	$(BIN)/python -m longctx.context_parallel.support docs/context_parallel.md
	$(BIN)/python -m pallas_kernels.conformance --readme

clean: ## remove .venv and what tools leave behind; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@python=$$(sh scripts/find_python.sh) && echo "$$python makes $(VENV)" && "$$python" -m venv --clear $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	@touch $@
