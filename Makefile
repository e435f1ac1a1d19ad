# Everything a fresh machine needs: Python 3.11 or newer, make, a C++ compiler and a package index.
#   make demo    install, then harvest, train, evaluate and compare on the embedded language model
#   make test    install, then run the tests
# Both install the project into $(VENV); DEMO and PYTEST pass further arguments, e.g. make demo DEMO="--scale smoke"

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
PYTEST ?=

SOURCES := pyproject.toml constraints.txt CMakeLists.txt README.md \
	$(shell find csrc -type f) $(shell find src -name '*.py' -o -name py.typed)

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/expander-sae demo $(DEMO)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt pyright ruff
	$(VENV)/bin/ruff check src tests benchmarks docs
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# torch first and by its pin: another package that pulls it in could bring a different, much larger build.
$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) build runs
