# Every target makes .venv and installs what it needs, if that is missing or older than pyproject.toml or constraints.txt.
# Python 3.11 or 3.12, make and a C compiler are enough: make quickstart

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard parallel/ops/kernels/*.[ch])
# More arguments for pytest: make test PYTEST="-k config"
PYTEST ?=
# Extras that bring in all others.
ALL_EXTRAS := lint,test,clients,docs

.PHONY: help quickstart test test-slow clients lint docs reference bench wheel constraints clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## build four domains from this machine's files, train, show the result, cut one out
	$(BIN)/pangu-sigma corpora --out build/quickstart
	$(BIN)/pangu-sigma quickstart

test: $(VENV)/.installed-test  ## the fast tests
	$(BIN)/python -m pytest --durations=15 -n 2 --dist loadfile $(PYTEST)

test-slow: $(VENV)/.installed-test  ## the long variants; foreign clients in environments of their own, under build/clients/
	$(BIN)/python -m pytest --durations=15 -m slow $(PYTEST)

clients: $(VENV)/.installed-test $(VENV)/.installed-clients  ## foreign clients that the server is tested with, else skipped

lint: $(VENV)/.installed-lint  ## ruff's checks, and the types of what import pangu_sigma gives
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the pages as a site in site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reference: $(VENV)/.installed  ## renew docs/configuration.md
	$(BIN)/python docs/reference.py

bench: $(VENV)/.installed-hf  ## speeds beside PyTorch, extraction beside cp, cluster configurations compiled
	$(BIN)/python -m benchmarks.training_speed
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.extraction
	$(BIN)/python -m benchmarks.plan_compile

wheel: $(VENV)/.installed  ## a wheel in dist/
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# The old constraints.txt stays until the new one is complete. sed: torch's CPU build calls itself 2.13.0+cpu, which only
# this build satisfies; 2.13.0 takes any. pip, setuptools and wheel belong to the environment, not to the project.
constraints:  ## renew constraints.txt: the versions that pyproject.toml's pins bring along today
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --no-compile --editable '.[$(ALL_EXTRAS)]'
	{ echo "# Versions of all that the pins of pyproject.toml bring along, every extra included: what the tests run with."; \
	  echo "# Made by \`make constraints\` with Python 3.11 on Linux; the Makefile's targets install with it."; \
	  build/constraints/bin/python -m pip list --format=freeze --exclude pangu-sigma --exclude pip --exclude setuptools \
	    --exclude wheel | sed 's/+.*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:  ## remove what the targets made, the environment included; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis

# Stamps: an extra is installed only for the targets that need it, so that quickstart does not wait for PyTorch.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or set PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
