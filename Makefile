SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup sglang te apex demo experiment test dry-run lint bench profile gpu-check sanitize

export PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV_PYTHON := $(CURDIR)/.venv/bin/python
PACKAGES := .venv/.packages
SGLANG := .venv-sglang/.packages
BUILD := .venv/.build
# One thread per process: the tests and the demo start several processes on few cores.
export OMP_NUM_THREADS ?= 1

help: ## List all targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(BUILD) ## Create .venv with pinned packages and build csrc in place
	@echo "ready: .venv/bin/python"

sglang: $(SGLANG) ## Create .venv-sglang with SGLang, the rollout server; its CPU build without a GPU
	@echo "ready: .venv-sglang/bin/python -m sglang.launch_server"

te: $(BUILD) ## Build Transformer Engine for .venv, on a host with GPUs
	@tools/setup.sh te

apex: $(BUILD) ## Build NVIDIA's apex for .venv, on a host with GPUs and nvcc; not needed where Transformer Engine is
	@tools/setup.sh apex

demo: $(BUILD) $(if $(filter sglang,$(ENGINE)),$(SGLANG)) ## Train the tiny policy: STEPS=n SEED=n ALGORITHM=bicc|grpo ENGINE=local|sglang OUT=dir
	@PYTHON="$(VENV_PYTHON)" examples/run_bicc_tiny.sh

experiment: $(BUILD) ## Compare GRPO, BICC and RCC on the tiny policy and write docs/results.md (about an hour on 2 cores)
	@MEGATRON_BICC_DEVICE=cpu $(VENV_PYTHON) -W ignore tools/run_experiment.py

test: $(BUILD) $(SGLANG) ## Run all tests, two files at a time; TESTS=path selects some
	@# in the order of tests/conftest.py, not files with many tests first
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)
	@# in a process of their own: all other tests hide the GPUs
	@if [[ -z "$(TESTS)" ]] && nvidia-smi -L >/dev/null 2>&1; then $(VENV_PYTHON) -m pytest -m gpu; fi

dry-run: $(BUILD) ## Check a run without starting it or needing a GPU: CONFIG=file WORLD_SIZE=processes SETTINGS="a=b ..."
	@WORLD_SIZE=$(or $(WORLD_SIZE),1) $(VENV_PYTHON) -m megatron_bicc.train --config $(CONFIG) --dry-run $(SETTINGS)

lint: $(BUILD) ## Run ruff, and shellcheck if it is installed
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@if command -v shellcheck >/dev/null; then shellcheck $$(git ls-files '*.sh' .ci/run); \
	else echo "shellcheck is not installed: shell scripts not checked"; fi

bench: $(BUILD) ## Run every benchmark of tools/benchmark.py
	@for benchmark in $$(cd tools/benchmarks && ls [!_]*.py); do \
	echo "== $${benchmark%.py}"; $(VENV_PYTHON) tools/benchmark.py "$${benchmark%.py}"; done

profile: $(BUILD) ## Profile a training step of the tiny policy
	@$(VENV_PYTHON) tools/benchmark.py profile

gpu-check: $(BUILD) ## Check on this machine's GPUs what no CPU can show (docs/gpu_check.md): PART=name OUT=dir
	@$(VENV_PYTHON) tools/gpu_check.py $(PART) $(if $(OUT),--out $(OUT))

sanitize: $(BUILD) ## Run the packer with address and undefined-behaviour sanitizers: INPUTS=n malformed inputs
	@PYTHON="$(VENV_PYTHON)" tools/sanitize_packer.sh $(INPUTS)

$(PACKAGES): requirements.lock requirements-cuda.lock tools/setup.sh
	@tools/setup.sh packages
	@touch $@

$(SGLANG): requirements-sglang.lock requirements-sglang-cuda.lock tools/setup.sh $(shell find tools/sglang_cpu -type f)
	@tools/setup.sh sglang
	@touch $@

$(BUILD): $(PACKAGES) setup.py pyproject.toml $(shell find csrc -type f)
	@tools/setup.sh build
	@touch $@
