# Three commands do everything on a fresh machine with Python and make:
#   make demo    a real model, real text, two dictionaries, one sentence taken apart
#   make quick   ruff, the type checker and the fast tests, in under three minutes: while you work
#   make test    ruff, the type checker, the tests (real model included), the notebook, the docs;
#                then the host libraries' contracts again, with the oldest SAELens and with SAEBench
# Options: PYTHON=python3.12, TORCH=torch==2.14.0 (any pip requirement), VENV=another/folder,
#          WORKERS=4 (processes that run tests, each on its share of the processors)

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0 ; sys_platform == 'linux'
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
STAMP := $(VENV)/.installed-$(subst /,_,$(TORCH))

# A second environment: the oldest SAELens that pyproject.toml allows, and SAEBench, which holds numpy,
# datasets and pandas back.
HOSTS := $(VENV)-saebench
HOSTS_BIN := $(HOSTS)/bin
HOSTS_FILES := constraints-saebench.txt requirements-saebench.txt
HOSTS_STAMP := $(HOSTS)/.installed-$(subst /,_,$(TORCH))
HOSTS_TESTS := tests/test_contracts_saelens.py tests/test_contracts_transformerlens.py \
	tests/test_architectures.py tests/test_saebench.py

PARALLEL := --numprocesses $(WORKERS) --dist loadfile

.PHONY: demo quick test bench check format docs clean

demo: $(STAMP)
	$(BIN)/itda demo --overwrite

quick: check
	$(BIN)/python -m pytest $(PARALLEL) -m "not real and not saebench and not slow"

test: check $(HOSTS_STAMP)
	$(BIN)/python -m pytest $(PARALLEL)
	$(HOSTS_BIN)/python -m pytest $(PARALLEL) -m "real or saebench" $(HOSTS_TESTS)

# The tables of docs/saebench.md; stop it when you like, it goes on.
bench: $(HOSTS_STAMP)
	$(HOSTS_BIN)/python benchmarks/saebench.py bench-results

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/mkdocs build --strict

# torch goes first and alone, so that nothing else chooses its build. One for CUDA brings its own Triton;
# elsewhere tests run the kernel for GPUs in Triton's interpreter.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e '.[test,ray,nnsight]'
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install --quiet "$(TRITON)"
	rm -f $(VENV)/.installed-*
	touch "$@"

# Without dependencies: SAEBench names torchvision, which it never imports and of which there is no build
# for every build of torch.
$(HOSTS_STAMP): pyproject.toml $(HOSTS_FILES)
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS_BIN)/pip install --quiet "$(TORCH)"
	$(HOSTS_BIN)/pip install --quiet --constraint constraints-saebench.txt -e '.[test]' \
		--requirement requirements-saebench.txt
	$(HOSTS_BIN)/pip install --quiet --no-deps sae-bench==0.6.0
	rm -f $(HOSTS)/.installed-*
	touch "$@"

clean:
	rm -rf $(VENV) $(HOSTS) site dist .pytest_cache .ruff_cache .hypothesis
