# make train [ARGS="..."]   install into .venv if need be, then train (without ARGS: the demo)
# make test  [ARGS="..."]   install, then pytest
# make lint                 install, then ruff and mypy
# make gpu PYTHON=python3   no install, no network: build csrc, device tests, compute-sanitizer and benchmarks with this
#                           interpreter's packages; ARGS="tests bench" runs these steps only, MINUTES=60 gives it more
#                           than 9.5 minutes
# make clean                remove what was built; .venv stays, the next make installs into it again
PYTHON ?= python3
ARGS ?=
MINUTES ?= 9.5

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
IMPORTED := ssr_fast.train ssr_fast.arguments ssr_fast.session matplotlib.figure matplotlib.backends.backend_agg
PACKAGES := -c constraints.txt -e '.[dali,dev]'
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test lint gpu clean

train: $(STAMP)
	$(PY) -m ssr_fast.train $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# uv installs several times faster than pip; where it cannot be had or cannot reach the index, pip does it
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --disable-pip-version-check -q uv && $(PY) -m uv pip install --python $(PY) $(PACKAGES) \
	  || $(PY) -m pip install --disable-pip-version-check $(PACKAGES)
	@$(PY) -m ssr_kernels.library
	@$(PY) -m ssr_fast.engine.fork_server $(IMPORTED)  # compiles what it imports, so that the first run need not
	@touch $@

gpu:
	@$(PYTHON) -m bench.gpu --minutes $(MINUTES) $(ARGS)

clean:
	rm -rf build dist *.egg-info kernels/ssr_kernels/lib .mypy_cache .ruff_cache .pytest_cache $(STAMP)
