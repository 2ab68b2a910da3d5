# Everything runs in .venv, made on first use from the pinned versions in constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format slow clean

demo: $(STAMP)  ## The main job on the embedded example.
	$(BIN)/edgeopt export --example digits --target android-int8

test: $(STAMP) lint  ## What CI runs: linters, types, unit tests, real conversions.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"  # a file a process

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(STAMP)  ## The benchmarks, an hour; their results are recorded in docs/results.md. More need data: see there.
	$(BIN)/python benchmarks/efficientnet_lite0.py
	$(BIN)/python benchmarks/architectures.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/recipe_auto.py
	$(BIN)/python benchmarks/pruning_unseen.py

clean:
	rm -rf $(VENV) dist build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
