PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-cluster test-browser docs lint types bench

demo: $(READY)
	$(BIN)/causalcone demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# starts clusters on this machine, which takes minutes
test-cluster: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[cluster]'
	$(BIN)/python -m pytest tests/test_sweep_cluster.py

# opens the report's page in chromium, which Debian has with its chromium-driver
test-browser: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest tests/test_report_browser.py

# the pages of docs/ as a site in build/site, with the reference from docstrings
docs: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	rm -rf build/docs
	$(BIN)/pip wheel -q --no-deps -w build/docs .
	$(BIN)/pip install -q --no-deps --target build/docs/site build/docs/*.whl
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as users get it: from a wheel, with the folders under their installed names
types: $(READY)
	rm -rf build
	$(BIN)/pip wheel -q --no-deps -w build/types .
	$(BIN)/pip install -q --no-deps --target build/types/site build/types/*.whl
	cd build/types && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml -p causalcone

bench: $(READY)
	$(BIN)/python bench/trace.py --naive-fraction 0.03 --repeats 1
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/architectures.py --prompts 10
	$(BIN)/python bench/editing.py
	$(BIN)/python bench/sweep.py --studies long
	$(BIN)/python bench/streaming.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $(READY)
