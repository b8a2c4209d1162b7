"""Host memory that SGLang servers of the same host read: requests carry only handles of it.

A bucket's tensors are copied into one uint8 tensor in host memory, which is a file in /dev/shm. Each
tensor-parallel rank of each server gets a pickle that holds the file's name. The server calls this
format "flattened_bucket": a dict of the tensor and of a table that says which bytes are which parameter.
"""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_bicc.files import remove_at_end

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes, so that its bytes can be viewed as its type"""
SHARED_MEMORY = Path("/dev/shm")


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
            # more than needed: buckets differ by a little, and new memory has to be filled with zeros
            size = max(nbytes, 5 * self._buffer.numel() // 4)
            self.close()
            self._allocate(size)
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


@dataclass(frozen=True)
class FlatBucket:
    """Tensors one after another in one buffer."""

    buffer: Tensor
    """uint8 [bytes], of SharedMemory"""
    table: list[SimpleNamespace]
    """Of each tensor: name, shape, dtype, start_idx, end_idx and numel, the last three in bytes"""

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Returns the tensors as views of the buffer."""
        return [
            (entry.name, self.buffer[entry.start_idx : entry.end_idx].view(entry.dtype).view(entry.shape))
            for entry in self.table
        ]

    def payload(self, readers: int = 1) -> bytes:
        """Returns a pickle for that many readers. With more of them torch would remove the memory's file."""
        stream = io.BytesIO()
        for _ in range(readers - 1):
            self.buffer.untyped_storage()._shared_incref()
        with _sharing_by_name():
            ForkingPickler(stream).dump({"flattened_tensor": self.buffer, "metadata": self.table})
        return stream.getvalue()


def flatten(tensors: list[tuple[str, Tensor]], memory: SharedMemory) -> FlatBucket:
    """Copies contiguous tensors, of any device, into shared memory. Raises MemoryError if it has no room."""
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
    buffer = memory.take(end)
    for entry, (_, tensor) in zip(table, tensors, strict=True):
        buffer[entry.start_idx : entry.end_idx].copy_(tensor.reshape(-1).view(torch.uint8))
    return FlatBucket(buffer, table)


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Makes torch pickle host memory as a file's name; a file descriptor only reaches child processes."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
