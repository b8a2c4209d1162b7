#!/usr/bin/env bash
# Trains examples/tiny_policy with BICC and RCC: on one or two GPUs in bfloat16, without a GPU on two CPU processes
# in float32. MEGATRON_BICC_DEVICE=cpu takes the CPU on a host with GPUs.
#   STEPS=n SEED=n ALGORITHM=bicc|grpo ENGINE=local|sglang OUT=dir examples/run_bicc_tiny.sh [section.name=value ...]
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
settings=(--config examples/configs/tiny.yaml)

# The GPUs that this run may use, by the names that CUDA_VISIBLE_DEVICES takes.
gpus=()
if [[ ${MEGATRON_BICC_DEVICE:-} != cpu ]] && listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t gpus <<<"$listed"
    fi
fi

if ((${#gpus[@]})); then
    processes=$((${#gpus[@]} < 2 ? 1 : 2))
    # 16 bits: the flash kernels and SGLang's take nothing else
    settings+=("parallel.tensor=$processes" model.dtype=bfloat16)
    echo "demo: $processes of ${#gpus[@]} GPUs, bfloat16"
else
    processes=2
    # a CUDA build of torch trains on the CPU only where it is asked to
    export MEGATRON_BICC_DEVICE=cpu
    echo "demo: 2 processes on the CPU, float32"
fi
if [[ ${ENGINE:-} == sglang ]] && ((${#gpus[@]})); then
    # one server beside the policy; triton's attention takes the policy's head dimension of 32 on every GPU
    settings+=(
        rollout.colocate=true
        "rollout.sglang.gpus=${gpus[0]}"
        "rollout.sglang.server_args=--max-total-tokens 16384 --mem-fraction-static 0.5 --attention-backend triton"
    )
fi
[[ -z ${STEPS:-} ]] || settings+=("train.steps=$STEPS")
[[ -z ${SEED:-} ]] || settings+=("seed=$SEED")
[[ -z ${ALGORITHM:-} ]] || settings+=("algorithm=$ALGORITHM")
[[ -z ${ENGINE:-} ]] || settings+=("rollout.engine=$ENGINE")
[[ -z ${OUT:-} ]] || settings+=("output_dir=$OUT")

# checks the run; an error is one line here, before torchrun's long output
WORLD_SIZE=$processes "$PYTHON" -m megatron_bicc.train "${settings[@]}" "$@" dry_run=true

# --standalone takes any free port, so that two runs can share a machine
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m megatron_bicc.train "${settings[@]}" "$@"
