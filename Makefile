# Every target needs only Python >= 3.10 and make: it creates .venv and installs what it needs there first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help install quickstart smoke test long quant check matrix bench docs
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   distil the shipped teacher, show images and a table (about four minutes)"
	@echo "make test         the tests of every change"
	@echo "make long         tests that take seconds each, which CI runs too"
	@echo "make quant        the tests of quantised weights, with torchao"
	@echo "make check        lint, formatting, types"
	@echo "make matrix       all tests, the slow ones included (goes on where it stopped)"
	@echo "make bench        measure, and fill the tables of README.md"
	@echo "make docs         fill the tables of README.md from the results"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "lightning_distill needs Python 3.10 or newer; run make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot create virtual environments; install its venv package (python3-venv on Debian)"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/lightning-distill quickstart

# the quick start with a few updates: does every part of it run? One thread: beside other work, two are ten times slower
smoke: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/lightning-distill quickstart --smoke

# as many workers as cores, 2 to 8, with one thread each: the same numbers everywhere
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(max(os.cpu_count() or 2, 2), 8))')
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test: $(STAMP)
	$(PYTEST) -m "not slow and not long and not gpu"

# what make test leaves to CI
long: $(STAMP)
	$(PYTEST) -m "long and not slow and not gpu"

# weights in 8 and 4 bits; torchao lies apart, since diffusers would load it at every import
quant: $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/quant 'torchao>=0.16'
	PYTHONPATH=$(VENV)/quant HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/networks/test_quantised.py tests/test_throughput_benchmark.py

# resumable: files of tests that passed are not run again until something they depend on changes
matrix: $(STAMP)
	$(BIN)/python benchmarks/matrix.py

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python benchmarks/make_tables.py --check

# what needs no data set and no GPU; benchmarks/ has more: compare.py fashion, emoji.py, throughput.py --device cuda
bench: $(STAMP)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/callbacks.py
	$(BIN)/python benchmarks/compare.py digits --again --configs method/dmd2_digits.yaml
	$(BIN)/python benchmarks/toy.py
	$(BIN)/python benchmarks/tangents.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/reduce_bytes.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/support.py
	$(BIN)/python benchmarks/make_tables.py

docs: $(STAMP)
	$(BIN)/python benchmarks/make_tables.py
