#!/usr/bin/env bash
#SBATCH --job-name=bicc-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Trains a Llama-3.x-70B or Qwen2.5-72B policy with BICC and RCC, by default on 8 nodes of 8 GPUs of 80 GB.
#
#   MODEL=llama|llama_32k|qwen                         which configuration; MODEL_PATH must match
#   DRY_RUN=1 examples/run_bicc_70b.sh                 check the run on any machine
#   sbatch --export=ALL,MODEL_PATH=...,TRAIN_DATA=... examples/run_bicc_70b.sh
#   NNODES=8 NODE_RANK=i MASTER_ADDR=host0 MODEL_PATH=... TRAIN_DATA=... examples/run_bicc_70b.sh
#
# examples/common.sh lists the other variables.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_70b.sh
# SLURM runs a copy of this file from another directory
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
# shellcheck source=examples/common.sh
source examples/common.sh

case ${MODEL:=llama} in
llama) settings=(--config examples/configs/llama_70b.yaml) ;;
llama_32k) settings=(--config examples/configs/llama_70b_32k.yaml) ;; # responses of up to 32,768 tokens
qwen) settings=(--config examples/configs/qwen2.5_72b.yaml) ;;
*) fail "MODEL is $MODEL; it must be llama, llama_32k or qwen" ;;
esac

if [[ $ROLLOUT == split ]]; then
    : "${SERVER_GPUS:=$((GPUS_PER_NODE / 2))}" # half of each node serves
    settings+=(parallel.tensor=4)              # tensor parallel within the half that trains
else
    : "${SERVER_GPUS:=8}"                      # one server on all GPUs of a node
fi

launch 8 "$@"
