# Two commands do everything on a fresh machine with Python and make:
#   make demo    a real model, real text, two dictionaries, one sentence taken apart
#   make test    ruff, the type checker, the tests (real model included), the notebook, the docs
# Options: PYTHON=python3.12, TORCH=torch==2.14.0 (any pip requirement), VENV=another/folder

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
STAMP := $(VENV)/.installed-$(subst /,_,$(TORCH))

.PHONY: demo test check format docs clean

demo: $(STAMP)
	$(BIN)/itda demo --overwrite

test: check
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/mkdocs build --strict

# torch goes first and alone, so that nothing else chooses its build.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e '.[test]'
	rm -f $(VENV)/.installed-*
	touch "$@"

clean:
	rm -rf $(VENV) site dist .pytest_cache .ruff_cache .hypothesis
