# shellcheck shell=bash
# What the launch scripts share: where they run, the environment's checks, and torchrun. Sourced, not run, by a
# script that has set SCRIPT, its own path from here.
#
#   MODEL_PATH=dir      Hugging Face directory of the policy (config.json, tokenizer, safetensors)
#   TRAIN_DATA=file     training prompts: .parquet or .jsonl (docs: DAPO-Math-17k, GSM8K, MATH schemas)
#   EVAL_DATA=file      held-out prompts; none by default
#   OUT=dir             this run's directory, on a file system that all nodes share
#   NNODES=n            nodes; under SLURM it is the job's
#   NODE_RANK=i         number of this node, from 0; under SLURM it is the task's
#   MASTER_ADDR=host    address of node 0; under SLURM it is the job's first host
#   MASTER_PORT=port    a free port of node 0
#   MAX_RESTARTS=n      times that torchrun starts the run again after a failure
#   GPUS_PER_NODE=n     GPUs of a node
#   ROLLOUT=colocate    every node's SGLang shares the policy's GPUs and gives its memory up while they train
#           split       on every node the last SERVER_GPUS GPUs serve, the others train
#           attach      the servers at SERVERS serve; all GPUs here train
#   SERVER_GPUS=n       GPUs of one SGLang server (its tensor parallel size)
#   SERVERS=urls        attach: http://host:port of each server, commas between them
#   DRY_RUN=1           check the run on paper, on any machine, and end
#
# Arguments are settings of the run, section.name=value; `python -m megatron_bicc.train --help` lists them.

PYTHON=${PYTHON:-.venv/bin/python}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
ROLLOUT=${ROLLOUT:-colocate}

# shellcheck disable=SC2034 # the scripts put it into `settings`
SHARED_SETTINGS=(
    optimizer.lr=1e-6                       # the paper's learning rate
    rollout.group_size=8                    # G: rollouts of a prompt
    rollout.prompts_per_step=32             # prompts of a step, the paper's global batch
    rollout.max_new_tokens=8192             # longest response
    loss.clip_low=0.2                       # the ratio is clipped at 1 - 0.2
    loss.clip_high=0.2                      # and at 1 + 0.2
    bicc.context_ratio=0.4                  # share of a sequence that a context may take
    train.max_sequence_tokens=16384         # prompt, context and response together
    train.max_tokens_per_microbatch=16384   # rows of a micro-batch: more of them shrink a pipeline's idle time
    model.recompute=full                    # activations of one layer at a time
)

fail() {
    echo "$SCRIPT: $*" >&2
    exit 1
}

# check_number NAME FROM [TO]: ends the script unless the variable holds such a whole number.
check_number() {
    local value=${!1}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > ${3:-999999999})); then
        fail "$1 is $value; it must be a whole number from $2${3:+ to $3}"
    fi
}

check_number GPUS_PER_NODE 1
check_number MASTER_PORT 1 65535
check_number MAX_RESTARTS 0

# One task a node: the script starts itself again on every node of the job.
spread_over_slurm_nodes() {
    [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} && -z ${DRY_RUN:-} ]] || return 0
    command -v srun >/dev/null || fail "SLURM_JOB_ID is set but srun is not on PATH"
    exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$SCRIPT" "$@"
}

find_nodes() {
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        NNODES=${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}
        NODE_RANK=$SLURM_NODEID
        MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
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

# Sets TRAINERS, the GPUs of a node that train, and adds the rollout's settings.
place_rollout() {
    TRAINERS=$GPUS_PER_NODE
    check_number SERVER_GPUS 1
    settings+=(rollout.engine=sglang)
    local servers gpus
    case $ROLLOUT in
    colocate)
        ((GPUS_PER_NODE % SERVER_GPUS == 0)) || fail "SERVER_GPUS=$SERVER_GPUS does not divide GPUS_PER_NODE=$GPUS_PER_NODE"
        servers=$((GPUS_PER_NODE / SERVER_GPUS))
        gpus=$(gpu_groups 0 "$servers")
        settings+=(
            rollout.launch=spawn                              # every node's first process starts its servers
            rollout.colocate=true                             # they release their memory while the policy trains
            "rollout.sglang.servers_per_node=$servers"
            "rollout.sglang.gpus=$gpus"
            "rollout.sglang.server_args=--tp-size $SERVER_GPUS --mem-fraction-static 0.35" # beside the policy's state
            weight_sync.method=tensor                         # weights need not leave the host
        )
        ;;
    split)
        TRAINERS=$((GPUS_PER_NODE - SERVER_GPUS))
        ((TRAINERS > 0)) || fail "SERVER_GPUS=$SERVER_GPUS leaves no GPU of $GPUS_PER_NODE to train on"
        gpus=$(gpu_groups "$TRAINERS" 1)
        settings+=(
            rollout.launch=spawn
            rollout.sglang.servers_per_node=1
            "rollout.sglang.gpus=$gpus"
            "rollout.sglang.server_args=--tp-size $SERVER_GPUS"
            weight_sync.method=tensor
        )
        ;;
    attach)
        [[ -n ${SERVERS:-} ]] || fail "ROLLOUT=attach needs SERVERS=http://host:port,..."
        settings+=(
            rollout.launch=attach
            "rollout.sglang.servers=$SERVERS"
            weight_sync.method=distributed                    # trainer and servers in one NCCL group
        )
        ;;
    *) fail "ROLLOUT is $ROLLOUT; it must be colocate, split or attach" ;;
    esac
}

# The GPUs from $1 on for $2 servers: 0,1/2,3
gpu_groups() {
    local server list=""
    for ((server = 0; server < $2; server++)); do
        list+=${list:+/}$(seq -s, $(($1 + server * SERVER_GPUS)) $(($1 + (server + 1) * SERVER_GPUS - 1)))
    done
    echo "$list"
}

check_files() {
    [[ -n ${MODEL_PATH:-} ]] || fail "MODEL_PATH is not set; name the policy's Hugging Face directory"
    [[ -d $MODEL_PATH ]] || fail "MODEL_PATH is $MODEL_PATH; there is no such directory"
    [[ -n ${TRAIN_DATA:-} ]] || fail "TRAIN_DATA is not set; name the file of training prompts"
    [[ -f $TRAIN_DATA ]] || fail "TRAIN_DATA is $TRAIN_DATA; there is no such file"
}

add_files() {
    [[ -z ${OUT:-} ]] || settings+=("output_dir=$OUT")
    [[ -z ${MODEL_PATH:-} ]] || settings+=("model.path=$MODEL_PATH")
    [[ -z ${TRAIN_DATA:-} ]] || settings+=("data.train=$TRAIN_DATA")
    [[ -z ${EVAL_DATA:-} ]] || settings+=("evaluation.data=$EVAL_DATA")
}

dry_run() {
    local sglang=.venv-sglang/bin/python
    if [[ $ROLLOUT != attach && ! -x $sglang ]]; then
        echo "not checked: SGLang: $sglang is not here; make sglang makes it"
        settings+=("rollout.sglang.python=$PYTHON")
    fi
    WORLD_SIZE=$((NNODES * TRAINERS)) "$PYTHON" -m megatron_bicc.train "${settings[@]}" "$@" --dry-run
}

# Ends the script, with a line for each thing that is wrong, unless every node can take part.
check_environment() {
    OUT=${OUT:-runs/$(basename "$SCRIPT" .sh)}
    "$PYTHON" tools/check_environment.py --gpus "$GPUS_PER_NODE" --nodes "$NNODES" --node-rank "$NODE_RANK" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --shared "$OUT" || exit 1
}

# launch NNODES SETTING...: the whole script after its own settings are in the array `settings`.
launch() {
    local nodes=$1
    shift
    spread_over_slurm_nodes "$@"
    [[ -x $(command -v "$PYTHON") ]] || fail "there is no $PYTHON; make setup makes it"
    find_nodes "$nodes"
    place_rollout
    if [[ -n ${DRY_RUN:-} ]]; then
        add_files
        dry_run "$@"
        exit
    fi
    check_files
    check_environment
    add_files
    settings+=(checkpoint.resume=true) # a run that is started again goes on from its newest checkpoint
    # a mistake is one line here, before torchrun adds pages of its own
    WORLD_SIZE=$((NNODES * TRAINERS)) "$PYTHON" -m megatron_bicc.train "${settings[@]}" "$@" --dry-run
    # with its shared store torchrun never tells a host that comes back where to meet
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$TRAINERS" \
        --max-restarts "$MAX_RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        --rdzv-id "$(basename "$OUT")" --rdzv-conf "is_host=$((NODE_RANK == 0))" \
        -m megatron_bicc.train "${settings[@]}" "$@"
}
