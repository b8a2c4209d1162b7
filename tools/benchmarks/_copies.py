"""Plain copies of bytes, each on the path of one method of the weight sync.

This module imports little, because a child process that receives the broadcast imports it.
"""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def _file_copy(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    source = directory / "source"
    source.write_bytes(bytes(nbytes))
    yield lambda: shutil.copyfile(source, directory / "target")
    source.unlink()


@contextmanager
def _memory_copy(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield lambda: target.copy_(source)


@contextmanager
def _broadcast(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    """Broadcasts from this process to a child process, which runs until it receives a zero."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    receiver = context.Process(target=_receive, args=(store.port, nbytes))
    receiver.start()
    group = dist.ProcessGroupGloo(store, 0, 2, timedelta(minutes=10))
    flat = torch.ones(nbytes, dtype=torch.uint8)
    yield lambda: group.broadcast(flat, 0).wait()
    flat[0] = 0
    group.broadcast(flat, 0).wait()
    receiver.join()


def _receive(port: int, nbytes: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(minutes=10))
    flat = torch.ones(nbytes, dtype=torch.uint8)
    while flat[0]:
        group.broadcast(flat, 0).wait()


PLAIN = {"disk": _file_copy, "tensor": _memory_copy, "distributed": _broadcast}
"""By weight_sync.method: (number of bytes, directory) -> a function that copies that many bytes"""
