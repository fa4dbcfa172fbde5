# Every target creates the environment that it needs; nothing is installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint type bench bench-solvers bench-bytes docs format clean help

help:
	@echo "make demo   train a small language model with AdamW and Shampoo; table, plot, JSON in runs/lm"
	@echo "make test   the whole test suite (slow jobs too)"
	@echo "make lint   ruff: style and format   make type   mypy --strict"
	@echo "make bench  the benchmark suites: table, JSON and chart in benchmarks/results; ARGS=--help"
	@echo "make bench-solvers  error and time of every inverse root solver, into benchmarks/results"
	@echo "make bench-bytes  what Shampoo's state takes in every storage, into benchmarks/results"
	@echo "make docs   the documentation site, into site/"

# torch first and alone, so that the pinned build is taken
$(VENV)/base: constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) --editable '.[plot,progress]'
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/docs: $(VENV)/base
	$(PIP) --editable '.[docs]'
	@touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/train_lm.py $(ARGS)

test: $(VENV)/dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/dev
	$(BIN)/mypy

bench: $(VENV)/demo
	$(BIN)/python -m benchmarks $(ARGS)

bench-solvers: $(VENV)/base
	$(BIN)/python -m benchmarks.solvers $(ARGS)

bench-bytes: $(VENV)/base
	$(BIN)/python -m benchmarks.state_bytes $(ARGS)

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
