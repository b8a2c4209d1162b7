"""Plain copies of bytes, each on the path of one method of the weight sync.

This module imports little, because a child process that receives the broadcast imports it.
"""

import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
import torch.distributed as dist


@contextmanager
def _file_copy(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    source = directory / "source"
    source.write_bytes(bytes(nbytes))
    yield lambda: shutil.copyfile(source, directory / "target")
    source.unlink()


class _Discard(BaseHTTPRequestHandler):
    """Reads each request and discards it."""

    def do_POST(self) -> None:
        """Answers after reading the whole body."""
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 2**20)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def _http(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    server = HTTPServer(("127.0.0.1", 0), _Discard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    body, url = bytes(nbytes), f"http://127.0.0.1:{server.server_port}"
    with httpx.Client(trust_env=False) as client:
        yield lambda: client.post(url, content=body, timeout=600)
    server.shutdown()
    server.server_close()


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


PLAIN = {"disk": _file_copy, "tensor": _http, "distributed": _broadcast}
"""By weight_sync.method: (number of bytes, directory) -> a function that copies that many bytes"""
