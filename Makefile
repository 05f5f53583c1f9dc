# `make test` and `make demo` do everything from a fresh clone; the rest is for who works on it.
#   make demo RANKS=4 SEED=1 PROFILE=small ARGS="..."     passed on to launch/demo.py
#   make test ARGS="-k excp -x"                           passed on to pytest
SHELL := bash
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types format bench clean

help:
	@echo "make setup | demo | test | test-slow | lint | types | format | bench | clean"
	@echo "demo takes RANKS=, SEED=, PROFILE= and ARGS=; test and test-slow take ARGS="

setup:
	@scripts/bootstrap.sh

demo: setup
	$(PYTHON) launch/demo.py $(if $(RANKS),--ranks $(RANKS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

test: lint types
	$(PYTHON) -m pytest -m "not slow" $(ARGS)

test-slow: setup
	$(PYTHON) -m pytest -m slow $(ARGS)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup
	$(PYTHON) -m mypy

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: setup
	@set -e; for bench in benchmarks/bench_*.py; do echo "# $$bench"; $(PYTHON) "$$bench"; done

# Leaves .venv alone; remove that folder by hand for an install from nothing.
clean:
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find effx_dist launch tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
