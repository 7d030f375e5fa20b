# demo, test and lab make their own environment in .venv; the README has the plain commands behind each.
PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: install demo test check lab docs site soak

$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python tools/demo.py

test: install
	$(BIN)/python tools/browser.py    # a Chromium, downloaded where there is none
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test    # two notebooks run side by side: one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests    # and two files of tests

lab: install
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,itk]'
	$(BIN)/jupyter lab --notebook-dir nbs

check: install    # the inner loop: under a minute where one notebook has changed
	$(BIN)/ruff check nbs tests tools benchmarks setup.py results/ablation && $(BIN)/ruff format --check nbs tests tools benchmarks setup.py results/ablation
	$(BIN)/python tools/style.py --check
	$(BIN)/nbdev_export && $(BIN)/python tools/make_readme.py --check && $(BIN)/pyright
	$(BIN)/pytest -q tests/test_layers.py
	for nb in $$(git diff --name-only --diff-filter=d HEAD -- 'nbs/*.ipynb'); do OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path $$nb || exit 1; done

docs: install
	$(BIN)/python tools/make_readme.py

site: install
	$(BIN)/python tools/make_site.py --views    # runs the notebooks that have views; then: python -m http.server -d _site

soak: install    # hours: all faults, other broken files, fifty kills, two hours of training and predicting
	$(BIN)/python tests/faults.py --slow
	$(BIN)/python tests/fuzz.py --seed 1
	$(BIN)/python tests/kills.py --kills 50
	$(BIN)/python tests/soak.py --minutes 120
