#!/usr/bin/env bash
#SBATCH --job-name=bicc-qwen3-30b-a3b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Trains Qwen3-30B-A3B, a mixture of 128 experts, with BICC and RCC, by default on 8 nodes of 8 GPUs of 80 GB.
#
#   DRY_RUN=1 examples/run_bicc_qwen3_30b_a3b.sh       check the run on any machine
#   sbatch --export=ALL,MODEL_PATH=...,TRAIN_DATA=... examples/run_bicc_qwen3_30b_a3b.sh
#   NNODES=8 NODE_RANK=i MASTER_ADDR=host0 MODEL_PATH=... TRAIN_DATA=... examples/run_bicc_qwen3_30b_a3b.sh
#
# examples/common.sh lists the other variables.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_qwen3_30b_a3b.sh
# SLURM runs a copy of this file from another directory
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
# shellcheck source=examples/common.sh
source examples/common.sh

: "${SERVER_GPUS:=4}" # a server's GPUs have a key-value head each; ROLLOUT=split: half of each node serves
# shellcheck disable=SC2034 # common.sh reads it
settings=(--config examples/configs/qwen3_30b_a3b.yaml)

launch 8 "$@"
