SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup sglang demo experiment test dry-run lint bench profile sanitize

export PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV_PYTHON := $(CURDIR)/.venv/bin/python
PACKAGES := .venv/.packages
SGLANG := .venv-sglang/.packages
BUILD := .venv/.build
# One thread a process: the tests and the demo start several processes on few cores.
export OMP_NUM_THREADS ?= 1

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(BUILD) ## .venv with pinned packages, csrc built in place
	@echo "ready: .venv/bin/python"

sglang: $(SGLANG) ## .venv-sglang: SGLang, the rollout server; without a GPU its CPU build
	@echo "ready: .venv-sglang/bin/python -m sglang.launch_server"

demo: $(BUILD) $(if $(filter sglang,$(ENGINE)),$(SGLANG)) ## Train the tiny policy: STEPS=n SEED=n ALGORITHM=bicc|grpo ENGINE=local|sglang OUT=dir
	@PYTHON="$(VENV_PYTHON)" examples/run_bicc_tiny.sh

experiment: $(BUILD) ## Compare grpo, bicc and rcc on the tiny policy, write docs/results.md: about an hour on 2 cores
	@$(VENV_PYTHON) -W ignore tools/run_experiment.py

test: $(BUILD) $(SGLANG) ## All tests, two files at a time; TESTS=path picks some
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile $(TESTS)

dry-run: $(BUILD) ## A run on paper, without a GPU: CONFIG=file WORLD_SIZE=processes SETTINGS="a=b ..."
	@WORLD_SIZE=$(or $(WORLD_SIZE),1) $(VENV_PYTHON) -m megatron_bicc.train --config $(CONFIG) --dry-run $(SETTINGS)

lint: $(BUILD) ## ruff, and shellcheck where it is installed
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@if command -v shellcheck >/dev/null; then shellcheck $$(git ls-files '*.sh' .ci/run); \
	else echo "shellcheck is not installed: shell scripts not checked"; fi

bench: $(BUILD) ## Every benchmark of tools/benchmark.py
	@for benchmark in $$(cd tools/benchmarks && ls [!_]*.py); do \
	echo "== $${benchmark%.py}"; $(VENV_PYTHON) tools/benchmark.py "$${benchmark%.py}"; done

profile: $(BUILD) ## What costs most in a training step of the tiny policy
	@$(VENV_PYTHON) tools/benchmark.py profile

sanitize: $(BUILD) ## The packer under the address and undefined-behaviour sanitizers: INPUTS=n malformed ones
	@PYTHON="$(VENV_PYTHON)" tools/sanitize_packer.sh $(INPUTS)

$(PACKAGES): requirements.lock tools/setup.sh
	@tools/setup.sh packages
	@touch $@

$(SGLANG): requirements-sglang.lock tools/setup.sh $(shell find tools/sglang_cpu -type f)
	@tools/setup.sh sglang
	@touch $@

$(BUILD): $(PACKAGES) setup.py pyproject.toml $(shell find csrc -type f)
	@tools/setup.sh build
	@touch $@
