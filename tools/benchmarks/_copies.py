"""Plain copies of bytes, on the paths of the weight sync.

This module imports little, because a child process that receives the bytes imports it.
"""

import multiprocessing
import shutil
import socket
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


@contextmanager
def _loopback(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    """Sends over TCP to a child process on this host, which answers with one byte."""
    listener = socket.create_server(("127.0.0.1", 0))
    receiver = multiprocessing.get_context("spawn").Process(
        target=_take, args=(listener.getsockname()[1], nbytes)
    )
    receiver.start()
    connection, _ = listener.accept()
    data = memoryview(bytearray(nbytes))

    def copy() -> None:
        connection.sendall(data)
        connection.recv(1)

    yield copy
    connection.close()
    receiver.join()


def _take(port: int, nbytes: int) -> None:
    data = memoryview(bytearray(nbytes))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        done = 0
        while received := connection.recv_into(data[done:]):
            done = (done + received) % nbytes
            if not done:
                connection.sendall(b"d")


PLAIN = {"memory": _memory_copy, "loopback": _loopback, "broadcast": _broadcast, "file": _file_copy}
"""Name: (number of bytes, directory) -> a function that copies that many bytes: in memory, over TCP to
another process, by gloo to another process, from file to file"""
