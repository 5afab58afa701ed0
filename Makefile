# Every target sets up what it needs in .venv: on a fresh machine with Python 3.11+, `make demo` is all there is to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint notebooks notebooks-short clean

demo: $(VENV)/run.done
	$(BIN)/python -m experiments.demo

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=5 -n auto

lint: $(VENV)/dev.done
	$(BIN)/ruff check .

notebooks: $(VENV)/run.done
	$(BIN)/python notebooks/run.py

notebooks-short: $(VENV)/run.done
	$(BIN)/python notebooks/run.py --check
	$(BIN)/python notebooks/run.py --short --jobs 2

$(VENV)/%.done:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/run.done: requirements.txt
$(VENV)/dev.done: requirements-dev.txt requirements.txt

clean:
	rm -rf $(VENV) demo notebooks/work .notebooks-*
