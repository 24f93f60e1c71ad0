# Every target does all the set-up that it needs, from a fresh clone, and is fast the second time.
#
#   make demo        both phases on a small real model and 100 pairs
#   make test        the test suite                    make test-slow   what takes minutes
#   make lint        ruff, format, mypy                make test-peers  parity with TRL, in an environment of its own
#   make test-oldest the suite with the lowest accepted versions, in an environment of its own
#   make test-gpu    what only a GPU can show: kernels, attention, both phases, memory
#   make site        the documents as a site, in site/        make docs-errors   docs/errors.md anew
#   make bench       throughput and memory here        make coverage    the test suite with line coverage
#   make figures     README and docs from bench/results/
#   make clean       remove what the above made        make distclean   and the environments
#
# PYTHON names the Python to build with, PIP_FLAGS what pip needs here (for example an index with CPU builds of torch).

PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
PEERS ?= .venv-peers
OLDEST ?= .venv-oldest
DEMO_DIR ?= demo
# A process a core; a file's tests stay together, since they share models and caches that take a while to make.
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DEMO_DIR

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-peers test-gpu test-oldest coverage lint format site docs-errors figures bench clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.installed

# torch goes first and at its exact version: resolving an open range could fetch a build of several gigabytes. Modules
# are compiled when they are first imported: compiling all of what torch brings takes as long as installing it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --no-compile $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]' trl datasets
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --no-compile $(PIP_FLAGS) "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/pip install --quiet --no-compile $(PIP_FLAGS) -c constraints-oldest.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/dpoeng demo --dir $(DEMO_DIR)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(WORKERS)

test-slow: $(VENV)/.extras
	$(VENV)/bin/dpoeng demo --dir $(DEMO_DIR) --prepare-only
	$(VENV)/bin/python -m pytest -m slow

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/dpoeng demo --dir $(DEMO_DIR) --prepare-only
	$(PEERS)/bin/python -m pytest -m peers

test-gpu: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m gpu

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(WORKERS)

coverage: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(WORKERS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=85

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

site: $(VENV)/.extras
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.extras: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[docs,trackers]'
	@touch $@

docs-errors: $(VENV)/.installed
	DPOENG_WRITE_DOCS=1 $(VENV)/bin/python -m pytest tests/cli/test_errors.py -q -k the_page_is

figures: $(VENV)/.installed
	$(VENV)/bin/python -m dpoeng.bench.figures

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(VENV)/bin/dpoeng bench

clean:
	rm -rf build dist site *.egg-info .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS) $(OLDEST)
