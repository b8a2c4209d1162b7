#!/usr/bin/env bash
# Trains examples/tiny_policy with BICC and RCC on two CPU processes (tensor parallel).
#   STEPS=n SEED=n ALGORITHM=bicc|grpo ENGINE=local|sglang OUT=dir examples/run_bicc_tiny.sh [section.name=value ...]
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
settings=(--config examples/configs/tiny.yaml)
[[ -z ${STEPS:-} ]] || settings+=("train.steps=$STEPS")
[[ -z ${SEED:-} ]] || settings+=("seed=$SEED")
[[ -z ${ALGORITHM:-} ]] || settings+=("algorithm=$ALGORITHM")
[[ -z ${ENGINE:-} ]] || settings+=("rollout.engine=$ENGINE")
[[ -z ${OUT:-} ]] || settings+=("output_dir=$OUT")

# checks the run; an error is one line here, before torchrun's long output
WORLD_SIZE=2 "$PYTHON" -m megatron_bicc.train "${settings[@]}" "$@" dry_run=true

# --standalone takes any free port, so that two runs can share a machine
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_bicc.train "${settings[@]}" "$@"
