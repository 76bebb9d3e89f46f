# Every target sets up .venv by itself when it is missing or older than pyproject.toml and constraints.txt.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
TOOLS := $(VENV)/.tools-installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Workers of pytest share the cores: one thread each.
PYTEST := OMP_NUM_THREADS=1 WANDB_MODE=disabled $(BIN)/pytest
WORKERS ?= 2
# Neighbouring tests stay together, so that what a module sets up once is set up once.
PARALLEL = -n $(WORKERS) --dist worksteal
# Where the tensors are, and a few whole runs of growth: these tests also run with every argument's and result's type and
# shape checked (jaxtyping, beartype), which slows them by half and more; the three left out for their time add no function.
TYPED := tests/linalg tests/convolution tests/statistics tests/solvers/closed_forms tests/solvers/functional \
	tests/solvers/methods tests/hazards/test_precision.py tests/referees/test_gromo.py tests/growth/test_learning_rate.py \
	tests/growth/test_round.py tests/training/test_build.py \
	-k "not all_paths_agree and not study_geometry and not planted_channels"

.PHONY: run test test-slow test-long lint types notebooks docs study wheel clean

run: $(RUNTIME)  ## the default growth run: a small CNN on scikit-learn's digits, and a report of it
	$(BIN)/growconv

test: $(TOOLS)  ## all tests but the slow and the long ones
	$(PYTEST) $(PARALLEL) $(ARGS)

test-slow: $(TOOLS)  ## proofs of many seconds: kills, sweeps, several processes, Slurm, every recipe, the README's examples
	$(PYTEST) $(PARALLEL) -m slow $(ARGS)

test-long: $(TOOLS)  ## proofs of many minutes: twenty kills, full training runs
	$(PYTEST) -m long $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(TOOLS)  ## pyright, then the tests of the mathematics with types and shapes checked as they run
	$(BIN)/pyright
	$(PYTEST) $(PARALLEL) --jaxtyping-packages=growconv,beartype.beartype $(TYPED)

notebooks: $(TOOLS)  ## runs every notebook
	$(PYTEST) -n $(WORKERS) --nbmake notebooks

docs: $(TOOLS)  ## the documentation, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

study: $(TOOLS)  ## all methods on digits, both parts, in a few minutes
	$(BIN)/growconv study experiments/studies/digits_quick/study.yaml --processes $(WORKERS) $(ARGS)

wheel: $(TOOLS)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist

$(RUNTIME): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "growconv needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch  # first and alone, so that the pinned build is the one that everything else meets
	$(PIP) -e '.[sweep]'
	touch $@

$(TOOLS): $(RUNTIME)
	$(PIP) -e '.[sweep,bench,test,lint,docs]'
	$(PIP) --no-deps pytorchcv  # asks for torchvision otherwise, which breaks next to a CPU-only torch
	touch $@
