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
SERVER_GPUS=${SERVER_GPUS:-2} # four servers on the node
# shellcheck source=examples/common.sh
source examples/common.sh

# shellcheck disable=SC2034 # common.sh reads it
settings=(
    --config examples/configs/qwen3_4b.yaml
    optimizer.lr=1e-6                       # the paper's learning rate
    rollout.group_size=8                    # G: rollouts of a prompt
    rollout.prompts_per_step=32             # prompts of a step, the paper's global batch
    rollout.max_new_tokens=8192             # longest response
    loss.clip_low=0.2                       # the ratio is clipped at 1 - 0.2
    loss.clip_high=0.2                      # and at 1 + 0.2
    bicc.context_ratio=0.4                  # share of a sequence that a context may take
    train.max_sequence_tokens=16384         # prompt, context and response together
    train.max_tokens_per_microbatch=16384   # rows of a micro-batch
    parallel.tensor=2                       # two GPUs a replica
    model.recompute=full                    # activations of one layer at a time
)

launch 1 "$@"
