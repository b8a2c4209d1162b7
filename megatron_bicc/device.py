"""Where the processes run: CUDA with NCCL, or the CPU with gloo. No other room tests for CUDA."""

import os
import socket
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bicc.device_cpu import CudaOnCpu
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.heartbeat import Heartbeat

TIMEOUT = timedelta(minutes=30)
MEETING_TIMEOUT = timedelta(minutes=5)
_heartbeat: Heartbeat | None = None
_store: dist.Store | None = None


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


def node_address() -> str:
    """IPv4 address of this host on the network where the processes meet; loopback without torchrun."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # chooses a route, sends nothing
        return probe.getsockname()[0]


def world_size() -> int:
    """Number of processes of the job, as torchrun tells it; 1 without torchrun.

    Raises UserError if WORLD_SIZE is no such number.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"WORLD_SIZE is {size!r}; it must be a whole number from 1")
    return int(size)


def start_distributed() -> None:
    """Joins the process group that torchrun describes; alone, makes a group of one.

    Raises UserError naming the address if the processes cannot meet there.
    """
    if has_cuda():
        torch.cuda.set_device(local_rank())
    global _store
    _store, rank, size = _meet() if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    dist.init_process_group(_backend(), store=_store, rank=rank, world_size=size, timeout=TIMEOUT)


def is_first() -> bool:
    """Whether this is the job's first process, as torchrun tells it, before the processes have met, too."""
    return os.environ.get("RANK", "0") == "0"


def store() -> dist.Store:
    """The store that the processes met at: small values that all can read and count, without a collective."""
    return _store


def quiet() -> bool | None:
    """tqdm's `disable`: only the first process draws a bar, and only on a terminal."""
    return None if dist.get_rank() == 0 else True


def watch_hosts(heartbeat_timeout_s: float) -> None:
    """From now on a host that is silent for so long ends this process with one line; 0: never. Collective."""
    global _heartbeat
    if heartbeat_timeout_s and "RANK" in os.environ:
        _heartbeat = Heartbeat(heartbeat_timeout_s, local_rank())


def end_distributed() -> None:
    """Leaves the process group once every process is here. Collective."""
    dist.barrier()
    if _heartbeat:
        _heartbeat.stop()
    dist.destroy_process_group()


def is_connection_loss(error: RuntimeError) -> bool:
    """Whether another process, or the link to it, is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def lost_connection(error: RuntimeError) -> str:
    """One line that says which process on which host lost the connection, and to whom."""
    place = f"process {os.environ.get('RANK', '0')} on host {socket.gethostname()}"
    return f"{place} lost the connection to another process: {first_line(error)}"


def megatron() -> AbstractContextManager:
    """Inside it megatron-core may be called: on a CPU its CUDA calls are redirected, else nothing changes."""
    return nullcontext() if has_cuda() else CudaOnCpu()


def _meet() -> tuple[dist.Store, int, int]:
    """(store, rank, number of processes) at the address that torchrun gave."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT is {address}; process {os.environ['RANK']} on host "
            f"{socket.gethostname()} cannot meet the others there: {first_line(error)}; give a free port "
            "of the first host, the same on every host"
        ) from error
    return dist.PrefixStore("default_pg", store), rank, size


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
