# Every target sets up what it needs in $(VENV); a second run finds it there. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt
# One stamp file per extra: `make demo` need not wait for the test tools.
ready = $(VENV)/.ready-$(1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-native test-slow lint format bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(call ready,demo) ## quantize a trained face detector, run it and write demo.png
	$(BIN)/horizon demo

test: lint test-native ## check style and types, then run all tests
	$(BIN)/python -m pytest -n $(JOBS)

# The kernels' own program, as shipped and under sanitizers: `sanitizers:programs` (none, address and undefined, thread).
NATIVE := :1000 address,undefined:40 thread:40

test-native: ## build the CPU kernels and test them, also under sanitizers
	@set -e; for run in $(NATIVE); do sanitize=$${run%:*}; \
	  dir=build/kernels$${sanitize:+-$${sanitize%%,*}}; \
	  echo "== kernels$${sanitize:+, sanitizers: $$sanitize}"; \
	  cmake -S csrc -B $$dir -DHORIZON_TESTS=ON -DHORIZON_EMULATE_AMX=ON -DHORIZON_SANITIZE=$$sanitize > /dev/null; \
	  cmake --build $$dir --parallel $(JOBS) > /dev/null; \
	  OMP_WAIT_POLICY=passive $$dir/test_kernels $${run##*:}; \
	done

test-slow: $(call ready,test) ## run the long tests (the whole model zoo)
	$(BIN)/python -m pytest -n $(JOBS) -m slow

lint: $(call ready,test) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(call ready,test) ## rewrite the files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(call ready,bench) ## run every benchmark
	@set -e; for program in benchmarks/[!_]*.py; do echo "== $$program"; $(BIN)/python "$$program"; done

docs: $(call ready,docs) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove what the targets made
	rm -rf $(VENV) build site demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.ready-%: pyproject.toml setup.py requirements/constraints.txt $(wildcard csrc/*.* csrc/*/*.*) | $(BIN)/python
	$(INSTALL) --editable '.[$*]'
	@touch $@
