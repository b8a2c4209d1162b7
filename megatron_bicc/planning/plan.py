"""A configuration on a cluster: whether it fits, and the time of a step under stated assumptions."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_bicc.config import Config
from megatron_bicc.planning.architecture import Sizes
from megatron_bicc.planning.gpus import Cluster
from megatron_bicc.planning.memory import KvSpace, Memory, kv_space, memory_of
from megatron_bicc.planning.shards import Shard, build_shards
from megatron_bicc.planning.synthetic import SyntheticStep
from megatron_bicc.planning.work import Traffic, step_flops, traffic_of, work_of


@dataclass(frozen=True)
class Seconds:
    """Of a step, in the order in which they pass; nothing overlaps."""

    rollout: float
    compute: float
    """Log-probs and training, the pipeline's idle time included"""
    tensor_traffic: float
    pipeline_traffic: float
    expert_traffic: float
    data_traffic: float
    sync: float

    @property
    def step(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Tokens:
    """What the shared-prefix layout saves."""

    packed: int
    """Rows that are trained"""
    one_row_a_response: int
    """Rows that the same training takes where each response has a prefix of its own"""

    @property
    def saved(self) -> int:
        return self.one_row_a_response - self.packed


@dataclass(frozen=True)
class Plan:
    """What a configuration costs on a cluster."""

    config: Config
    world_size: int
    cluster: Cluster
    parameters: int
    ranks: list[Memory]
    """The first and the last pipeline stage's"""
    micro_batches: int
    """That a data-parallel rank trains in an update"""
    bubble: float
    """Share of the pipeline's time that it idles"""
    flops: int
    """Of a data-parallel replica, a step"""
    traffic: Traffic
    tokens: Tokens
    kv: KvSpace
    seconds: Seconds

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.config.parallel.tensor * self.config.parallel.pipeline)

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

    Args:
        step: packed for the configuration's data-parallel size.
        server_gpus: GPUs of one rollout server.
        shards: those of the first and the last rank, where the caller has them.

    Raises:
        ValueError: the layout is not possible.
    """
    sizes = Sizes.of(hf_config)
    shards = shards or build_shards(config, hf_config, world_size, ranks=(0, world_size - 1))
    p, work = config.parallel, work_of(step, config)
    micro_batches = max(sum(len(plan.ranks[0]) for plan in u.trained.values()) for u in step.updates)
    ranks = [memory_of(shard, sizes, config, micro_batches, cluster) for shard in shards]
    idle = (p.pipeline - 1) / p.virtual_pipeline
    data_parallel = world_size // (p.tensor * p.pipeline)
    traffic = traffic_of(sizes, config, work, shards[0], data_parallel, len(step.updates))
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
        flops=flops,
        traffic=traffic,
        tokens=Tokens(sum(s["tokens_packed"] for s in stats), sum(s["tokens_rows"] for s in stats)),
        kv=kv_space(max(ranks, key=lambda rank: rank.state), sizes, cluster, server_gpus),
        seconds=_seconds(sizes, config, world_size, step, cluster, server_gpus, flops, bubble, traffic),
    )


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
    p, gpu = config.parallel, cluster.gpu
    inside = gpu.nvlink if p.tensor <= cluster.gpus_per_host else cluster.network
    one_host = world_size <= cluster.gpus_per_host
    outside = (gpu.nvlink if one_host else cluster.network) * cluster.link_efficiency
    replica = p.tensor * p.pipeline * gpu.bf16_flops * cluster.compute_efficiency
    return Seconds(
        rollout=_rollout(sizes, config, world_size, step, cluster, server_gpus),
        compute=flops / replica / (1 - bubble),
        tensor_traffic=traffic.tensor / (inside * cluster.link_efficiency),
        pipeline_traffic=traffic.pipeline / outside,
        expert_traffic=traffic.expert / outside,
        data_traffic=traffic.data / outside,
        sync=traffic.sync / cluster.sync_link,
    )


def _rollout(
    sizes: Sizes,
    config: Config,
    world_size: int,
    step: SyntheticStep,
    cluster: Cluster,
    server_gpus: int,
) -> float:
    """Generation on as many GPUs as train: every token of a server reads the weights once for all requests in
    flight, and each request its own keys and values; the longest response decides how many tokens that is."""
    servers = max(1, world_size // server_gpus)
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    batch = -(-rollouts // servers)
    mean = step.response_tokens / rollouts
    read = 2 * sizes.layers * sizes.products_a_layer + 2 * sizes.vocabulary * sizes.hidden
    read += batch * mean / 2 * sizes.kv_bytes_a_token
    bandwidth = server_gpus * cluster.gpu.memory_bandwidth * cluster.decode_efficiency
    return step.longest_response * read / bandwidth
