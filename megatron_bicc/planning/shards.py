"""Builds every rank's shard of the policy on the meta device in one process, with the classes of a run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.device_cpu import CudaOnCpu
from megatron_bicc.errors import UserError
from megatron_bicc.model.build import PolicyModel, build_modules, transformer_config
from megatron_bicc.model.optimizer import make_optimizer
from megatron_bicc.model.policy import data_parallel, start_model_parallel
from megatron_bicc.weights.hf_files import HfTensors, TensorReader
from megatron_bicc.weights.hf_weights import fill_parameters


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process a rank of a job of `world_size` in the block; new tensors have shapes but no data.

    Collective calls return at once and move nothing. The process must not belong to another job, and
    megatron-core's groups that are created in the block must be destroyed in it.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with CudaOnCpu("meta"), torch.device("meta"):
            yield
    finally:
        dist.destroy_process_group()


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Returns the number of data-parallel ranks: what the other axes leave of all ranks."""
    return world_size // (parallel.tensor * parallel.context * parallel.pipeline)


ADAM_BYTES = 8
"""Bytes of Adam's two fp32 moments per parameter of a rank's share"""


@dataclass(frozen=True)
class Shard:
    """One rank's part of the policy; bytes are as allocated, with padding."""

    rank: int
    pipeline_rank: int
    layers: tuple[int, ...]
    """Numbers of its transformer layers, from 1"""
    parameters: int
    """Elements of its parameters, without padding"""
    weight_bytes: int
    gradient_bytes: int
    expert_weight_bytes: int
    """Of weight_bytes, the experts'"""
    expert_gradient_bytes: int
    """Of gradient_bytes, the experts'"""
    optimizer_bytes: int
    """Its share of fp32 main weights (if the model is not fp32) and of Adam's moments"""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def build_shards(
    config: Config,
    hf_config: PretrainedConfig,
    world_size: int,
    ranks: Iterable[int] | None = None,
    weights: HfTensors | None = None,
) -> list[Shard]:
    """Builds the shards of the given ranks; of all ranks whose shards differ in size by default.

    weights: if given, every parameter is looked up in their headers. Raises UserError naming the layout,
    architecture or tensor that does not fit.
    """
    source = None if weights is None else HeadersOnly(weights)
    job = _Job(config, hf_config, transformer_config(hf_config, config), world_size, source)
    if ranks is not None:
        return [_build_shard(job, rank) for rank in ranks]
    stage = world_size // config.parallel.pipeline  # the ranks of a pipeline stage are consecutive
    return [shard for first in range(0, world_size, stage) for shard in _stage_shards(job, first, stage)]


@dataclass(frozen=True)
class _Job:
    config: Config
    hf_config: PretrainedConfig
    megatron_config: TransformerConfig
    world_size: int
    source: TensorReader | None


def _build_shard(job: _Job, rank: int) -> Shard:
    with _built(job, rank) as (_, _, shard):
        return shard


def _stage_shards(job: _Job, first: int, ranks: int) -> list[Shard]:
    """Builds the first rank of a pipeline stage, and of each other size its first rank.

    All ranks of a stage have the same modules. They differ in the share of the optimizer, whose last ones
    hold padding, and in the experts that they read.
    """
    with _built(job, first) as (modules, chunks, shard):
        if job.source is not None:
            for expert_rank in range(1, job.config.parallel.expert):
                parallel_state.set_expert_model_parallel_rank(expert_rank)
                fill_parameters(modules, job.hf_config, job.source)
        dense = optimizer_shares([b for chunk in chunks for b in chunk.buffers])
        experts = optimizer_shares([b for chunk in chunks for b in chunk.expert_parallel_buffers])
    # megatron-core's order of ranks: tensor, context, data; and of the same ranks: expert, expert-data
    p = job.config.parallel
    shares = [(dense[i // p.tensor], experts[i // p.expert] if experts else 0) for i in range(ranks)]
    others = sorted({share: i for i, share in reversed(list(enumerate(shares)))}.values())
    return [shard, *(_build_shard(job, first + i) for i in others if i > 0)]


def optimizer_shares(buffers: list[_ParamAndGradBuffer]) -> list[int]:
    """Returns the number of elements that each rank of the buffers' group has in the distributed optimizer.

    Each bucket is cut evenly; padding between its parameters and at its end does not count.
    """
    totals: np.ndarray | int = 0
    for buffer in buffers:
        starts, stops, *_ = np.array([span[:2] for span in buffer.param_index_map.values()]).T
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // buffer.data_parallel_world_size
            cuts = bucket.offset + share * np.arange(buffer.data_parallel_world_size + 1)
            totals = totals + np.diff(np.clip(cuts[:, None] - starts, 0, stops - starts).sum(1))
    return [] if isinstance(totals, int) else totals.astype(int).tolist()


class HeadersOnly:
    """A TensorReader of a directory's headers: shapes without data."""

    def __init__(self, source: HfTensors) -> None:
        self.path = source.path
        self._tensors = source.describe()

    def read(self, name: str) -> Tensor:
        """Returns one tensor on the meta device. Raises UserError if it is missing."""
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]


@contextmanager
def _built(job: _Job, rank: int) -> Iterator[tuple[list[PolicyModel], list[DistributedDataParallel], Shard]]:
    """Yields a rank's modules, the same wrapped, and its shard; this process is that rank in the block."""
    config, megatron_config = job.config, job.megatron_config
    with fake_rank(rank, job.world_size), _model_parallel(config):
        temperature, meta = config.rollout.temperature, torch.device("meta")
        modules = build_modules(megatron_config, job.hf_config, temperature, meta)
        if job.source is not None:
            fill_parameters(modules, job.hf_config, job.source)
        chunks = [data_parallel(config, megatron_config, module) for module in modules]
        # the state is counted in fp32 and on the GPU, wherever megatron.optimizer puts it; the outputs say so
        plain = replace(config, megatron=replace(config.megatron, optimizer={}))
        optimizer = make_optimizer(plain, chunks, gloo_groups=False)
        shard = Shard(
            rank=rank,
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            layers=tuple(layer.layer_number for module in modules for layer in module.decoder.layers),
            parameters=sum(p.numel() for module in modules for p in module.parameters()),
            **state_bytes(modules, chunks, optimizer),
        )
        yield modules, chunks, shard


@contextmanager
def _model_parallel(config: Config) -> Iterator[None]:
    try:
        start_model_parallel(config, gloo_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def state_bytes(
    modules: list[PolicyModel], chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, int]:
    """Returns bytes of weights, gradients and optimizer by Shard's names: each whole storage once."""
    parameters = [p for module in modules for p in module.parameters()]
    experts = [p for p in parameters if not getattr(p, "allreduce", True)]
    weights, expert_weights = _storages(parameters), _storages(experts)
    gradients, expert_gradients = (_storages(p.main_grad for p in own) for own in (parameters, experts))
    own = [
        p
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
    ]
    main = {key: size for key, size in _storages(own).items() if key not in weights}
    return {
        "weight_bytes": sum(weights.values()),
        "gradient_bytes": sum(gradients.values()),
        "expert_weight_bytes": sum(expert_weights.values()),
        "expert_gradient_bytes": sum(expert_gradients.values()),
        "optimizer_bytes": sum(main.values()) + ADAM_BYTES * sum(p.numel() for p in own),
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the bytes of each storage behind the tensors, by its identity."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
