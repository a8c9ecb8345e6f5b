# Two commands do everything, from a fresh clone with only Python and pip:
#   make demo    trains on real data with and without Eva; prints a table and the path of a plot
#   make test    lint, types and tests
# Two more make the documentation:
#   make docs    serves it and follows changes; EXECUTE_NOTEBOOKS=true runs the notebook for its outputs
#   make site    builds it strictly into site/, checks its links, and runs the code that it shows
# And one that takes four minutes more:
#   make test-train    the tests of the training program, examples/train
# PYTHON chooses the interpreter, DEMO passes options to the demo (DEMO=--small for a quick look).

PYTHON ?= python3
VENV := .venv
DEMO ?=

.PHONY: demo test test-train docs site clean

demo: $(VENV)/examples
	$(VENV)/bin/python examples/quickstart.py $(DEMO)

test: $(VENV)/test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/pytest

docs: $(VENV)/docs
	$(VENV)/bin/mkdocs serve

site: $(VENV)/docs $(VENV)/test
	$(VENV)/bin/mkdocs build --strict
	$(VENV)/bin/pytest -n 0 tests/test_site.py
	$(VENV)/bin/pytest -m 'docs and not slow'

test-train: $(VENV)/test
	$(VENV)/bin/pytest -m "train and not slow"

$(VENV)/examples: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/test: $(VENV)/examples
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/examples
	$(VENV)/bin/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .cache results site
