"""Plans a configuration on a cluster: memory and step time under stated assumptions, and layouts that fit.

Formats a plan as text, as JSON and as a chart.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.config import Config, ParallelConfig, check_processes, flatten
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import check_layout
from megatron_bicc.model.megatron_settings import row_alignment
from megatron_bicc.planning.cost import (
    CheckpointMemory,
    Cluster,
    KvSpace,
    Memory,
    Sizes,
    Traffic,
    checkpoint_memory,
    context_imbalance,
    kv_space,
    memory_of,
    step_flops,
    sync_seconds,
    traffic_of,
    work_of,
)
from megatron_bicc.planning.shards import Shard, build_shards, data_parallel_size
from megatron_bicc.planning.synthetic import SyntheticStep, UnknownTokenizer, synthetic_step
from megatron_bicc.sglang.process import COLOCATED_FRACTION


@dataclass(frozen=True)
class Seconds:
    """Seconds of a step, in the order of its phases; assumes that nothing overlaps."""

    rollout: float
    compute: float
    """Log-probs and training, with the pipeline's idle time"""
    tensor_traffic: float
    context_traffic: float
    pipeline_traffic: float
    expert_traffic: float
    data_traffic: float
    sync: float

    @property
    def step(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Tokens:
    """Rows with and without the shared-prefix layout."""

    packed: int
    """Rows that a step trains"""
    one_row_a_response: int
    """Rows of the same training if each response has its own copy of the prefix"""

    @property
    def saved(self) -> int:
        return self.one_row_a_response - self.packed


@dataclass(frozen=True)
class Plan:
    """Costs of a configuration on a cluster."""

    config: Config
    world_size: int
    cluster: Cluster
    parameters: int
    ranks: list[Memory]
    """Memory of the first and the last pipeline stage"""
    micro_batches: int
    """Number per data-parallel rank and update"""
    bubble: float
    """Idle share of the pipeline's time"""
    context_imbalance: float
    """Cost of the busiest over the mean context rank"""
    flops: int
    """Per step, of the busiest data- and context-parallel rank over its tensor and pipeline ranks"""
    traffic: Traffic
    tokens: Tokens
    kv: KvSpace
    checkpoint: CheckpointMemory
    seconds: Seconds

    @property
    def data_parallel(self) -> int:
        return data_parallel_size(self.config.parallel, self.world_size)

    @property
    def fullest(self) -> Memory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.cluster.gpu.memory_bytes


def make_plan(
    config: Config,
    hf_config: PretrainedConfig,
    world_size: int,
    step: SyntheticStep,
    cluster: Cluster,
    server_gpus: int,
    shards: list[Shard] | None = None,
) -> Plan:
    """Plans a resolved configuration.

    step: packed for the configuration's layout. server_gpus: GPUs of one rollout server. shards: what
    `end_shards` returns, if the caller has it. Raises UserError for an impossible layout.
    """
    sizes = Sizes.of(hf_config)
    shards = shards or end_shards(config, hf_config, world_size)
    p, work = config.parallel, work_of(step, config)
    micro_batches = max(sum(len(plan.ranks[0]) for plan in u.trained.values()) for u in step.updates)
    ranks = [memory_of(shard, sizes, config, micro_batches, cluster) for shard in shards]
    idle = (p.pipeline - 1) / p.virtual_pipeline
    traffic = traffic_of(sizes, config, work, shards[0], world_size, len(step.updates))
    flops = step_flops(sizes, config, work)
    bubble = idle / (micro_batches + idle)
    stats = [plan.stats for update in step.updates for plan in update.trained.values()]
    return Plan(
        config=config,
        world_size=world_size,
        cluster=cluster,
        parameters=sizes.parameters,
        ranks=ranks,
        micro_batches=micro_batches,
        bubble=bubble,
        context_imbalance=context_imbalance(step),
        flops=flops,
        traffic=traffic,
        tokens=Tokens(sum(s["tokens_packed"] for s in stats), sum(s["tokens_rows"] for s in stats)),
        kv=kv_space(max(ranks, key=lambda rank: rank.state), sizes, cluster, server_gpus),
        checkpoint=checkpoint_memory(
            max(shards, key=lambda shard: shard.gradient_bytes), config, world_size, cluster
        ),
        seconds=_seconds(sizes, config, world_size, step, cluster, server_gpus, flops, bubble, traffic),
    )


def end_shards(config: Config, hf_config: PretrainedConfig, world_size: int) -> list[Shard]:
    """Returns the shards of the first and the last pipeline stage's first ranks; one if they are the same."""
    last = world_size - world_size // config.parallel.pipeline
    return build_shards(config, hf_config, world_size, ranks=sorted({0, last}))


def _seconds(
    sizes: Sizes,
    config: Config,
    world_size: int,
    step: SyntheticStep,
    cluster: Cluster,
    server_gpus: int,
    flops: int,
    bubble: float,
    traffic: Traffic,
) -> Seconds:
    # megatron-core's order of ranks: tensor, context, data, pipeline; experts over a stage's ranks in turn
    p, link = config.parallel, cluster.link
    replica = p.tensor * p.pipeline * cluster.gpu.bf16_flops * cluster.compute_efficiency
    return Seconds(
        rollout=_rollout(sizes, config, world_size, step, cluster, server_gpus),
        compute=flops / replica / (1 - bubble),
        tensor_traffic=traffic.tensor / link(p.tensor),
        context_traffic=traffic.context / link(p.tensor * p.context),
        pipeline_traffic=traffic.pipeline / link(world_size),
        expert_traffic=traffic.expert / link(p.expert),
        data_traffic=traffic.data / link(world_size // p.pipeline),
        sync=sync_seconds(traffic, sizes, config, cluster, world_size),
    )


def _rollout(
    sizes: Sizes,
    config: Config,
    world_size: int,
    step: SyntheticStep,
    cluster: Cluster,
    server_gpus: int,
) -> float:
    """Returns seconds of generation on as many GPUs as train.

    Decoding is bound by memory: each step of a server reads the weights once, of the experts those that any
    of its requests is routed to, and the keys and values of every request. The longest response sets the
    number of steps.
    """
    servers = max(1, world_size // server_gpus)
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    batch = -(-rollouts // servers)
    mean = step.response_tokens / rollouts
    embedding = 0 if sizes.tied else sizes.vocabulary * sizes.hidden
    read = 2 * (sizes.parameters - sizes.expert_parameters - embedding)
    if sizes.experts:
        unused = (1 - sizes.experts_a_token / sizes.experts) ** batch
        read += 2 * sizes.expert_parameters * (1 - unused)
    read += batch * mean / 2 * sizes.kv_bytes_a_token
    bandwidth = server_gpus * cluster.gpu.memory_bandwidth * cluster.decode_efficiency
    return step.longest_response * read / bandwidth


MAX_PIPELINE = 16
CHUNKS = (1, 2, 4, 5)
"""Virtual pipeline sizes to try"""
NOTICEABLE = 0.02
"""Share of a step's time below which a difference between two layouts is less than the estimate's error"""
MIN_ROWS = 2048
"""Rows that a context rank must at least be able to hold: matrix products of fewer are slower than assumed"""
WEIGHT_AND_GRADIENT_BYTES = 6
"""bf16 weight and fp32 gradient: the minimum per parameter of a rank's shard"""
OPTIMIZER_BYTES = 12
"""fp32 main weight and Adam's two moments, over all ranks"""


def propose(
    config: Config,
    hf_config: PretrainedConfig,
    world_size: int,
    cluster: Cluster,
    server_gpus: int,
    tokenizer: PreTrainedTokenizerBase | UnknownTokenizer,
) -> list[Plan]:
    """Plans every layout that a run's start-up accepts; returns those that fit, fastest first.

    Tensor parallel stays within a host and is always used with sequence parallel. A micro-batch has as many
    rows with any number of context ranks: `train.max_tokens_per_microbatch` is divided by them. All settings
    but this, `parallel` and `model.recompute` are those of `config`, which must be resolved.
    """
    # the context ranks share the optimizer with the data-parallel ones: their number changes no shard
    shards: dict[tuple[int, int, int], list[Shard]] = {}
    steps: dict[tuple[int, int, int], SyntheticStep] = {}
    plans = []
    for parallel in _layouts(config, hf_config, world_size, cluster):
        trial = copy.deepcopy(config)
        trial.parallel = parallel
        trial.train.max_tokens_per_microbatch = _rows(config, parallel)
        place = (parallel.tensor, parallel.pipeline, parallel.expert)
        if place not in shards:
            shards[place] = end_shards(trial, hf_config, world_size)
        data = data_parallel_size(parallel, world_size)
        packing = (parallel.tensor, parallel.context, data)
        if packing not in steps:
            steps[packing] = synthetic_step(trial, hf_config, tokenizer, data)
        for recompute in ("none", "selective", "full"):
            trial = copy.deepcopy(trial)
            trial.model.recompute = recompute
            step = steps[packing]
            plans.append(make_plan(trial, hf_config, world_size, step, cluster, server_gpus, shards[place]))
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds.step)


def _rows(config: Config, parallel: ParallelConfig) -> int:
    """Returns train.max_tokens_per_microbatch with which a micro-batch has at least as many rows as now."""
    rows = config.parallel.context * config.train.max_tokens_per_microbatch
    alignment = parallel.context * row_alignment(replace(config, parallel=parallel))
    return -(-rows // alignment) * alignment // parallel.context


def _layouts(
    config: Config, hf_config: PretrainedConfig, world_size: int, cluster: Cluster
) -> Iterator[ParallelConfig]:
    sizes = Sizes.of(hf_config)
    tensors = _powers_of_two(min(cluster.gpus_per_host, world_size))
    pipelines = [n for n in range(1, MAX_PIPELINE + 1) if sizes.layers % n == 0]
    contexts = _powers_of_two(world_size)
    experts = _powers_of_two(sizes.experts or 1)
    for tensor, pipeline, expert, context, chunks in product(tensors, pipelines, experts, contexts, CHUNKS):
        parallel = replace(
            config.parallel,
            tensor=tensor,
            sequence=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=chunks,
            expert=expert,
            context=context,
        )
        held = (sizes.parameters - sizes.expert_parameters) / tensor + sizes.expert_parameters / expert
        least = WEIGHT_AND_GRADIENT_BYTES * held / pipeline + OPTIMIZER_BYTES * sizes.parameters / world_size
        too_short = context > 1 and _rows(config, parallel) < MIN_ROWS
        too_large = least > cluster.gpu.memory_bytes - cluster.reserve_bytes
        if not too_short and not too_large and _is_possible(hf_config, parallel, world_size):
            yield parallel


def _is_possible(hf_config: PretrainedConfig, parallel: ParallelConfig, world_size: int) -> bool:
    try:
        check_processes(parallel, world_size)
        check_layout(hf_config, parallel)
    except UserError:
        return False
    return True


def _powers_of_two(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


MEMORY_PARTS = ("weights", "gradients", "optimizer", "reserve", "activations", "logits", "shared_keys")
GB = 1e9


def layout_name(plan: Plan) -> str:
    """Formats a layout, such as TP 8 SP, CP 2 of 8,192 rows, PP 4 x 2, DP 2, recompute full."""
    p = plan.config.parallel
    sequence = " SP" if p.sequence else ""
    chunks = f" x {p.virtual_pipeline}" if p.virtual_pipeline > 1 else ""
    expert = f", EP {p.expert}" if p.expert > 1 else ""
    rows = plan.config.train.max_tokens_per_microbatch
    context = f", CP {p.context} of {rows:,} rows" if p.context > 1 else ""
    recompute = plan.config.model.recompute
    return (
        f"TP {p.tensor}{sequence}{context}, PP {p.pipeline}{chunks}, DP {plan.data_parallel}{expert}, "
        f"recompute {recompute}"
    )


def as_text(plan: Plan) -> str:
    """Formats one plan with its assumptions."""
    seconds, traffic, kv = plan.seconds, plan.traffic, plan.kv
    gpu = plan.cluster.gpu
    lines = [
        f"{plan.world_size} x {gpu.name}: {layout_name(plan)}: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'} in {gpu.memory_bytes / GB:.1f} GB",
        "",
        "memory per rank, GB     " + "".join(f"stage {m.pipeline_rank:<8}" for m in plan.ranks),
    ]
    for part in (*MEMORY_PARTS, "peak", "sync_bucket"):
        values = "".join(f"{getattr(m, part) / GB:<14.2f}" for m in plan.ranks)
        lines.append(f"  {part.replace('_', ' '):<22}{values}")
    lines += [
        f"  KV cache, if SGLang is colocated: {kv.bytes / GB:.1f} GB per GPU beside its weights "
        f"of {kv.server_weights / GB:.1f} GB, of {kv.free / GB:.1f} GB free: {kv.tokens:,} tokens per server",
        f"checkpoint               {plan.checkpoint.kept / GB:.0f} GB of the fullest host's memory until it "
        f"is written, {plan.checkpoint.peak / GB:.0f} GB at its peak; none of a GPU's",
        "",
        f"micro-batches/update     {plan.micro_batches}, pipeline idle {plan.bubble:.1%}, busiest context "
        f"rank {plan.context_imbalance:.2f} of their mean cost",
        f"rows trained             {plan.tokens.packed:,} instead of {plan.tokens.one_row_a_response:,}: "
        f"{plan.tokens.saved:,} saved by shared prefixes",
        f"FLOPs                    {plan.flops:.3e} over the tensor and pipeline ranks of the busiest rank",
        f"GB sent per rank         tensor {traffic.tensor / GB:,.1f}, context {traffic.context / GB:,.1f}, "
        f"pipeline {traffic.pipeline / GB:,.1f}, expert {traffic.expert / GB:,.1f}, "
        f"data {traffic.data / GB:,.1f}",
        f"weight sync              {traffic.sync / GB:,.1f} GB by {plan.config.weight_sync.method}, "
        f"{seconds.sync:.1f} s",
        "",
        f"step                     {seconds.step:.0f} s: rollout {seconds.rollout:.0f}, compute "
        f"{seconds.compute:.0f}, tensor traffic {seconds.tensor_traffic:.0f}, context traffic "
        f"{seconds.context_traffic:.1f}, pipeline traffic {seconds.pipeline_traffic:.1f}, expert traffic "
        f"{seconds.expert_traffic:.1f}, data traffic {seconds.data_traffic:.1f}, sync {seconds.sync:.1f}",
        "",
        *(f"assumed: {line}" for line in assumptions(plan)),
    ]
    return "\n".join(lines)


def assumptions(plan: Plan) -> list[str]:
    """Returns the assumptions behind the figures; none of them has been measured."""
    c, s = plan.cluster, plan.config.synthetic
    uncounted = [name for name in flatten(asdict(plan.config)) if name.startswith("megatron.")]
    shown = f"not counted in the optimizer's size, activations, traffic and times: {', '.join(uncounted)}"
    return [
        f"matrix products reach {c.compute_efficiency:.0%} of {c.gpu.bf16_flops / 1e12:.0f} TFLOP/s; "
        f"links {c.link_efficiency:.0%} of NVLink's {c.gpu.nvlink / GB:.0f} GB/s and of "
        f"{c.network / GB:.1f} GB/s per GPU between hosts; nothing overlaps",
        f"generation reads weights and keys at {c.decode_efficiency:.0%} of "
        f"{c.gpu.memory_bandwidth / 1e12:.2f} TB/s, on as many GPUs as train, until the longest "
        "response ends",
        "weights are gathered on every rank, then sent to the servers: "
        f"tensor at {c.shared_memory / GB:.1f} GB/s, distributed at {c.sync_link / GB:.1f} GB/s, "
        f"disk at {c.files / GB:.1f} GB/s",
        f"{c.reserve_bytes / GB:.0f} GB per GPU for CUDA, NCCL and fragmentation, "
        f"{c.server_reserve_bytes / GB:.0f} GB for a colocated server's; its weights and cache take "
        f"{COLOCATED_FRACTION:.0%} of what is free",
        "micro-batches are full, and all of their rows are responses that all context ranks share; CUDA's "
        "fused norms",
        f"lengths are log-normal, pass rate {s.pass_rate}: see the section synthetic of the settings",
        *([shown] if uncounted else []),
    ]


def proposals(plans: list[Plan]) -> str:
    """Formats one line per layout."""
    lines = [f"{'s/step':>9} {'peak GB':>8} {'idle':>6}  layout"]
    for plan in plans:
        lines.append(
            f"{plan.seconds.step:9.0f} {plan.fullest.peak / GB:8.1f} {plan.bubble:6.1%}  {layout_name(plan)}"
        )
    return "\n".join(lines)


def by_context(plans: list[Plan]) -> str:
    """Formats the fastest layout for each number of context ranks, and what context parallel changes.

    plans: as `propose` returns them.
    """
    best: dict[int, Plan] = {}
    for plan in plans:
        best.setdefault(plan.config.parallel.context, plan)
    lines = [f"{'CP':>4} {'s/step':>9} {'peak GB':>8} {'activations':>11} {'idle':>6}  layout"]
    for context, plan in sorted(best.items()):
        lines.append(
            f"{context:4} {plan.seconds.step:9.0f} {plan.fullest.peak / GB:8.1f} "
            f"{plan.fullest.activations / GB:11.1f} {plan.bubble:6.1%}  {layout_name(plan)}"
        )
    return "\n".join([*lines, _judgement(best)])


def _judgement(best: dict[int, Plan]) -> str:
    """Returns a sentence on whether context parallel helps, with the seconds that it saves and costs."""
    longer = [plan for context, plan in best.items() if context > 1]
    if not longer:
        return "context parallel: no layout with it fits, or the model has no support for it"
    fastest = min(longer, key=lambda plan: plan.seconds.step)
    context = fastest.config.parallel.context
    if 1 not in best:
        return f"context parallel is needed: no layout without it fits; {context} ranks are the fastest"
    now, then = vars(fastest.seconds), vars(best[1].seconds)
    changes = {name.replace("_", " "): now[name] - then[name] for name in now}
    parts = ", ".join(f"{name} {change:+.1f}" for name, change in changes.items() if abs(change) >= 0.05)
    total = fastest.seconds.step - best[1].seconds.step
    if abs(total) < NOTICEABLE * best[1].seconds.step:
        helps = "makes no noticeable difference"
    else:
        helps = "helps" if total < 0 else "does not help"
    return f"context parallel {helps}: {context} ranks against 1 change {total:+.1f} s ({parts or 'nothing'})"


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns every figure; bytes, seconds and counts."""
    return {
        "layout": layout_name(plan),
        "world_size": plan.world_size,
        "fits": plan.fits,
        "parallel": asdict(plan.config.parallel),
        "recompute": plan.config.model.recompute,
        "max_tokens_per_microbatch": plan.config.train.max_tokens_per_microbatch,
        "data_parallel": plan.data_parallel,
        "parameters": plan.parameters,
        "cluster": asdict(plan.cluster),
        "memory": [asdict(memory) | {"peak": memory.peak} for memory in plan.ranks],
        "kv_space": asdict(plan.kv),
        "checkpoint": asdict(plan.checkpoint),
        "micro_batches": plan.micro_batches,
        "bubble": plan.bubble,
        "context_imbalance": plan.context_imbalance,
        "flops": plan.flops,
        "traffic": asdict(plan.traffic),
        "tokens": asdict(plan.tokens) | {"saved": plan.tokens.saved},
        "seconds": asdict(plan.seconds) | {"step": plan.seconds.step},
        "assumptions": assumptions(plan),
    }


def draw(plans: list[Plan], path: Path) -> None:
    """Draws memory of the fullest rank and step time of each plan as stacked bars, the first at the top."""
    # Imported here: matplotlib takes seconds to import.
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 1.6 + 0.45 * len(plans)), sharey=True, layout="constrained"
    )
    names = [layout_name(plan) for plan in plans]
    memory = [{part: getattr(plan.fullest, part) / GB for part in MEMORY_PARTS} for plan in plans]
    _stack(left, names, memory)
    _stack(right, names, [{k.replace("_", " "): v for k, v in vars(plan.seconds).items()} for plan in plans])
    gpu = plans[0].cluster.gpu
    left.axvline(gpu.memory_bytes / GB, color="black", linestyle="--")
    left.set_title(f"GB on the fullest of {plans[0].world_size} {gpu.name} (dashed: capacity)")
    right.set_title("seconds per step")
    left.invert_yaxis()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _stack(axes: Any, names: list[str], parts: list[dict[str, float]]) -> None:
    start = [0.0] * len(parts)
    for part in parts[0]:
        values = [bar[part] for bar in parts]
        axes.barh(names, values, left=start, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))
