#!/usr/bin/env bash
#SBATCH --job-name=bicc-qwen3-4b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# BICC with RCC on Qwen3-4B, the paper's larger policy, on one node of 8 GPUs.
#
#   DRY_RUN=1 examples/run_bicc_qwen3_4b.sh                        on paper, on any machine
#   MODEL_PATH=... TRAIN_DATA=... examples/run_bicc_qwen3_4b.sh    or by sbatch
#
# The other variables are in examples/common.sh.
set -Eeuo pipefail
SCRIPT=examples/run_bicc_qwen3_4b.sh
# SLURM runs a copy of this file from a directory of its own
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[[ -f $SCRIPT ]] || { echo "$SCRIPT: submit the job from the repository's root" >&2 && exit 1; }
# shellcheck source=examples/common.sh
source examples/common.sh

: "${SERVER_GPUS:=2}" # four servers on the node
# shellcheck disable=SC2034 # common.sh reads it
settings=(
    --config examples/configs/qwen3_4b.yaml
    "${SHARED_SETTINGS[@]}"
    parallel.tensor=2                       # two GPUs a replica
)

launch 1 "$@"
