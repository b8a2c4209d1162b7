# shellcheck shell=bash
# Shared by the launch scripts: finds the nodes, checks them, places the rollout servers, and starts torchrun. A
# script sets SCRIPT, its own path from the repository's root, and sources this file.
#
#   MODEL_PATH=dir      Hugging Face directory of the policy (config.json, tokenizer, safetensors)
#   TRAIN_DATA=file     training prompts, .parquet or .jsonl (docs/data.md)
#   EVAL_DATA=file      held-out prompts; none by default
#   OUT=dir             output directory of the run, on a file system that all nodes share
#   NNODES=n            number of nodes; under SLURM that of the job
#   NODE_RANK=i         rank of this node, from 0; under SLURM that of the task
#   MASTER_ADDR=host    address of node 0; under SLURM the first host of the job
#   MASTER_PORT=port    a free port of node 0
#   MAX_RESTARTS=n      times that torchrun restarts the run after a failure
#   GPUS_PER_NODE=n     GPUs per node
#   ROLLOUT=colocate    SGLang servers on every node share its GPUs with the policy and release their memory while it
#                       trains
#           split       on every node the last SERVER_GPUS GPUs serve, the others train
#           attach      the servers at SERVERS serve; all GPUs of the nodes train
#   SERVER_GPUS=n       GPUs of one SGLang server (its tensor-parallel size)
#   SERVERS=urls        for attach: http://host:port of each server, separated by commas
#   DRY_RUN=1           check the run on any machine, without GPUs, and exit
#
# Arguments are settings of the run, section.name=value; `python -m megatron_bicc.train --help` lists them. The
# learning settings are in examples/configs.

PYTHON=${PYTHON:-.venv/bin/python}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
ROLLOUT=${ROLLOUT:-colocate}

fail() {
    echo "$SCRIPT: $*" >&2
    exit 1
}

# check_number NAME FROM [TO]: fails unless the variable is a whole number in that range.
check_number() {
    local value=${!1}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > ${3:-999999999})); then
        fail "$1 is $value; it must be a whole number from $2${3:+ to $3}"
    fi
}

check_number GPUS_PER_NODE 1
check_number MASTER_PORT 1 65535
check_number MAX_RESTARTS 0

# Under SLURM, restarts the script once on every node of the job.
spread_over_slurm_nodes() {
    [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} && -z ${DRY_RUN:-} ]] || return 0
    command -v srun >/dev/null || fail "SLURM_JOB_ID is set but srun is not on PATH"
    exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$SCRIPT" "$@"
}

# find_nodes DEFAULT: sets NNODES, NODE_RANK and MASTER_ADDR.
find_nodes() {
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        NNODES=${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}
        NODE_RANK=$SLURM_NODEID
        if [[ -z ${MASTER_ADDR:-} ]]; then
            # not "| head -n 1": under pipefail the script would end whenever scontrol meets the closed pipe
            mapfile -t slurm_hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
            MASTER_ADDR=${slurm_hosts[0]:-}
        fi
    fi
    NNODES=${NNODES:-$1}
    NODE_RANK=${NODE_RANK:-0}
    check_number NNODES 1
    check_number NODE_RANK 0 $((NNODES - 1))
    if [[ -z ${MASTER_ADDR:-} ]]; then
        ((NNODES == 1)) || [[ -n ${DRY_RUN:-} ]] || fail "MASTER_ADDR is not set; give all $NNODES nodes that of node 0"
        MASTER_ADDR=127.0.0.1
    fi
}

# Sets TRAINERS, the GPUs of a node that train, and adds the settings of the rollout.
place_rollout() {
    TRAINERS=$GPUS_PER_NODE
    check_number SERVER_GPUS 1
    settings+=(rollout.engine=sglang)
    case $ROLLOUT in
    colocate)
        ((GPUS_PER_NODE % SERVER_GPUS == 0)) || fail "SERVER_GPUS=$SERVER_GPUS does not divide GPUS_PER_NODE=$GPUS_PER_NODE"
        settings+=(rollout.colocate=true)
        add_servers 0 $((GPUS_PER_NODE / SERVER_GPUS))
        ;;
    split)
        TRAINERS=$((GPUS_PER_NODE - SERVER_GPUS))
        ((TRAINERS > 0)) || fail "SERVER_GPUS=$SERVER_GPUS leaves no GPU of $GPUS_PER_NODE to train on"
        add_servers "$TRAINERS" 1
        ;;
    attach)
        [[ -n ${SERVERS:-} ]] || fail "ROLLOUT=attach needs SERVERS=http://host:port,..."
        # weights are broadcast in one NCCL group of trainer and servers
        settings+=(rollout.launch=attach "rollout.sglang.servers=$SERVERS" weight_sync.method=distributed)
        ;;
    *) fail "ROLLOUT is $ROLLOUT; it must be colocate, split or attach" ;;
    esac
}

# add_servers FIRST COUNT: the run starts COUNT servers on every node, on the GPUs from FIRST on.
add_servers() {
    local server gpus=""
    for ((server = 0; server < $2; server++)); do # 0,1/2,3
        gpus+=${gpus:+/}$(seq -s, $(($1 + server * SERVER_GPUS)) $(($1 + (server + 1) * SERVER_GPUS - 1)))
    done
    settings+=(
        "rollout.sglang.servers_per_node=$2"
        "rollout.sglang.gpus=$gpus"
        "rollout.sglang.server_args=--tp-size $SERVER_GPUS"
    )
}

check_files() {
    [[ -n ${MODEL_PATH:-} ]] || fail "MODEL_PATH is not set; name the policy's Hugging Face directory"
    [[ -d $MODEL_PATH ]] || fail "MODEL_PATH is $MODEL_PATH; there is no such directory"
    [[ -n ${TRAIN_DATA:-} ]] || fail "TRAIN_DATA is not set; name the file of training prompts"
    [[ -f $TRAIN_DATA ]] || fail "TRAIN_DATA is $TRAIN_DATA; there is no such file"
}

# Fails, with a line for each problem, unless this node can take part in the run.
check_environment() {
    "$PYTHON" tools/check_environment.py --gpus "$GPUS_PER_NODE" --nodes "$NNODES" --node-rank "$NODE_RANK" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --shared "$OUT" || exit 1
}

# dry_run SETTING...: checks the run; an error is one line here, before torchrun's long output.
dry_run() {
    WORLD_SIZE=$((NNODES * TRAINERS)) "$PYTHON" -m megatron_bicc.train "${settings[@]}" "$@" --dry-run
}

# launch NNODES SETTING...: everything a script does after it has put its own settings into the array `settings`.
launch() {
    local nodes=$1 sglang=.venv-sglang/bin/python
    shift
    spread_over_slurm_nodes "$@"
    [[ -x $(command -v "$PYTHON") ]] || fail "$PYTHON not found; run make setup"
    find_nodes "$nodes"
    place_rollout
    if [[ -z ${DRY_RUN:-} ]]; then
        OUT=${OUT:-runs/$(basename "$SCRIPT" .sh)}
        check_files
        check_environment
        settings+=(checkpoint.resume=true) # a restarted run resumes from its latest checkpoint
    elif [[ $ROLLOUT != attach && ! -x $sglang ]]; then
        echo "not checked: SGLang: $sglang not found; run make sglang"
        settings+=("rollout.sglang.python=$PYTHON")
    fi
    [[ -z ${OUT:-} ]] || settings+=("output_dir=$OUT")
    [[ -z ${MODEL_PATH:-} ]] || settings+=("model.path=$MODEL_PATH")
    [[ -z ${TRAIN_DATA:-} ]] || settings+=("data.train=$TRAIN_DATA")
    [[ -z ${EVAL_DATA:-} ]] || settings+=("evaluation.data=$EVAL_DATA")
    dry_run "$@"
    [[ -z ${DRY_RUN:-} ]] || exit 0
    # micro-batches of all sizes would leave holes in fixed segments; the run's servers do not inherit it
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
    # with torchrun's shared store, a restarted host never learns the new rendezvous address
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$TRAINERS" \
        --max-restarts "$MAX_RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        --rdzv-id "$(basename "$OUT")" --rdzv-conf "is_host=$((NODE_RANK == 0))" \
        -m megatron_bicc.train "${settings[@]}" "$@"
}
