"""Weight sync to a real SGLang server: each method against a plain copy of the same bytes on the same path.

disk: the bytes copied from file to file. tensor: one HTTP request with them, to a server that throws them
away. distributed: one broadcast of a flat tensor to another process. A sync also pauses the server, turns
Megatron's shards into whole tensors, makes the server load them, and proves by checksums that it has.
"""

import argparse
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
import torch.distributed as dist
from anyio.from_thread import BlockingPortal, start_blocking_portal
from benchmarks._measure import machine, one_process, peak_beyond
from benchmarks._steps import TOKENIZER, random_model
from transformers import AutoTokenizer

from megatron_bicc import platform
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.policy.hf_weights import hf_tensors
from megatron_bicc.policy.policy import Policy
from megatron_bicc.rollout.sglang.check import until_well
from megatron_bicc.rollout.sglang.client import ServerClient
from megatron_bicc.rollout.sglang.launch import SpawnedServer
from megatron_bicc.training.learner import Learner
from megatron_bicc.weight_sync.servers import WeightSync


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers (%(default)s)")
    parser.add_argument("--bucket-mb", type=float, default=32, help="weight_sync.bucket_mb (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed syncs, median counts (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every method, and the plain copies.

    Returns:
        bytes, and for each method seconds and gb_per_s, plain_seconds and plain_gb_per_s of the plain copy,
        ratio of the times, and peak_mb, the trainer's memory beyond what it had before.
    """
    a = arguments
    with TemporaryDirectory() as directory, one_process(), start_blocking_portal() as portal:
        config = _config(Path(directory), a)
        learner = Learner(config, Policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        nbytes = sum(tensor.nbytes for _, tensor in _stream(learner))
        figures: dict[str, Any] = {"bytes": nbytes, "bucket_mb": a.bucket_mb, "machine": machine()}
        plain = {"disk": _file_copy, "tensor": _http, "distributed": _broadcast}
        with _server(config, portal) as client:
            for method, copy in plain.items():
                with _sync(config, learner, portal, client, method) as sync:
                    figures[method] = {
                        "peak_mb": peak_beyond(sync) / 2**20,
                        "seconds": _seconds(a.repeats, sync),
                    }
                with copy(nbytes, Path(directory)) as call:
                    figures[method]["plain_seconds"] = _seconds(a.repeats, call)
    for method in plain:
        _complete(figures[method], nbytes)
        print(f"{method:12}" + "".join(f"{name} {value:<10.3g}" for name, value in figures[method].items()))
    return figures


def _complete(figures: dict[str, float], nbytes: int) -> None:
    figures["gb_per_s"] = nbytes / figures["seconds"] / 1e9
    figures["plain_gb_per_s"] = nbytes / figures["plain_seconds"] / 1e9
    figures["ratio"] = figures["seconds"] / figures["plain_seconds"]


def _config(directory: Path, a: argparse.Namespace) -> Config:
    """Of a random policy, in fp32 on a CPU, bf16 on a GPU."""
    config = Config(output_dir=str(directory / "run"))
    config.model.path = str(directory / "model")
    config.model.dtype = "bfloat16" if platform.has_cuda() else "float32"
    config.weight_sync.bucket_mb, config.weight_sync.keep_files = a.bucket_mb, False
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(config.model.path)
    random_model(a.hidden, a.layers, len(tokenizer)).save_pretrained(config.model.path)
    return resolve(config)


def _stream(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    with platform.megatron():
        yield from hf_tensors(learner.policy.modules, learner.policy.hf_config)


@contextmanager
def _server(config: Config, portal: BlockingPortal) -> Iterator[ServerClient]:
    server = SpawnedServer(config, 0)
    client = ServerClient(server.url)
    try:
        portal.call(until_well, client, config.rollout.sglang.start_timeout_s, server.check_starting)
        yield client
        portal.call(client.aclose)
    finally:
        server.stop()


@contextmanager
def _sync(
    config: Config, learner: Learner, portal: BlockingPortal, client: ServerClient, method: str
) -> Iterator[Callable[[], None]]:
    """A call that syncs, every time as another version."""
    config.weight_sync.method = method
    sync = WeightSync(config, learner, portal.call)

    def push() -> None:
        failed = sync.push([client], _stream(learner), sync.version + 1)
        assert not failed, failed

    yield push
    sync.close()


def _seconds(repeats: int, call: Callable[[], Any]) -> float:
    """Median time of a call; a first one is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


@contextmanager
def _file_copy(nbytes: int, directory: Path) -> Iterator[Callable[[], Any]]:
    source = directory / "source"
    source.write_bytes(bytes(nbytes))
    yield lambda: shutil.copyfile(source, directory / "target")
    source.unlink()


class _Discard(BaseHTTPRequestHandler):
    """Reads what it is sent."""

    def do_POST(self) -> None:
        """Answers when it has read all."""
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
    """From this process; the other one takes part until it is sent a zero."""
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
