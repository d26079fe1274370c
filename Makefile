# SPDX-License-Identifier: Apache-2.0
# Everything a newcomer needs: make demo, make test, make lint, make bench.
#
#   PYTHON=...    the interpreter to build the environment from. If it already has torch >= 2.8, that torch
#                 is used as it is; otherwise torch $(TORCH) is installed.
#   OFFLINE=1     install nothing from outside: needs an interpreter that has torch and setuptools.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH := 2.13.0
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench figures clean

help:
	@echo "make demo    set up, then train on Fashion-MNIST with RING, AdamW and SGD: table and plots"
	@echo "make test    set up, then run every test"
	@echo "make lint    set up, then check style and types"
	@echo "make bench   set up, then run the kernel benchmarks on this machine"
	@echo "make figures set up, then write tables and draw figures again from the kept results"
	@echo "make clean   remove the environment and everything that was built"

# The stamp is as new as what decides the environment; a failed set-up leaves none.
STAMP := $(VENV)/.ready
$(STAMP): pyproject.toml setup.py scripts/setup.sh requirements.txt $(wildcard csrc/*.* csrc/*/*.*)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" OFFLINE="$(OFFLINE)" bash scripts/setup.sh
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(RUN) -m grng compare --task fashion-mnist --optimizers ring,adamw,sgd --epochs 5 --seed 0

test: $(STAMP)
	$(RUN) -m pytest $(shell $(RUN) -c "import xdist" 2>/dev/null && echo "-n 2")

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)

bench: $(STAMP)
	$(RUN) benchmarks/run.py

figures: $(STAMP)
	$(RUN) benchmarks/tables.py
	$(RUN) benchmarks/figures.py

clean:
	rm -rf $(VENV) build grng_kernels/*.so *.egg-info python/*.egg-info
