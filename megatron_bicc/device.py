"""The device, the process group and the hosts' heartbeats: CUDA with NCCL, or the CPU with gloo.

Only this module checks for CUDA. A run trains on the CPU where torch is a CPU build and there is no GPU, or
with MEGATRON_BICC_DEVICE=cpu; otherwise a GPU that cannot be used is an error.

A host that is cut off reports no error, and a collective would wait for its timeout: the first process of
each host sends heartbeats through the store, and ends when another's stop.
"""

import gc
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from datetime import timedelta
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_bicc import launcher
from megatron_bicc.collective import gathered
from megatron_bicc.errors import UserError, first_line

VARIABLE = "MEGATRON_BICC_DEVICE"
"""Environment variable; "cpu" asks for the CPU on a host with GPUs"""
OLDEST_DRIVER = 580
"""The oldest branch of the NVIDIA driver that runs CUDA 13, for which torch 2.11 and later are built"""
INTERVAL_S = 2.0
"""Seconds between two heartbeats"""
CHECK_S = 1.0
"""Seconds between two comparisons of the times of the last heartbeats"""
EXIT_STATUS = 3
"""Of a process that ends because a host is silent"""


class Heartbeat:
    """Watches the other hosts of the job.

    Two threads, because a call to the store may block for as long as the link is cut: one calls the store,
    the other compares times.
    """

    def __init__(self, timeout_s: float, local_rank: int) -> None:
        """Starts the threads on the first process of each host. Collective.

        timeout_s: how long another host, or the store, may be silent (parallel.heartbeat_timeout_s).
        """
        self._silence_s = timeout_s
        self._hosts, self._prefix = _first_processes(local_rank)
        self._rank = dist.get_rank()
        self._ended = threading.Event()
        if len(self._hosts) > 1:
            if self._rank in self._hosts:
                self._start()
            # Reading a key waits until it is set. Without this barrier a host that is lost before it sets
            # its key would be reported as a store that does not answer.
            dist.barrier()

    def stop(self) -> None:
        """Stops watching. Call once no process waits for another."""
        self._ended.set()

    def _start(self) -> None:
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: if it blocks, the process group's store must not
        self._store = dist.TCPStore(
            *self._address, is_master=False, timeout=timedelta(seconds=self._silence_s)
        )
        self._store.set(self._key(self._rank), "0")
        self._counters = {rank: b"" for rank in self._hosts if rank != self._rank}
        self._store_answered_at = time.monotonic()
        self._moved_at = dict.fromkeys(self._counters, self._store_answered_at)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True).start()

    def _beat(self) -> None:
        """Increments this host's counter and reads the others'. Blocks or fails while the link is cut."""
        others, count = [self._key(rank) for rank in self._counters], 0
        while not self._ended.wait(INTERVAL_S):
            try:
                count += 1
                self._store.set(self._key(self._rank), str(count))
                counters = self._store.multi_get(others)
            except RuntimeError:  # _watch notices that _store_answered_at has stopped
                continue
            self._store_answered_at = time.monotonic()
            for rank, counter in zip(self._counters, counters, strict=True):
                if counter != self._counters[rank]:
                    self._counters[rank], self._moved_at[rank] = counter, self._store_answered_at

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_S):
            if time.monotonic() - self._store_answered_at > self._silence_s:
                address = f"{self._address[0]}:{self._address[1]}"
                self._end(f"the rendezvous store at {address} does not answer")
            # measured at the last answer: while the store is silent, nothing is known of the other hosts
            for rank, moved_at in self._moved_at.items():
                if self._store_answered_at - moved_at > self._silence_s:
                    self._end(f"process {rank} on host {self._hosts[rank]} is silent")

    def _end(self, what: str) -> None:
        """Ends the process at once: its main thread may be inside a collective that never returns."""
        line = (
            f"megatron_bicc: error: process {self._rank} on host {self._hosts[self._rank]}: {what} for "
            f"{self._silence_s:g} seconds (parallel.heartbeat_timeout_s): the host or the link is down; "
            "resume from the newest checkpoint with checkpoint.resume=true"
        )
        print(f"\n{line}", file=sys.stderr, flush=True)  # a new line, not behind the progress bar
        os._exit(EXIT_STATUS)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"


def _first_processes(local_rank: int) -> tuple[dict[int, str], str]:
    """Returns (host name by rank, for the first process of every host; a key prefix unique to this start).

    The prefix is new at every start because torchrun keeps the store when it restarts the workers.
    """
    everyone = gathered((local_rank == 0, socket.gethostname(), secrets.token_hex(8)))
    hosts = {rank: host for rank, (first, host, _) in enumerate(everyone) if first}
    return hosts, f"megatron_bicc/heartbeat/{everyone[0][2]}"


TIMEOUT = timedelta(minutes=30)
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited or there was a network error",
)
"""Messages of gloo, NCCL (ncclRemoteError) and the store for a lost connection"""

Structure = TypeVar("Structure")

_heartbeat: Heartbeat | None = None
_store: dist.Store | None = None
_kernels: ModuleType | None = None
_ALIGNMENT = 64
"""Bytes to a multiple of which `upload` aligns arrays, so that every dtype can view its part"""


def has_cuda() -> bool:
    """Returns whether this process trains on a CUDA device: never with MEGATRON_BICC_DEVICE=cpu."""
    return not cpu_is_asked_for() and torch.cuda.is_available()


def cpu_is_asked_for() -> bool:
    """Returns whether MEGATRON_BICC_DEVICE is cpu."""
    return os.environ.get(VARIABLE) == "cpu"


def device() -> torch.device:
    """Returns the device of this process: the GPU of its local rank, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def choose_kernels(wanted: Literal["auto", "torch"]) -> str:
    """Chooses, once at start-up, between csrc's CUDA kernels and plain torch; returns a line for the log.

    wanted: model.kernels.
    """
    global _kernels
    _kernels = None
    if wanted == "torch":
        return "plain torch, as model.kernels=torch asks"
    if not has_cuda():
        return "plain torch: no GPU"
    try:
        # Imported late: it exists only where csrc was built with nvcc, and loads the CUDA runtime.
        from megatron_bicc import _C_cuda
    except ImportError as error:
        return f"plain torch: csrc's CUDA kernels are not built ({first_line(error)})"
    _kernels = _C_cuda
    return "csrc's CUDA kernels"


def kernels() -> ModuleType | None:
    """Returns megatron_bicc._C_cuda where csrc's CUDA kernels compute, None where plain torch does."""
    return _kernels


def stream(tensor: torch.Tensor) -> int:
    """Returns the address of the current CUDA stream of a tensor's device; 0 for a CPU tensor."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def free_memory() -> None:
    """Gives back the GPU memory that torch keeps for later allocations; does nothing on a CPU.

    Another process on the same GPU, such as a rollout server, cannot use it before.
    """
    if has_cuda():
        gc.collect()  # tensors in reference cycles
        torch.cuda.empty_cache()


def limit_connections() -> None:
    """Makes CUDA run kernels in the order of their launches, on which megatron-core relies to overlap work.

    Call it before CUDA starts. A value that the user has set stays.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def unused_bytes() -> int:
    """Returns the bytes of this process's GPU that no process uses; 0 on a CPU."""
    return torch.cuda.mem_get_info(device())[0] if has_cuda() else 0


def gpu_name() -> str:
    """Returns the name of this process's GPU, such as NVIDIA H100 80GB HBM3; empty on a CPU."""
    return torch.cuda.get_device_name(device()) if has_cuda() else ""


def take_peak_bytes() -> int:
    """Returns the most GPU memory that tensors have taken since the last call; 0 on a CPU."""
    if not has_cuda():
        return 0
    peak = torch.cuda.max_memory_allocated(device())
    torch.cuda.reset_peak_memory_stats(device())
    return peak


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name by which csrc's kernels and SGLang know a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def upload(arrays: Sequence[np.ndarray], to: torch.device) -> list[torch.Tensor]:
    """Returns each array as a tensor on a device, of the same dtype and shape, after one copy of them all.

    To a GPU the copy is queued on the current stream; the host does not wait for it.
    """
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=to.type == "cuda")
    for array, part in zip(arrays, host.split(sizes), strict=True):
        part.numpy()[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    found = []
    for array, part in zip(arrays, host.to(to, non_blocking=True).split(sizes), strict=True):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        found.append(part[: array.nbytes].view(dtype).view(array.shape))
    return found


def upload_tensors(structure: Structure, to: torch.device) -> Structure:
    """Returns dataclasses, lists and tuples with their tensors, made on the CPU, on a device, as `upload`."""
    found: list[torch.Tensor] = []
    _with_tensors(structure, found.append)
    uploaded = iter(upload([tensor.numpy() for tensor in found], to))
    return _with_tensors(structure, lambda _: next(uploaded))


def _with_tensors(value: Any, of: Callable[[torch.Tensor], Any]) -> Any:
    """Returns a structure with of(tensor) in the place of every tensor."""
    if isinstance(value, torch.Tensor):
        return of(value)
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item, of) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _with_tensors(getattr(value, f.name), of) for f in fields(value)})
    return value


def local_rank() -> int:
    """Returns the rank of this process on its host; 0 without torchrun."""
    return launcher.local_rank()


def node_rank() -> int:
    """Returns the rank of this process's host; 0 without torchrun."""
    return int(os.environ.get("GROUP_RANK", "0"))


def node_address() -> str:
    """Returns this host's IPv4 address on the network of the rendezvous; loopback without torchrun."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # connecting a UDP socket chooses a route and sends nothing
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return probe.getsockname()[0]


def world_size() -> int:
    """Returns the number of processes of the job; 1 without torchrun.

    Raises UserError if WORLD_SIZE is not a positive whole number.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"WORLD_SIZE is {size!r}; it must be a whole number from 1")
    return int(size)


def is_first() -> bool:
    """Returns whether this is rank 0; known before the process group is made."""
    return launcher.rank() == 0


def start_distributed() -> None:
    """Joins the process group that torchrun describes; without torchrun, makes a group of one process.

    Raises UserError that names the address if the rendezvous fails, and as `choose_device` does.
    """
    global _store
    choose_device()
    if has_cuda():
        torch.cuda.set_device(local_rank())
    _store, rank, size = _meet() if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    backend = "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TIMEOUT)


def choose_device() -> None:
    """Checks that this process has a GPU, or hides all GPUs if the CPU is asked for. Not collective.

    A run calls it before it reads its files, which takes seconds. CUDA does not start here. Raises UserError
    that names driver and versions if there are GPUs that torch cannot use, or more processes than GPUs, and
    for another value of MEGATRON_BICC_DEVICE.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "cpu"):
        raise UserError(f"{VARIABLE} is {asked!r}; it must be cpu, or unset to use the GPUs")
    if has_cuda():
        count = torch.cuda.device_count()
        if local_rank() >= count:
            raise UserError(
                f"{launcher.place()} has local rank {local_rank()}, but torch sees {_gpus(count)}: start one "
                f"process for each GPU (torchrun --nproc-per-node {count}), or set {VARIABLE}=cpu to train "
                "on the CPU"
            )
    elif asked == "cpu":
        # megatron-core, transformers and spawned servers look for GPUs, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        _refuse_unusable_gpus()


def _refuse_unusable_gpus() -> None:
    """Raises UserError if this host has GPUs: training would be on the CPU."""
    drivers = _drivers()
    if not drivers:
        return
    if torch.version.cuda:
        remedy = f"install NVIDIA driver {OLDEST_DRIVER} or newer, and check CUDA_VISIBLE_DEVICES"
    else:
        remedy = "install a CUDA build (make setup takes one where nvidia-smi lists a GPU)"
    raise UserError(
        f"nvidia-smi lists {_gpus(len(drivers))} with driver {drivers[0]}, and torch {torch.__version__}, a "
        f"build for {_build()}, cannot use one: {remedy}; or set {VARIABLE}=cpu to train on the CPU"
    )


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def _drivers() -> list[str]:
    """Returns the driver's version once for each GPU of this host; none if nvidia-smi does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def description() -> str:
    """Returns, for the log, the device of this process and the versions of driver, torch, CUDA and NCCL."""
    if not has_cuda():
        # as on a laptop; or in a container that was started without its host's GPUs
        unused = f", built for {_build()}, but no GPU is visible" if torch.version.cuda else ""
        return f"CPU, torch {torch.__version__}{'' if cpu_is_asked_for() else unused}"
    driver = next(iter(_drivers()), "unknown")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, NCCL {nccl}"
    )


def _meet() -> tuple[dist.Store, int, int]:
    """Returns (store, rank, number of processes) from the address that torchrun set."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except dist.DistError as error:
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT is {address}; {launcher.place()} cannot join the rendezvous there: "
            f"{first_line(error)}; give a free port of the first host, the same on every host"
        ) from error
    return dist.PrefixStore("default_pg", store), rank, size


def store() -> dist.Store:
    """Returns the rendezvous store: small values that every rank can read and count without a collective."""
    return _store


def quiet() -> bool | None:
    """Returns tqdm's `disable`: only rank 0 draws a bar, and only on a terminal."""
    return None if dist.get_rank() == 0 else True


def watch_hosts(heartbeat_timeout_s: float) -> None:
    """Ends this process if another host sends no heartbeat for that many seconds; 0: off. Collective."""
    global _heartbeat
    if heartbeat_timeout_s and "RANK" in os.environ:
        _heartbeat = Heartbeat(heartbeat_timeout_s, local_rank())


def end_distributed() -> None:
    """Leaves the process group once every rank has reached this call. Collective."""
    dist.barrier()
    if _heartbeat:
        _heartbeat.stop()
    dist.destroy_process_group()


def is_connection_loss(error: BaseException) -> bool:
    """Returns whether an error means that another process, or the link to it, is lost.

    Any other failure of NCCL, gloo or the store (a timeout, a wrong size, a device fault) keeps its own
    message.
    """
    if isinstance(error, dist.DistNetworkError):
        return True
    # gloo raises plain RuntimeErrors that begin with its source file
    of_collective = isinstance(error, dist.DistBackendError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
    return of_collective and any(words in str(error) for words in LOST_PEER)


def lost_connection(error: BaseException) -> str:
    """Returns one line: which process lost the connection, and the library's message."""
    return f"{launcher.place()} lost the connection to another process: {first_line(error)}"


def megatron() -> AbstractContextManager:
    """Returns a context for calls of megatron-core: without CUDA it redirects CUDA calls to the CPU."""
    if has_cuda():
        return nullcontext()
    # Imported late: it loads megatron-core, which takes seconds and which an evaluation does not need.
    from megatron_bicc.device_cpu import CudaOnCpu

    return CudaOnCpu()
