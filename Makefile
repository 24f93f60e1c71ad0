# Every target does all the set-up that it needs, from a fresh clone, and is fast the second time.
#
#   make demo        both phases on a small real model and 80 pairs
#   make test        the test suite                    make test-slow   what takes minutes
#   make lint        ruff, format, mypy                make test-peers  parity with TRL, in an environment of its own
#   make test-oldest the suite with the lowest accepted versions, in an environment of its own
#   make test-newest the suite with the newest versions, in an environment of its own
#   make test-gpu    what only a GPU can show: kernels, attention, both phases, memory
#   make gpu-evidence the first minutes on a GPU: kernels, attention, steps, tests; results stage by stage
#   make site        the documents as a site, in site/        make docs-errors   docs/errors.md anew
#   make bench       throughput and memory here        make coverage    the test suite with line coverage
#   make figures     README and docs from bench/results/
#   make dist        source archive and wheel of the last commit, in dist/
#   make mutants     planted mistakes: do the tests notice?   make attacks   hostile files against the command line
#   make clean       remove what the above made        make distclean   and the environments
#
# PYTHON names the Python to build with, PIP_FLAGS what pip needs here (for example an index with CPU builds of torch).

PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
PEERS ?= .venv-peers
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
# The newest torch that a package index has as a CPU build; with another index (PIP_FLAGS) name a newer one.
NEWEST_TORCH ?= 2.13.0
DEMO_DIR ?= demo
# A process a core; a file's tests stay together, since they share models and caches that take a while to make.
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1

COMMA := ,
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# $(call pip_install,VENV,ARGUMENTS). Modules are compiled when they are first imported: compiling all of what torch
# brings takes as long as installing it. An index that is a folder gets a warning for each package that it lacks, which
# nobody can act on; pip's other warnings and its errors are shown, and its exit status counts.
define pip_install
	$(1)/bin/pip install --quiet --no-compile $(PIP_FLAGS) $(2) 2>&1 \
		| { grep --line-buffered -v "is ignored: it is neither a file nor a directory" >&2 || true; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo mutants attacks test test-slow test-peers test-gpu gpu-evidence test-oldest test-newest coverage lint format site docs-errors figures \
	bench dist clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.installed

# torch goes first and at its exact version: resolving an open range could fetch a build of several gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call pip_install,$(VENV),"$$(grep '^torch==' constraints.txt)")
	$(call pip_install,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(call pip_install,$(PEERS),"$$(grep '^torch==' constraints.txt)")
	$(call pip_install,$(PEERS),-c constraints.txt -e '.[dev]' trl datasets)
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(call pip_install,$(OLDEST),"$$(grep '^torch==' constraints-oldest.txt)")
	$(call pip_install,$(OLDEST),-c constraints-oldest.txt -e '.[dev]')
	@touch $@

$(NEWEST)/.installed: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(call pip_install,$(NEWEST),"torch==$(NEWEST_TORCH)")
	$(call pip_install,$(NEWEST),-c constraints-newest.txt "torch==$(NEWEST_TORCH)" -e '.[dev]')
	@touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/dpoeng demo --dir $(DEMO_DIR)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(WORKERS)

test-slow: $(VENV)/.extras
	$(VENV)/bin/dpoeng demo --dir $(DEMO_DIR) --prepare-only
	$(VENV)/bin/python -m pytest $(WORKERS) -m slow --ignore tests/bench
	$(VENV)/bin/python -m pytest -m slow tests/bench  # measures: alone on the machine

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/dpoeng demo --dir $(DEMO_DIR) --prepare-only
	$(PEERS)/bin/python -m pytest -m peers

test-gpu: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m gpu

# Each stage's result is written when it is there. EVIDENCE names the folder.
EVIDENCE ?= gpu-evidence
gpu-evidence: $(VENV)/.installed
	$(VENV)/bin/python -m dpoeng.bench.evidence --output $(EVIDENCE)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(WORKERS)

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(WORKERS)

coverage: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(WORKERS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=85

mutants: $(VENV)/.installed
	$(VENV)/bin/python tests/support/mutants.py --record tests/mutants.md

attacks: $(VENV)/.installed
	$(VENV)/bin/python tests/support/attacks.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

site: $(VENV)/.extras
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.extras: $(VENV)/.installed
	$(call pip_install,$(VENV),-c constraints.txt -e '.[docs$(COMMA)trackers]')
	@touch $@

docs-errors: $(VENV)/.installed
	DPOENG_WRITE_DOCS=1 $(VENV)/bin/python -m pytest tests/cli/test_errors.py -q -k the_page_is

figures: $(VENV)/.installed
	$(VENV)/bin/python -m dpoeng.bench.figures

# Of what is committed, in a folder of its own: a build in the tree would take along what an earlier one left there.
dist: $(VENV)/.installed
	$(call pip_install,$(VENV),-c constraints.txt -e '.[release]')
	rm -rf dist build/dist && mkdir -p build/dist
	git archive HEAD | tar -x -C build/dist
	$(VENV)/bin/python -m build --outdir dist build/dist
	$(VENV)/bin/twine check --strict dist/*

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(VENV)/bin/dpoeng bench

clean:
	rm -rf build dist site src/*.egg-info .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS) $(OLDEST) $(NEWEST)
