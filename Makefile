# make demo   makes the environment, runs the main job on the embedded default, leaves a report
# make test   makes the environment, runs the checks: format, lint, types, tests
# make test-thorough   the tests that take long for what they show, as continuous integration does
# make docs   writes docs/reference/cli.md from the code
# make test-slow      these and the slow ones: kills by the dozen, clusters; make clean

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check test-thorough test-slow docs clean

demo: $(INSTALLED)
	$(BIN)/ldznet demo --out $(OUT)

test: check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not thorough"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-thorough: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "thorough and not slow"

test-slow: test-thorough
	$(BIN)/python -m pytest -q -m slow

docs: $(INSTALLED)
	$(BIN)/python -m jobs.reference

# torch goes first and pinned: a later requirement of it is then met by what is installed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,s3]'
	touch $@

clean:
	rm -rf $(VENV) demo-out ldznet-runs
