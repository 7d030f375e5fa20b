# demo, test and lab make their own environment in .venv; the README has the plain commands behind each.
PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: install demo test lab docs soak

$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python tools/demo.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test    # two notebooks run side by side: one thread each
	$(BIN)/pytest tests

lab: install
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,itk]'
	$(BIN)/jupyter lab --notebook-dir nbs

docs: install
	$(BIN)/python tools/make_readme.py

soak: install    # hours: all faults, other broken files, fifty kills, two hours of training and predicting
	$(BIN)/python tests/faults.py --slow
	$(BIN)/python tests/fuzz.py --seed 1
	$(BIN)/python tests/kills.py --kills 50
	$(BIN)/python tests/soak.py --minutes 120
