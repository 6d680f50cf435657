# make demo and make test set up all they need in .venv, from python3, make and g++ alone; a second run is cheap.
#
# Variables: PYTHON (interpreter that makes the environment), VENV (its folder), EXTRA (cuda13, cuda12 or nvrtc),
# JOBS (test processes), ARGS (more arguments for demo, bench and pytest).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ifndef EXTRA
EXTRA := $(shell $(PYTHON) .ci/extra.py)
endif
ifndef JOBS
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 2); if [ $$n -gt 8 ]; then n=8; fi; echo $$n)
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.made-$(EXTRA)
LINT := $(VENV)/.made-lint
BENCH := $(VENV)/.made-bench
COVERAGE := $(VENV)/.made-coverage

.DELETE_ON_ERROR:
.PHONY: help setup demo test gpu-test lint format types wheel coverage mutants bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(BASE) ## make the environment that demo and test need

demo: $(BASE) ## answer 18 requests with 5 LoRA adapters in one batch, each checked against its merged model
	$(PY) -m cupy_lora demo $(ARGS)

test: $(BASE) ## run every test that this machine can run
	@command -v g++ >/dev/null || { echo "make test: expected g++ (it compiles the CUDA sources for the CPU)"; exit 1; }
	$(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

gpu-test: $(BASE) ## run the GPU tests; a missing GPU is a failure
	CUPY_LORA_REQUIRE_GPU=1 $(PY) -m pytest -n 0 -m gpu $(ARGS)

lint: $(LINT) ## check Python and CUDA style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cu' '*.cuh' '*.h' '*.cpp')

format: $(LINT) ## rewrite Python and CUDA sources in the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cu' '*.cuh' '*.h' '*.cpp')

types: $(LINT) ## mypy --strict
	$(VENV)/bin/mypy

wheel: $(BASE) ## build the sdist and, from it, the wheel into dist/, and test the wheel
	rm -rf dist
	$(VENV)/bin/hatchling build --target sdist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist dist/*.tar.gz
	CUPY_LORA_DIST=dist $(PY) -m pytest -n 0 tests/test_packaging.py

coverage: $(COVERAGE) ## coverage of the Python side, and of the CUDA sources as the CPU runs them
	rm -f .coverage .coverage.*
	$(PY) -m coverage run -m pytest -n 0 -q
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report
	$(PY) tests/simt/gcov.py -n $(JOBS) $(ARGS)

mutants: $(BASE) ## change the kernels one place at a time: do the tests without a GPU notice?
	$(PY) tests/simt/mutants.py --jobs $(JOBS) $(ARGS)

bench: $(BENCH) ## time every op on the GPU
	$(PY) -m bench $(ARGS)

clean: ## remove the environment and everything built
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: expected Python 3.10 or newer as $(PYTHON), got $$($(PYTHON) --version 2>&1); set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	    { echo "make: expected a $(PYTHON) with venv and ensurepip (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(PY)
	@test -n "$(EXTRA)" || { echo "make: no extra fits this machine (see above); set EXTRA="; exit 1; }
	$(PIP) --editable '.[$(EXTRA),test]'
	@touch $@

$(LINT): pyproject.toml | $(PY)
	$(PIP) --editable '.[lint]'
	@touch $@

$(BENCH): $(BASE)
	$(PIP) --editable '.[$(EXTRA),bench]'
	@touch $@

$(COVERAGE): $(BASE)
	$(PIP) --editable '.[$(EXTRA),coverage]'
	@touch $@
