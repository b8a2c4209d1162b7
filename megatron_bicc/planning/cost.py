"""Estimates what a layout costs: a rank's peak memory, a step's FLOPs, and the bytes that it sends.

Memory follows from the policy's sizes and what its layers save for the backward pass. Saved bytes are counted
term by term; tests compare them with the storages of a real forward pass. Sizes have the names of `Sizes`;
where tensor parallel cuts them, they are those of one rank. FLOPs and bytes follow from the micro-batches of
a packed synthetic step (model.flops); bytes are what one rank sends. With context parallel, a rank holds its
own rows of each micro-batch, and rows are those.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_bicc.algorithms.advantages import needs_reference
from megatron_bicc.config import Config
from megatron_bicc.model.flops import BF16_FLOPS, NOTHING, Load, Sizes, forward_flops, loads_of_batch
from megatron_bicc.model.log_probs import CHUNK_ELEMENTS
from megatron_bicc.packing.types import MicroBatchLayout, StepPlan
from megatron_bicc.planning.shards import Shard
from megatron_bicc.planning.synthetic import SyntheticStep
from megatron_bicc.sglang.process import COLOCATED_FRACTION


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are peaks, per direction."""

    name: str
    memory_bytes: float
    """As CUDA reports it"""
    bf16_flops: float
    """Dense FLOP/s"""
    memory_bandwidth: float
    """Bytes/s"""
    nvlink: float
    """Bytes/s to the other GPUs of its host"""


GIB = 2**30
# Memory: the total capacity in torch's out-of-memory messages. Rates: NVIDIA's data sheets of A100 80GB SXM
# (2021), H100 SXM (2023), H200 SXM (2024), DGX B200 (2024; a GPU is 1/8); sparse figures are halved, and
# NVLink's totals, which count both directions, too.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 79.15 * GIB, BF16_FLOPS["A100"], 2.039e12, 300e9),
        Gpu("H100", 79.10 * GIB, BF16_FLOPS["H100"], 3.35e12, 450e9),
        Gpu("H200", 139.80 * GIB, BF16_FLOPS["H200"], 4.8e12, 450e9),
        Gpu("B200", 178.35 * GIB, BF16_FLOPS["B200"], 8.0e12, 900e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan, and the share of their peak rates that a run is assumed to reach."""

    gpu: Gpu
    gpus_per_host: int = 8
    network: float = 50e9
    """Bytes/s from a GPU to another host: 400 Gb/s"""
    sync_link: float = 20e9
    """Bytes/s of weight_sync.method=distributed to the rollout servers, all ranks together"""
    compute_efficiency: float = 0.40
    """Share of bf16_flops that matrix products reach; NVIDIA reports 0.4 to 0.5 for dense training on H100"""
    link_efficiency: float = 0.8
    """Share of a link's peak that collectives reach"""
    decode_efficiency: float = 0.6
    """Share of the memory bandwidth that generation reaches"""
    reserve_bytes: float = 4e9
    """CUDA context, NCCL buffers and fragmentation"""
    server_reserve_bytes: float = 2e9
    """CUDA context and NCCL buffers of a colocated rollout server"""
    shared_memory: float = 5e9
    """Bytes/s of weight_sync.method=tensor: from a GPU to host memory, then to the servers' GPUs"""
    files: float = 1e9
    """Bytes/s of weight_sync.method=disk: written to a local disk, then read by the servers"""

    def link(self, ranks: int) -> float:
        """Returns bytes/s that a collective reaches within so many consecutive ranks: of the slowest link."""
        slowest = self.gpu.nvlink if ranks <= self.gpus_per_host else self.network
        return slowest * self.link_efficiency


def element_bytes(config: Config) -> int:
    """Returns the bytes of an element of the policy's weights and activations."""
    return 4 if config.model.dtype == "float32" else 2


Norms = Literal["fused", "composite"]
"""fused: CUDA's norm saves its input; composite: torch's norm on a CPU saves two fp32 tensors of that size"""


@dataclass(frozen=True)
class Saved:
    """Bytes that a micro-batch's forward pass saves for its backward pass, on one rank."""

    layer: int
    """Per layer, under model.recompute"""
    layer_whole: int
    """Per layer without recompute; also for a layer whose forward pass has just been recomputed"""
    first_stage: int
    """In addition to the layers, on the first pipeline stage"""
    last_stage: int
    """In addition to the layers, on the last pipeline stage; without logits"""


def saved_bytes(sizes: Sizes, config: Config, rows: int, response_rows: int, norms: Norms = "fused") -> Saved:
    """Returns the bytes that a micro-batch of `rows` rows saves. Assumes evenly loaded experts."""
    element = element_bytes(config)
    shares = config.parallel.tensor if config.parallel.sequence else 1
    own_rows = rows // shares
    norm = _norm(sizes.hidden, element, norms)
    attention = _attention(sizes, config, element, norms)
    layer_input = own_rows * element * sizes.hidden
    whole = (
        own_rows * 2 * (norm + element * sizes.hidden) + rows * attention + _mlp(sizes, config, rows, element)
    )
    lse = rows * 4 * sizes.heads // config.parallel.tensor
    layer = {"none": whole, "selective": whole - lse, "full": layer_input}[config.model.recompute]
    last = own_rows * norm + rows * element * sizes.hidden + response_rows * (8 + 3 * 4)
    return Saved(layer, whole, first_stage=8 * rows, last_stage=last)


def _norm(size: int, element: int, norms: Norms) -> int:
    """Returns bytes per row: a norm's input and its statistic."""
    return (8 if norms == "composite" else element) * size + 4


def _attention(sizes: Sizes, config: Config, element: int, norms: Norms) -> int:
    """Returns bytes per row: queries, keys and values before and after the rotary embedding, its cos and sin,
    the output, which is also the next product's input, and the log-sum-exp."""
    heads, groups = sizes.heads // config.parallel.tensor, sizes.groups // config.parallel.tensor
    mixed = (heads + 2 * groups) * sizes.head_dim
    rotated = (heads + groups) * sizes.head_dim
    out = heads * sizes.head_dim
    kept = element * (mixed + rotated + out + 4 * sizes.head_dim) + 4 * heads
    if sizes.qk_norm:
        kept += (heads + groups) * _norm(sizes.head_dim, element, norms)
    return kept


def _mlp(sizes: Sizes, config: Config, rows: int, element: int) -> int:
    """Returns bytes of all rows: gate and up in one tensor, silu's result, up's copy, the product: 5 widths.
    With experts, that and the expert's input and output for every row that is routed to this rank; and a
    shared expert's of all rows."""
    if not sizes.experts:
        return rows * element * 5 * sizes.ffn // config.parallel.tensor
    routed = rows // (config.parallel.tensor if config.parallel.sequence else 1) * sizes.experts_a_token
    shared = rows * element * 5 * sizes.shared_ffn // config.parallel.tensor
    return routed * element * (5 * sizes.ffn + 2 * sizes.hidden) + shared


LOGITS_COPIES = 3
"""fp32 tensors of a chunk's logits that VocabParallelLogProbs holds at once"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Saved by all micro-batches in flight, and by the layer that is being recomputed"""
    logits: int
    """One chunk, and the output layer's gradient; last pipeline stage only"""
    shared_keys: int
    """Keys and values of one layer that context ranks gather, and their gradients, while it is computed"""
    sync_bucket: int
    """Buckets of whole tensors: one is sent to the rollout servers, the next one is gathered"""
    reserve: int

    @property
    def state(self) -> int:
        """Bytes that are allocated all the time."""
        return self.weights + self.gradients + self.optimizer + self.reserve

    @property
    def peak(self) -> int:
        """Maximum over training and sending weights."""
        return self.state + max(self.activations + max(self.logits, self.shared_keys), self.sync_bucket)


def in_flight(config: Config, micro_batches: int, stage: int) -> float:
    """Returns the number of micro-batches whose activations a stage holds at once, as a share of its layers.

    megatron-core's 1F1B: one per stage from here to the last. Interleaved: two per later stage for the first
    chunk's warm-up, and a round of all stages for each further chunk.
    """
    p = config.parallel
    if p.virtual_pipeline == 1:
        return min(micro_batches, p.pipeline - stage)
    chunks = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1
    return min(micro_batches * p.virtual_pipeline, chunks) / p.virtual_pipeline


def memory_of(shard: Shard, sizes: Sizes, config: Config, micro_batches: int, cluster: Cluster) -> Memory:
    """Returns a rank's memory, assuming full micro-batches of response rows only, all of them cut."""
    c, stage = config.parallel, shard.pipeline_rank
    rows = config.train.max_tokens_per_microbatch
    saved = saved_bytes(sizes, config, rows, rows)
    flying, is_last = in_flight(config, micro_batches, stage), stage == c.pipeline - 1
    ends = (saved.first_stage if stage == 0 else 0) + (saved.last_stage if is_last else 0)
    again = saved.layer_whole if config.model.recompute == "full" else 0
    return Memory(
        pipeline_rank=stage,
        weights=shard.weight_bytes,
        gradients=shard.gradient_bytes,
        optimizer=shard.optimizer_bytes,
        activations=int(flying * (len(shard.layers) * saved.layer + ends)) + again,
        logits=_logits(sizes, config, rows) if is_last else 0,
        shared_keys=_shared_keys(sizes, config, rows),
        sync_bucket=_sync_bucket(sizes, config),
        reserve=int(cluster.reserve_bytes),
    )


def _logits(sizes: Sizes, config: Config, rows: int) -> int:
    """Returns bytes of a chunk's logits and of the output layer's gradient, in fp32 and the weights' type."""
    vocabulary = -(-sizes.vocabulary // config.parallel.tensor)
    chunk = min(rows, max(1, CHUNK_ELEMENTS["cuda"] // vocabulary)) * vocabulary
    element = element_bytes(config)
    return 4 * LOGITS_COPIES * chunk + vocabulary * sizes.hidden * (4 + element)


def _shared_keys(sizes: Sizes, config: Config, rows: int) -> int:
    """Returns bytes at the end of attention's backward pass, where it holds most: keys and values, their
    gradients from the kernels, the same in fp32 by the rank that holds the row, and as sent and received."""
    if config.parallel.context == 1:
        return 0
    row = 2 * sizes.groups // config.parallel.tensor * sizes.head_dim
    return config.parallel.context * rows * row * (4 * element_bytes(config) + 4)


def _sync_bucket(sizes: Sizes, config: Config) -> int:
    """Returns bytes of two buckets, each at least the largest whole tensor, and the parts of one tensor."""
    element = element_bytes(config)
    largest = element * sizes.hidden * max(sizes.vocabulary, 2 * sizes.ffn)
    return 2 * int(max(config.weight_sync.bucket_mb * 2**20, largest)) + largest


@dataclass(frozen=True)
class KvSpace:
    """Room for SGLang's KV cache on the policy's own GPUs while it generates."""

    free: int
    """Bytes of a GPU that the policy's state leaves when a server starts"""
    server_weights: int
    """Bytes of SGLang's weights per GPU"""
    bytes: int
    """Of the cache, per GPU; negative if the weights do not fit"""
    tokens: int
    """Tokens of one server's requests that fit in it"""


def kv_space(fullest: Memory, sizes: Sizes, cluster: Cluster, server_gpus: int) -> KvSpace:
    """Returns a server's room on `server_gpus` GPUs that also hold the policy's state.

    By SGLang's rule, with the fraction that a run gives its servers: weights and cache take that share of
    what is free when the server starts.
    """
    weights = 2 * sizes.parameters // server_gpus
    free = int(cluster.gpu.memory_bytes - cluster.server_reserve_bytes) - fullest.state
    cache = int(COLOCATED_FRACTION * free) - weights
    return KvSpace(free, weights, cache, max(0, cache) * server_gpus // sizes.kv_bytes_a_token)


@dataclass(frozen=True)
class CheckpointMemory:
    """Host memory of a checkpoint, on the host with the most of it; a checkpoint takes no GPU memory."""

    kept: int
    """Bytes until the checkpoint is written"""
    peak: int
    """Bytes while the optimizer's state is gathered"""


def checkpoint_memory(shard: Shard, config: Config, world_size: int, cluster: Cluster) -> CheckpointMemory:
    """Returns the memory of `checkpoint.host_state`. shard: the largest.

    The first rank of each group over which the optimizer is sharded keeps its weights and three fp32 tensors
    of the group's optimizer: main weights and Adam's moments, each as large as its gradients. While it
    gathers one of them it also holds that one's parts and their concatenation; every rank first copies its
    part of all three. Experts have groups of their own.
    """
    p = config.parallel
    stage = world_size // p.pipeline
    dense_gradients = shard.gradient_bytes - shard.expert_gradient_bytes
    dense = dense_gradients, shard.weight_bytes - shard.expert_weight_bytes, p.tensor
    experts = shard.expert_gradient_bytes, shard.expert_weight_bytes, p.expert
    kept: Counter[int] = Counter()
    peak: Counter[int] = Counter()
    for rank in range(world_size):
        host = rank // cluster.gpus_per_host
        for gradients, weights, groups in (dense, experts):
            # a group's ranks are `groups` apart: the first ranks of a stage are those of its groups
            if rank % stage < groups:
                kept[host] += 3 * gradients + weights
                peak[host] += 5 * gradients
            peak[host] += 3 * gradients * groups // stage
    most = max(kept.values())
    return CheckpointMemory(most, max(most, *peak.values()))


def load_of(plan: StepPlan) -> Load:
    """Returns the load of the data-parallel rank with the highest cost by the packer's measure.

    Its context ranks wait for each other in every layer: of each micro-batch the busiest one counts.
    """
    token_cost = plan.settings.token_cost
    ranks = [sum((_busiest(batch, token_cost) for batch in rank), NOTHING) for rank in plan.ranks]
    return max(ranks, key=lambda load: _cost(load, token_cost))


def _busiest(batch: MicroBatchLayout, token_cost: int) -> Load:
    return max(loads_of_batch(batch), key=lambda load: _cost(load, token_cost))


def _cost(load: Load, token_cost: int) -> int:
    """Returns the cost by the packer's measure: query-key pairs, and rows at token_cost pairs each."""
    return load.pairs + token_cost * load.rows


def context_imbalance(step: SyntheticStep) -> float:
    """Returns the cost of the busiest context rank over the mean one's, summed over trained micro-batches."""
    most = mean = 0.0
    for update in step.updates:
        for plan in update.trained.values():
            for batch in (batch for rank in plan.ranks for batch in rank):
                costs = [_cost(load, plan.settings.token_cost) for load in loads_of_batch(batch)]
                most, mean = most + max(costs), mean + sum(costs) / len(costs)
    return most / mean if mean else 1.0


@dataclass(frozen=True)
class Work:
    """The passes of a step."""

    forward: Load
    """Passes without gradients: old and reference log-probs"""
    train: Load


def work_of(step: SyntheticStep, config: Config) -> Work:
    """Returns the passes that the learner runs."""
    forward = train = NOTHING
    conditioned = config.bicc.denominator == "conditioned"
    for number, update in enumerate(step.updates):
        passes = 2 if needs_reference(config) else 1
        forward += load_of(update.log_probs).times(passes)
        for layout, plan in update.trained.items():
            train += load_of(plan)
            # before a step's first update the policy is the old policy: its ratio is 1 without a pass
            if layout == "bilateral" and conditioned and number > 0:
                forward += load_of(plan)
    return Work(forward, train)


def step_flops(sizes: Sizes, config: Config, work: Work) -> int:
    """Returns FLOPs of the busiest data- and context-parallel rank, over its tensor and pipeline ranks.

    Backward counts as two forwards, full recompute as one.
    """
    passes = 4 if config.model.recompute == "full" else 3
    return forward_flops(sizes, work.forward) + passes * forward_flops(sizes, work.train)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per step."""

    tensor: int
    context: int
    pipeline: int
    data: int
    """Between the ranks that hold copies of a weight: data- and context-parallel ranks"""
    expert: int
    sync: int
    """Of all ranks together: the whole policy to the rollout servers"""


def traffic_of(
    sizes: Sizes, config: Config, work: Work, shard: Shard, world_size: int, updates: int
) -> Traffic:
    """Returns the traffic of a rank. Collectives over n ranks send (n - 1) / n of a whole tensor."""
    p, element = config.parallel, element_bytes(config)
    layers = sizes.layers // p.pipeline
    row = element * sizes.hidden
    shares = p.tensor if p.sequence else 1
    again = 1 if config.model.recompute == "full" else 0
    forwards = work.forward.rows + (1 + again) * work.train.rows
    # Attention and MLP each gather and scatter, or all-reduce, which sends as much; the backward pass does
    # the same, and under sequence parallel gathers once more. Experts take a rank's own rows.
    blocks = 1 if sizes.experts else 2
    collectives = blocks * (2 * forwards + (3 if p.sequence else 2) * work.train.rows)
    sends = 0 if p.pipeline == 1 else p.virtual_pipeline
    own = shard.gradient_bytes + shard.weight_bytes
    of_experts = shard.expert_gradient_bytes + shard.expert_weight_bytes
    stage = world_size // p.pipeline
    # each expert gets its rows and returns their results; the backward pass sends the gradients of both
    routed = 2 * sizes.experts_a_token * (forwards + work.train.rows) // shares
    return Traffic(
        tensor=layers * row * collectives * (p.tensor - 1) // p.tensor,
        context=layers * _context(sizes, config, work, again),
        pipeline=sends * row // shares * (work.forward.rows + 2 * work.train.rows),
        data=updates
        * (_shared_out(own - of_experts, stage // p.tensor) + _shared_out(of_experts, stage // p.expert)),
        expert=layers * row * routed * (p.expert - 1) // p.expert,
        sync=element * sizes.parameters,
    )


def _shared_out(size: int, ranks: int) -> int:
    """Returns what a rank sends to scatter or gather a tensor of `size` bytes over `ranks`."""
    return size * (ranks - 1) // ranks


def _context(sizes: Sizes, config: Config, work: Work, again: int) -> int:
    """Returns bytes that a context rank sends in a layer: keys and values of its shared rows to each of the
    others in every forward and backward pass, and the gradients of theirs back."""
    row = element_bytes(config) * 2 * (sizes.groups // config.parallel.tensor) * sizes.head_dim
    passes = work.forward.shared_rows + (1 + again + 2) * work.train.shared_rows
    return (config.parallel.context - 1) * row * passes


def sync_seconds(traffic: Traffic, sizes: Sizes, config: Config, cluster: Cluster, world_size: int) -> float:
    """Returns seconds of a weight sync by weight_sync.method; auto is a broadcast to attached servers.

    Every rank first gets each whole tensor: from the tensor-parallel ranks, of experts from the
    expert-parallel ranks, and from the pipeline stage that holds it.
    """
    p, whole = config.parallel, traffic.sync
    experts = element_bytes(config) * sizes.expert_parameters
    gather = _shared_out(whole - experts, p.tensor) / cluster.link(p.tensor)
    gather += _shared_out(experts, p.expert) / cluster.link(p.expert)
    gather += whole / cluster.link(world_size) if p.pipeline > 1 else 0
    send = {
        "tensor": cluster.shared_memory,
        "disk": cluster.files,
        "distributed": cluster.sync_link,
    }
    send["auto"] = send["tensor" if config.rollout.launch == "spawn" else "distributed"]
    return gather + whole / send[config.weight_sync.method]
