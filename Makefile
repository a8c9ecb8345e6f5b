# Two commands do everything, from a fresh clone with only Python and pip:
#   make demo    trains on real data with and without Eva; prints a table and the path of a plot
#   make test    lint, types and tests
# And one that takes four minutes more:
#   make test-train    the tests of the training program, examples/train
# PYTHON chooses the interpreter, DEMO passes options to the demo (DEMO=--small for a quick look).

PYTHON ?= python3
VENV := .venv
DEMO ?=

.PHONY: demo test test-train clean

demo: $(VENV)/examples
	$(VENV)/bin/python examples/quickstart.py $(DEMO)

test: $(VENV)/test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/pytest

test-train: $(VENV)/test
	$(VENV)/bin/pytest -m "train and not slow"

$(VENV)/examples: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/test: $(VENV)/examples
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) results
