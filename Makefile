# Two commands on a fresh machine: `make quickstart` (set-up and the main job) and `make test`.

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(abspath $(VENV))/bin
# setuptools warns of every editable install
PIP     := PYTHONWARNINGS=ignore $(BIN)/python -m pip --quiet
# What every launch script of examples/ reads; set on the command line: make quickstart CORPUS=DIR RUN=runs/mine
# (what is not set is empty there, and the script's own default holds)
export CORPUS PARTS DATA RUN RANKS TRAIN_ARGS

SOURCES := pyproject.toml constraints.txt setup.py $(wildcard csrc/*)

.PHONY: quickstart compare test faults sanitize kernels lint setup dev clean help

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: setup  ## train v1, v2 and v3 of a small LLaMA by path switching on real text (CPU, minutes)
	@PATH="$(BIN):$$PATH" examples/quickstart.sh

compare: setup  ## train the same increments by ptfs, cpt and lrps and print perplexities beside costs
	@PATH="$(BIN):$$PATH" examples/compare.sh

test: dev  ## the test suite (CPU; what needs a GPU is skipped and says so)
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

faults: dev  ## every fault of tests/faults in its full number, from a fresh seed; writes benchmarks/results/faults.json
	@$(BIN)/python benchmarks/faults.py --output benchmarks/results/faults.json

# The sanitizers and the C++ library, whose exceptions they watch, must be loaded before Python is. A build of its own:
# the one that the package uses stays as it is. numpy and torch keep some memory to the end, which is no leak of ours.
SANITIZED := build/sanitized/_native.so
PRELOADED = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))

sanitize: dev  ## hostile arguments to csrc's CPU code, built with ASan and UBSan (needs g++ with both)
	@mkdir -p $(dir $(SANITIZED))
	$(CXX) -std=c++20 -O1 -g -shared -fPIC -pthread -ffp-contract=off -fsanitize=address,undefined \
	    -fno-sanitize-recover=all $$($(BIN)/python -m pybind11 --includes) $(wildcard csrc/*.cpp) -o $(SANITIZED)
	@LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests:$(CURDIR) \
	    $(BIN)/python tests/faults/test_native_arguments.py $(SANITIZED) 20000 1

kernels: dev  ## machine code of every kernel for every GPU it is shipped for (no GPU needed; the tests compile a share)
	@$(BIN)/python -m megalrps.kernels --check sm_80 sm_90

lint: dev  ## style, types and the floors of the house
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

setup: $(VENV)/.installed  ## the package in its own virtual environment

dev: $(VENV)/.installed-dev  ## the same with what tests and lint need

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt --editable .
	@$(BIN)/python -c 'import megalrps._native' 2>/dev/null || \
	    echo 'WARNING: megalrps._native was not built (it needs a C++20 compiler). Everything works; numpy computes the sample order, torch AdamW.'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## remove build products (never runs/)
	rm -rf build dist *.egg-info megalrps/*.so .pytest_cache .mypy_cache .ruff_cache
