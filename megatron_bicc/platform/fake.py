"""One rank of a job of any size in this process alone: no other processes, no data, nothing computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bicc.platform.cpu import CudaOnCpu


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Inside it this process is a rank of a job of `world_size`, and new tensors have shapes but no data.

    Collective calls return at once and move nothing. The process may belong to no other job. Whoever makes
    megatron-core's groups inside it ends them inside it.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with CudaOnCpu("meta"), torch.device("meta"):
            yield
    finally:
        dist.destroy_process_group()
