"""Per-token results of packed micro-batches, brought back to flat arrays that every rank holds.

Shape suffixes: N response rows of a micro-batch, T tokens of all responses.
"""

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bicc import platform
from megatron_bicc.packing.types import MicroBatch


def gather_tokens(values: list[Tensor], batches: list[MicroBatch], num_tokens: int) -> np.ndarray:
    """float32 [T]: each token's value, or the mean of its values where several segments hold it. Collective.

    `values` are float [N] of this rank's micro-batches on the last pipeline stage, and empty elsewhere.
    Tokens that no micro-batch holds are NaN.
    """
    sums = torch.zeros(2, num_tokens, dtype=torch.float64)
    for value_N, batch in zip(values, batches, strict=False):
        index = torch.from_numpy(batch.gather)
        sums[0].index_add_(0, index, value_N.double().cpu())
        sums[1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    sums = _sum_over_ranks(sums.to(platform.device()))
    return (sums[0] / sums[1]).float().cpu().numpy()


def sum_scalar(value: float) -> float:
    """The sum over data-parallel ranks of a number that the last pipeline stage holds (0 on the others)."""
    return float(_sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=platform.device())))


def sum_over_all(values: Tensor) -> Tensor:
    """The sum over all ranks of parts that no two of them share, in place. Collective."""
    dist.all_reduce(values)
    return values


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
