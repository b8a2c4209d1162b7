"""Where the processes run: CUDA with NCCL, or the CPU with gloo. No other room tests for CUDA."""

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bicc.platform.cpu import CudaOnCpu

TIMEOUT = timedelta(minutes=30)


def has_cuda() -> bool:
    """Whether this process trains on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Device of this process: the GPU of its local rank, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def local_rank() -> int:
    """Rank of this process on its host, as torchrun tells it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_rank() -> int:
    """Rank of this process's host, as torchrun tells it; 0 without torchrun."""
    return int(os.environ.get("GROUP_RANK", "0"))


def world_size() -> int:
    """Number of processes of the job, as torchrun tells it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed() -> None:
    """Joins the process group that torchrun describes; alone, makes a group of one."""
    if has_cuda():
        torch.cuda.set_device(local_rank())
    if "RANK" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(_backend(), store=store, rank=0, world_size=1, timeout=TIMEOUT)
    else:
        dist.init_process_group(_backend(), timeout=TIMEOUT)


def megatron() -> AbstractContextManager:
    """Inside it megatron-core may be called: on a CPU its CUDA calls are redirected, else nothing changes."""
    return nullcontext() if has_cuda() else CudaOnCpu()


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
