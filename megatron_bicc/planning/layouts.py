"""Every layout of a policy over a cluster that a run's start-up accepts, planned; the best first."""

import copy
from collections.abc import Iterator
from itertools import product

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.config import Config, ParallelConfig, check_processes
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import check_layout
from megatron_bicc.planning.memory import Cluster, Sizes
from megatron_bicc.planning.plan import Plan, make_plan
from megatron_bicc.planning.shards import Shard, build_shards
from megatron_bicc.planning.synthetic import SyntheticStep, UnknownTokenizer, synthetic_step

MAX_PIPELINE = 16
CHUNKS = (1, 2, 4, 5)
"""Virtual pipeline sizes that are tried"""
WEIGHT_AND_GRADIENT_BYTES = 6
"""bf16 weight and fp32 gradient of a parameter: the least that a rank holds of each of its own"""


def propose(
    config: Config,
    hf_config: PretrainedConfig,
    world_size: int,
    cluster: Cluster,
    server_gpus: int,
    tokenizer: PreTrainedTokenizerBase | UnknownTokenizer,
) -> list[Plan]:
    """Plans of all layouts that fit, the shortest step first.

    Tensor parallel stays within a host and brings sequence parallel with it. Everything but
    `parallel` and `model.recompute` is as `config`, resolved, says.
    """
    shards: dict[tuple[int, int, int], list[Shard]] = {}
    steps: dict[tuple[int, int], SyntheticStep] = {}
    plans = []
    for parallel in _layouts(hf_config, world_size, cluster):
        trial = copy.deepcopy(config)
        trial.parallel = parallel
        place = (parallel.tensor, parallel.pipeline, parallel.expert)
        if place not in shards:
            shards[place] = build_shards(trial, hf_config, world_size, ranks=(0, world_size - 1))
        data = world_size // (parallel.tensor * parallel.pipeline)
        if (parallel.tensor, data) not in steps:
            steps[parallel.tensor, data] = synthetic_step(trial, hf_config, tokenizer, data)
        for recompute in ("none", "selective", "full"):
            trial = copy.deepcopy(trial)
            trial.model.recompute = recompute
            step = steps[parallel.tensor, data]
            plans.append(make_plan(trial, hf_config, world_size, step, cluster, server_gpus, shards[place]))
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds.step)


def _layouts(hf_config: PretrainedConfig, world_size: int, cluster: Cluster) -> Iterator[ParallelConfig]:
    sizes = Sizes.of(hf_config)
    tensors = _powers_of_two(min(cluster.gpus_per_host, world_size))
    pipelines = [n for n in range(1, MAX_PIPELINE + 1) if sizes.layers % n == 0]
    experts = _powers_of_two(sizes.experts or 1)
    for tensor, pipeline, expert, chunks in product(tensors, pipelines, experts, CHUNKS):
        parallel = ParallelConfig(
            tensor=tensor, sequence=tensor > 1, pipeline=pipeline, virtual_pipeline=chunks, expert=expert
        )
        ways = tensor * pipeline * (expert if sizes.experts else 1)
        too_large = WEIGHT_AND_GRADIENT_BYTES * sizes.parameters / ways > cluster.gpu.memory_bytes
        if not too_large and _is_possible(hf_config, parallel, world_size):
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
