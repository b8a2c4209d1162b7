"""Weights that SGLang servers of the same host read where they are: only handles are sent.

A bucket's tensors are copied into one uint8 tensor, and each reader (one tensor-parallel rank of one server)
gets a pickle of it. In host memory it is a file in /dev/shm, whose name the pickle holds; in GPU memory the
pickle holds an IPC handle. The server's name for this format is "flattened_bucket": a dict of the tensor and
of a table that says which of its bytes are which parameter.
"""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_bicc.files import remove_at_end

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes, so that its bytes can be viewed as its type"""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class FlatBucket:
    """Tensors one after another in one buffer."""

    buffer: Tensor
    """uint8 [bytes]"""
    table: list[SimpleNamespace]
    """Of each tensor: name, shape, dtype, start_idx, end_idx and numel, the last three in bytes"""

    def payload(self) -> bytes:
        """Returns the pickle for one reader; a pickle must not be read twice, as it counts its readers."""
        shared = _UuidHandle(self.buffer) if self.buffer.is_cuda else self.buffer
        stream = io.BytesIO()
        with _sharing_by_name():
            ForkingPickler(stream).dump({"flattened_tensor": shared, "metadata": self.table})
        return stream.getvalue()


def flatten(tensors: list[tuple[str, Tensor]], allocate: Callable[[int], Tensor]) -> FlatBucket:
    """Copies contiguous tensors into a buffer. allocate: returns a uint8 tensor of that many bytes."""
    table, end = [], 0
    for name, tensor in tensors:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + tensor.nbytes
        # the server reads these attributes, and unpickles few other types
        table.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=end,
                numel=tensor.nbytes,
            )
        )
    buffer = allocate(end)
    for entry, (_, tensor) in zip(table, tensors, strict=True):
        buffer[entry.start_idx : entry.end_idx].copy_(tensor.reshape(-1).view(torch.uint8))
    return FlatBucket(buffer, table)


class SharedMemory:
    """A buffer in /dev/shm for one bucket after another.

    Its file is removed by `close`, or when this process ends, even by kill -9. A server that has not closed
    it keeps its memory until then, not its name.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._remover: subprocess.Popen | None = None

    def take(self, nbytes: int) -> Tensor:
        """Returns a uint8 tensor [nbytes] in the buffer, whose former contents are lost.

        Raises MemoryError if /dev/shm has no room for it.
        """
        if nbytes > self._buffer.numel():
            self.close()
            self._allocate(nbytes)
        return self._buffer[:nbytes]

    def close(self) -> None:
        """Removes the file."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._remover:
            self._remover.communicate()  # closes its standard input and waits
            self._remover = None

    def _allocate(self, nbytes: int) -> None:
        free = shutil.disk_usage(SHARED_MEMORY).free
        if nbytes > free:
            raise MemoryError(f"{nbytes / 2**20:.0f} MiB needed in /dev/shm, {free / 2**20:.0f} MiB free")
        storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
        _, name, _ = storage._share_filename_cpu_()
        self._remover = remove_at_end(SHARED_MEMORY / name.decode().lstrip("/"))
        # torch counts the processes that map the file, and the last one removes it. A server that failed
        # leaves a wrong count: with one more than there are, only the remover removes it.
        storage._shared_incref()
        self._buffer = torch.empty(0, dtype=torch.uint8).set_(storage)


class _UuidHandle:
    """Pickles a CUDA tensor as an IPC handle whose GPU is named by its UUID.

    torch pickles the index of the GPU, which differs in a process that sees other GPUs. SGLang's reader
    accepts a UUID in its place.
    """

    DEVICE = 6
    """Position of the GPU in the arguments of torch's rebuild_cuda_tensor"""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(arguments[self.DEVICE]).uuid)
        return rebuild, (*arguments[: self.DEVICE], uuid, *arguments[self.DEVICE + 1 :])


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Makes torch pickle host memory as a file's name; a file descriptor only reaches child processes."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
