# make quickstart   installs into .venv, trains, judges, reports
# make test         installs what is missing, runs the fast tests (test-slow: the others, and with
#                   Chromium, where it is installed, what it makes of the pages)
# make check        format, lint, types, generated files
# make bench        training here and by plain TRL, into docs/performance.md; about an hour
# make fuzz         odd recipes, rows and pictures, into docs/security.md; ten minutes

PYTHON ?= python3
BIN := .venv/bin
# Two test processes of one thread each use two cores better than one of two
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

.PHONY: quickstart install dev test test-slow check bench fuzz docs clean

# One thread: nano is too small for more, and slower with two
quickstart: install
	OMP_NUM_THREADS=1 $(BIN)/finetune train recipes/quickstart.yaml --overwrite

install: .venv/installed
dev: .venv/installed-dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch first: the constraints pin it, and other packages then find it in place
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: dev
	$(PYTEST) -m "not slow and not gpu"

# Whole trainings; a file's stay together, for what they share. Those that look at the clock come
# after the others, by themselves
test-slow: dev
	$(PYTEST) --dist loadfile -m "slow and not gpu and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "alone and not gpu"

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m finetune.recipe.docs --check
	$(BIN)/python -m scripts.bad_rows_table --check

# Seconds are compared, so nothing else should run meanwhile
bench: dev
	$(BIN)/python -m scripts.bench_train --out docs/performance.md --results docs/performance.json

# Without atheris, of which not every Python has a build, inputs are changed at random
fuzz: dev
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m scripts.fuzz --seconds 180 --out docs/security.md

docs: dev
	$(BIN)/python -m finetune.recipe.docs
	$(BIN)/python -m scripts.bad_rows_table

clean:
	rm -rf .venv runs dist build
