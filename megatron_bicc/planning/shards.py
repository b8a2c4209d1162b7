"""Builds every rank's shard of the policy on the meta device in one process, with the classes of a run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.device_cpu import CudaOnCpu
from megatron_bicc.errors import UserError
from megatron_bicc.model.build import PolicyModel, build_modules, transformer_config
from megatron_bicc.model.families import family_of
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
    data_rank: int
    layers: tuple[int, ...]
    """Numbers of its transformer layers, from 1"""
    parameters: int
    """Elements of its parameters, without padding"""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Its share of fp32 main weights (if the model is not fp32) and of Adam's moments"""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def distinct_ranks(parallel: ParallelConfig, world_size: int, has_experts: bool) -> list[int]:
    """Returns the ranks whose shards differ in shape.

    Tensor parallel cuts every tensor evenly, so one rank represents its tensor-parallel group; with experts
    it does not, since expert-parallel groups cross the tensor-parallel ones.
    """
    return list(range(0, world_size, 1 if has_experts else parallel.tensor))


def build_shards(
    config: Config,
    hf_config: PretrainedConfig,
    world_size: int,
    ranks: Iterable[int] | None = None,
    weights: HfTensors | None = None,
) -> list[Shard]:
    """Builds the shards of `ranks`; None: of every distinct rank.

    weights: if given, must hold every parameter in the right shape. Raises UserError naming the layout,
    architecture or tensor that does not fit.
    """
    megatron_config = transformer_config(hf_config, config)
    if ranks is None:
        ranks = distinct_ranks(config.parallel, world_size, family_of(hf_config).experts)
    source = None if weights is None else HeadersOnly(weights)
    return [_build_shard(config, hf_config, megatron_config, world_size, rank, source) for rank in ranks]


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


def _build_shard(
    config: Config,
    hf_config: PretrainedConfig,
    megatron_config: TransformerConfig,
    world_size: int,
    rank: int,
    source: TensorReader | None,
) -> Shard:
    with fake_rank(rank, world_size), _model_parallel(config):
        modules = build_modules(megatron_config, hf_config, config.rollout.temperature, torch.device("meta"))
        if source is not None:
            fill_parameters(modules, hf_config, source)
        chunks = [data_parallel(config, megatron_config, module) for module in modules]
        # the state is counted in fp32 and on the GPU, wherever megatron.optimizer puts it; the outputs say so
        plain = replace(config, megatron=replace(config.megatron, optimizer={}))
        optimizer = make_optimizer(plain, chunks, gloo_groups=False)
        return Shard(
            rank=rank,
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
            layers=tuple(layer.layer_number for module in modules for layer in module.decoder.layers),
            parameters=sum(p.numel() for module in modules for p in module.parameters()),
            **state_bytes(modules, chunks, optimizer),
        )


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
    weights = _storages(parameters)
    gradients = _storages(p.main_grad for p in parameters)
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
        "optimizer_bytes": sum(main.values()) + ADAM_BYTES * sum(p.numel() for p in own),
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the bytes of each storage behind the tensors, by its identity."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
