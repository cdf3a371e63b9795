# make demo, make check, make test: each makes its own virtual environment and needs nothing but Python 3.10+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo real rounds check test faults lint bench bench-train aot csrc docs site notebooks gpu clean

demo: $(STAMP)
	$(BIN)/dpo-fast demo

# A real chat model on real pairs, in at most twenty minutes on two cores. Both are downloaded, unless they are
# named: make real ROWS=hh.jsonl.gz MODEL=folder
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,real]"
	$(BIN)/dpo-fast demo --real $(if $(ROWS),--rows "$(ROWS)") $(if $(MODEL),--model "$(MODEL)")

# The same model learns a rule from its own answers, in two rounds: a quarter of an hour.
rounds: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,real]"
	$(BIN)/dpo-fast demo --real --rounds $(if $(ROWS),--rows "$(ROWS)") $(if $(MODEL),--model "$(MODEL)")

# What a change needs while it is made: a golden curve of every kind, and all that is quick.
check: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "core or not (processes or peers or emulator or slow)"

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# Faults by the hundred: kills, signals, full disks, malformed input. Much longer than everything else.
faults: $(STAMP)
	DPO_FAST_SLOW=1 $(BIN)/python -m pytest $(PARALLEL) $(if $(ONLY),-k "$(ONLY)") -rA --capture=tee-sys $$(grep -rlE "SLOW" tests --include="test_*.py")

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

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

# Everything that needs a card, within minutes: by the machine's own Python, whose torch knows the card.
MINUTES ?= 8
gpu:
	$(PYTHON) -m benchmarks.gpu.run --minutes $(MINUTES)

docs: $(STAMP)
	$(BIN)/python -m dpo_fast.losses.docs > docs/LOSSES.md
	$(BIN)/python -m dpo_fast.training.config_docs > docs/CONFIG.md
	$(BIN)/python -m dpo_fast.rounds.config_docs > docs/ROUNDS_CONFIG.md
	$(BIN)/dpo-fast config schema --out configs/schema.json
	$(BIN)/python -m dpo_fast.migration.docs docs
	$(BIN)/python -m benchmarks.scale_page > docs/SCALE.md
	$(BIN)/python -m dpo_fast.report.loss_curves docs/pictures/losses
	$(BIN)/python -m dpo_fast.report.layout_pictures docs/pictures/layouts

# The documentation as a site in build/site, by an environment of its own: pages are read without importing the code.
SITE ?= build/site-env
site: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --strict

$(SITE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

# Runs the notebooks, and stores what they show. It needs nbclient and ipykernel, or NBCLIENT, a folder with them.
notebooks: $(STAMP)
	$(BIN)/python -m tests.support.notebooks

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
