"""Measures time and peak memory of alternatives, on a GPU or a CPU."""

import contextlib
import ctypes
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel

M_MMAP_THRESHOLD = -3
"""Option of mallopt, from the C library's malloc.h"""


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Starts megatron-core's process groups for one process."""
    device.start_distributed()
    start_model_parallel(Config())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def median_ms(repeats: int, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns each call's median time in milliseconds; on a CPU, processor time.

    They run in turns, so that a busy machine slows all of them alike; the first turn is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = now()
            call()
            if turn:
                times[name].append((now() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def now() -> float:
    """Returns seconds: processor time on a CPU; wall time on a GPU, after synchronization."""
    if not device.has_cuda():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(call: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Returns the peak memory of `call(*arguments)()` beyond what was in use before, in MB.

    Measured in a child process, so `call` must be a function of a module. What `call` allocates before it
    returns the function to measure does not count.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_mb, call, arguments).result()


def _peak_mb(call: Callable[..., Callable[[], Any]], arguments: tuple) -> float:
    with one_process():
        measured = call(*arguments)
        return peak_beyond(measured) / 2**20


def peak_beyond(call: Callable[[], Any]) -> int:
    """Returns a call's peak memory beyond what was in use before, in bytes; the GPU's if there is one."""
    if device.has_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    call()
    return (_resident_kb("VmHWM") - before) * 1024


def return_freed_memory() -> None:
    """Makes the allocator return freed memory at once, so that resident memory is the memory in use.

    Call it before anything large is allocated: memory freed earlier is reused and would not be counted.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def _resident_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def machine() -> str:
    """Describes the machine of the figures."""
    if device.has_cuda():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
