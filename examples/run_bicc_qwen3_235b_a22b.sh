#!/usr/bin/env bash
#SBATCH --job-name=bicc-qwen3-235b-a22b
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Trains Qwen3-235B-A22B, a mixture of 128 experts, with BICC and RCC, by default on 32 nodes of 8 GPUs of 80 GB and
# on servers elsewhere: a server on 8 GPUs takes 59 GB of each for its weights, more than the policy leaves.
# ROLLOUT=colocate needs GPUs of 141 GB.
#
#   DRY_RUN=1 examples/run_bicc_qwen3_235b_a22b.sh     check the run on any machine
#   sbatch --export=ALL,MODEL_PATH=...,TRAIN_DATA=...,SERVERS=... examples/run_bicc_qwen3_235b_a22b.sh
#   NNODES=32 NODE_RANK=i MASTER_ADDR=host0 MODEL_PATH=... TRAIN_DATA=... SERVERS=... \
#       examples/run_bicc_qwen3_235b_a22b.sh
#
# examples/common.sh lists the other variables.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_qwen3_235b_a22b.sh
# SLURM runs a copy of this file from another directory
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
: "${ROLLOUT:=attach}"
[[ -z ${DRY_RUN:-} ]] || : "${SERVERS:=http://server0:30000}" # a dry run contacts none
# shellcheck source=examples/common.sh
source examples/common.sh

: "${SERVER_GPUS:=8}" # a server on all GPUs of a node
# shellcheck disable=SC2034 # common.sh reads it
settings=(--config examples/configs/qwen3_235b_a22b.yaml)

launch 32 "$@"
