# make reproduce            the default run: digits, from data to report
# make reproduce RUN=cifar10-mbv2               of data/configs/cifar10-mbv2.yml
# make reproduce CONFIG=path/to/mine.yml        as run `mine`, or as RUN= says
# make evidence             searched, random and hand-made networks of equal cost: digits in miniature, or RUN=, CONFIG=
# make test                 every test, notebooks included, after make lint
# make lint                 style, types, and which module may import which: seconds
# make setup | lock | notebooks
PYTHON ?= python3
BIN := .venv/bin
# Taken as they are typed and handed on in the environment: neither make nor a shell reads what stands in them.
override RUN := $(value RUN)
override CONFIG := $(value CONFIG)
export RUN CONFIG CORES
export PATH := $(CURDIR)/$(BIN):$(PATH)

# By its path, not as densenas.pipeline: PyTorch would be imported before the first Ctrl-C is heard.
PIPELINE := $(BIN)/python -P densenas/pipeline.py

.PHONY: setup reproduce evidence lint test notebooks lock
.DEFAULT_GOAL := setup

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DenseNAS needs Python 3.11 or newer, set PYTHON")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

reproduce: setup
	@$(PIPELINE)

evidence: setup
	@$(PIPELINE) evidence

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/pytest --numprocesses "$${CORES:-$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}" --dist worksteal tests
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

# Runs every notebook at its defaults and keeps the outputs, which are committed: from scratch, or what an earlier demo
# left behind would be gone on from, and no progress shown.
notebooks: setup
	rm -rf runs/demo reports/demo
	for notebook in notebooks/*.ipynb; do \
		$(BIN)/papermill --cwd notebooks --no-progress-bar $$notebook $$notebook || exit 1; done

lock:
	uv pip compile --universal --python-version 3.11 --extra dev --upgrade --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
