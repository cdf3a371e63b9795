# make demo, make test: both make their own virtual environment and need nothing but Python 3.10+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench bench-train aot csrc docs clean

demo: $(STAMP)
	$(BIN)/dpo-fast demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,bench]"
	$(BIN)/dpo-fast bench kernels

bench-train: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,bench]"
	$(BIN)/dpo-fast bench train

aot: $(STAMP)
	$(BIN)/python -m benchmarks.aot

csrc: $(STAMP)
	$(BIN)/python -m dpo_fast.ops.linear_logp.cuda_extension

docs: $(STAMP)
	$(BIN)/python -m dpo_fast.losses.docs > docs/LOSSES.md
	$(BIN)/python -m dpo_fast.training.config_docs > docs/CONFIG.md
	$(BIN)/dpo-fast config schema --out configs/schema.json

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
