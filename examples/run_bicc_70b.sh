#!/usr/bin/env bash
#SBATCH --job-name=bicc-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# BICC with RCC on a Llama-3.x-70B or Qwen2.5-72B policy, 8 nodes of 8 GPUs of 80 GB unless told otherwise.
#
#   MODEL=llama|qwen                                   which of the two; MODEL_PATH must be of that kind
#   DRY_RUN=1 examples/run_bicc_70b.sh                 on paper, on any machine
#   sbatch --export=ALL,MODEL_PATH=...,TRAIN_DATA=... examples/run_bicc_70b.sh
#   NNODES=8 NODE_RANK=i MASTER_ADDR=host0 MODEL_PATH=... TRAIN_DATA=... examples/run_bicc_70b.sh
#
# The other variables are in examples/common.sh.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_70b.sh
# SLURM runs a copy of this file from a directory of its own
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
# shellcheck source=examples/common.sh
source examples/common.sh

case ${MODEL:=llama} in
llama) settings=(--config examples/configs/llama_70b.yaml) ;;
qwen) settings=(--config examples/configs/qwen2.5_72b.yaml) ;;
*) fail "MODEL is $MODEL; it must be llama or qwen" ;;
esac

settings+=("${SHARED_SETTINGS[@]}")
if [[ $ROLLOUT == split ]]; then
    : "${SERVER_GPUS:=$((GPUS_PER_NODE / 2))}" # half of each node serves
    settings+=(parallel.tensor=4 parallel.pipeline=4) # tensor parallel within the half that trains
else
    : "${SERVER_GPUS:=8}"                   # one server over all GPUs of a node
    settings+=(parallel.tensor=8 parallel.pipeline=4) # tensor parallel within a node, pipeline over four
fi

launch 8 "$@"
