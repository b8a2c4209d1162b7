#!/usr/bin/env bash
#SBATCH --job-name=bicc-qwen3-4b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Trains Qwen3-4B, the paper's larger policy, with BICC and RCC on one node of 8 GPUs.
#
#   DRY_RUN=1 examples/run_bicc_qwen3_4b.sh                        check the run on any machine
#   MODEL_PATH=... TRAIN_DATA=... examples/run_bicc_qwen3_4b.sh    or with sbatch
#
# examples/common.sh lists the other variables.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_qwen3_4b.sh
# SLURM runs a copy of this file from another directory
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
# shellcheck source=examples/common.sh
source examples/common.sh

: "${SERVER_GPUS:=2}" # four servers per node
# shellcheck disable=SC2034 # common.sh reads it
settings=(--config examples/configs/qwen3_4b.yaml)

launch 1 "$@"
