# make train [ARGS="..."]   install into .venv if need be, then train (without ARGS: the demo)
# make test  [ARGS="..."]   install, then pytest
# make lint                 install, then ruff and mypy
# make gpu PYTHON=python3   no install, no network: build csrc and run the tests that need a GPU with this interpreter
# make clean                remove what was built; .venv stays, the next make installs into it again
PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: train test lint gpu clean

train: $(STAMP)
	$(PY) -m ssr_fast.train $(ARGS)

test: $(STAMP)
	$(PY) -m pytest $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# all extras in one go; where one of them cannot be had, the rest without it
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[dev,dali,xformers]' || { $(INSTALL) -e '.[dev]' && for extra in dali xformers; do \
	  $(INSTALL) -e ".[$$extra]" || echo "ssr_fast: the extra $$extra cannot be installed here; going on without it"; done; }
	@$(PY) -m ssr_kernels.library
	@touch $@

gpu:
	$(PYTHON) setup.py -q build_csrc --inplace
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -m gpu $(ARGS)

clean:
	rm -rf build dist *.egg-info kernels/ssr_kernels/lib .mypy_cache .ruff_cache .pytest_cache $(STAMP)
