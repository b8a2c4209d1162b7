"""Measures weight sync to a real SGLang server, part by part, against plain copies of the same bytes.

A sync pauses the server, gathers Megatron's shards into whole tensors and sends them (transport), makes both
sides compute checksums, and compares log-probs (probe). The server's own load time is measured apart: the
server tells the time that it takes to load each bucket from shared memory. Syncs and copies take turns, so
that a busy machine slows both alike.
"""

import argparse
import copy
import multiprocessing
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks._copies import PLAIN
from benchmarks._measure import machine, one_process, peak_beyond, return_freed_memory
from benchmarks._steps import TOKENIZER, random_model, smollm2
from transformers import AutoTokenizer

from megatron_bicc import device
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.model.families import supported_config
from megatron_bicc.rollout.types import unscored
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.sglang.process import SpawnedServer
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.handles import SharedMemory
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import Receiver, TensorTransport, buckets, tensor_request
from megatron_bicc.weights.verify import SHARES, Probe

METHODS = ("tensor", "distributed", "disk")
PARTS = ("transport", "checksums", "probe")
LOAD_TIME = re.compile(r'^sglang:weight_load_duration_seconds{.*source="tensor".*} (\S+)$', re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="layers (%(default)s)")
    parser.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M instead")
    parser.add_argument("--bucket-mb", type=float, default=64, help="weight_sync.bucket_mb (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed syncs; takes the median (%(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="values of weight_sync.method (all)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every method, the server's load time, and the plain copies.

    Returns:
        bytes and bucket_bytes; plain: seconds of each plain copy; load_seconds; for each method seconds,
        gb_per_s, the seconds of each part, and peak_bytes, the trainer's additional memory; ratios between
        these.
    """
    a = arguments
    with TemporaryDirectory() as directory, one_process():
        config = _config(Path(directory), a)
        learner = Learner(config, load_policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        nbytes = sum(tensor.nbytes for _, tensor in _stream(learner))
        figures: dict[str, Any] = {"bytes": nbytes, "bucket_bytes": int(a.bucket_mb * 2**20)}
        with _server(config) as pool, ExitStack() as stack:
            copies = {
                name: stack.enter_context(make(nbytes, Path(directory))) for name, make in PLAIN.items()
            }
            syncs = {
                method: stack.enter_context(_sync(config, learner, pool, method)) for method in a.methods
            }
            load = stack.enter_context(_load(config, learner, pool))
            measured = _measured(a.repeats, syncs, load, copies)
            figures["plain"] = {name: measured[name] for name in copies}
            figures["load_seconds"] = measured["load"]
            for method in a.methods:
                seconds = {part: measured[f"{method} {part}"] for part in ("seconds", *PARTS)}
                figures[method] = {**seconds, "gb_per_s": nbytes / seconds["seconds"] / 1e9}
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
                for method, peak in other.submit(_peaks, config, pool.own[0].url, a.methods).result().items():
                    figures[method]["peak_bytes"] = peak
    figures["ratios"] = _ratios(figures)
    _print(figures)
    return {**figures, "machine": machine()}


def _measured(
    repeats: int,
    syncs: dict[str, "TimedSync"],
    load: Callable[[], float],
    copies: dict[str, Callable[[], Any]],
) -> dict[str, float]:
    """Returns the median of all times. The first two turns, which allocate and compare everything, do not
    count."""
    times: dict[str, list[float]] = {}

    def add(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for turn in range(repeats + 2):
        if turn == 2:
            times.clear()
        for name, make_copy in copies.items():
            start = time.perf_counter()
            make_copy()
            add(name, time.perf_counter() - start)
        add("load", load())
        for method, sync in syncs.items():
            for part, seconds in sync.timed().items():
                add(f"{method} {part}", seconds)
    return {name: float(np.median(values)) for name, values in times.items()}


class TimedSync(ServerWeightSync):
    """A weight sync that measures its parts."""

    learner: Learner

    def timed(self) -> dict[str, float]:
        """Syncs, as the next version. Returns the seconds of it all and of each part."""
        self.parts = dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        failed = self.push(_stream(self.learner), self.version + 1)
        assert not failed, failed
        return {"seconds": time.perf_counter() - start, **self.parts}

    def _stream(self, *arguments: Any) -> None:
        with self._clock("transport"):
            super()._stream(*arguments)

    async def _compare_checksums(self, receiver: Receiver) -> set[str]:
        with self._clock("checksums"):
            return await super()._compare_checksums(receiver)

    async def _probe(self, receiver: Receiver, unequal: set[str]) -> Probe:
        with self._clock("probe"):
            return await super()._probe(receiver, unequal)

    def _compare_log_probs(self, probes: list[Probe]) -> None:
        with self._clock("probe"):
            super()._compare_log_probs(probes)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - start


def _ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Returns how a method compares with the plain copy on its path, and its checksums with its transport."""
    plain, load = figures["plain"], figures["load_seconds"]
    found = {}
    if "tensor" in figures:
        found["tensor: memory copies beside the load"] = (figures["tensor"]["transport"] - load) / plain[
            "memory"
        ]
    if "distributed" in figures:
        found["distributed: share of gloo's rate beside the load"] = plain["broadcast"] / (
            figures["distributed"]["transport"] - load
        )
    for method in filter(figures.__contains__, METHODS):
        found[f"{method}: checksums to transport"] = (
            figures[method]["checksums"] / figures[method]["transport"]
        )
    return found


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['bytes']:,} bytes in buckets of {figures['bucket_bytes']:,}; 1/{SHARES} has checksums")
    print("plain copies, s: " + "  ".join(f"{name} {value:.3g}" for name, value in figures["plain"].items()))
    print(f"the server's own load time: {figures['load_seconds']:.3g} s")
    for method in filter(figures.__contains__, METHODS):
        print(f"{method:12}" + "".join(f" {name} {value:<9.3g}" for name, value in figures[method].items()))
    for name, value in figures["ratios"].items():
        print(f"{name}: {value:.3g}")


def _peaks(config: Config, url: str, methods: list[str]) -> dict[str, int]:
    """Returns the bytes that each method needs in addition to the policy, measured in a child process."""
    return_freed_memory()
    peaks = {}
    with one_process():
        learner = Learner(config, load_policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        pool = ServerPool([url], [url], config.rollout.sglang)
        for method in methods:
            with _sync(config, learner, pool, method) as sync:
                sync.timed()  # what is allocated only once does not count
                peaks[method] = peak_beyond(sync.timed)
        pool.close()
    return peaks


def _config(directory: Path, a: argparse.Namespace) -> Config:
    """Returns the configuration of a random policy, in fp32 on a CPU, bf16 on a GPU."""
    config = Config(output_dir=str(directory / "run"))
    config.model.path = str(directory / "model")
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    config.weight_sync.bucket_mb = a.bucket_mb
    config.rollout.sglang.server_args = "--max-total-tokens 4096 --enable-metrics"
    if device.has_cuda():
        # NCCL, of method distributed, takes one rank per GPU; the policy is on the first
        config.rollout.sglang.gpus = str(torch.cuda.device_count() - 1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(config.model.path)
    model = smollm2() if a.smollm2 else random_model(a.hidden, a.layers, len(tokenizer))
    model.save_pretrained(config.model.path)
    return resolve(config)


def _stream(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    with device.megatron():
        yield from hf_tensors(learner.policy.modules, learner.policy.hf_config, views=True)


@contextmanager
def _server(config: Config) -> Iterator[ServerPool]:
    server = SpawnedServer(config, 0)
    pool = ServerPool([server.url], [server.url], config.rollout.sglang, spawned=[server])
    try:
        pool.start(supported_config(config.model.path), colocate=False)
        yield pool
    finally:
        pool.close()


@contextmanager
def _sync(config: Config, learner: Learner, pool: ServerPool, method: str) -> Iterator[TimedSync]:
    own = copy.deepcopy(config)
    own.weight_sync.method = method
    sync = TimedSync(own, learner.policy, pool, lambda some: learner.log_probs(unscored(some)))
    sync.learner = learner
    yield sync
    sync.close()


@contextmanager
def _load(config: Config, learner: Learner, pool: ServerPool) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds that the server itself takes to load all buckets."""
    (client,) = pool.own
    call = pool.portal.call

    def ask(path: str, body: dict[str, Any]) -> Awaitable[Any]:
        return call(client.post, path, body, 600.0)

    def load() -> float:
        seconds = 0.0
        ask("/begin_weight_update", {})
        for bucket in buckets(_stream(learner), int(config.weight_sync.bucket_mb * 2**20)):
            ask(TensorTransport.path, tensor_request([bucket.share(memory).payload()]))
            seconds += float(LOAD_TIME.search(call(client.get, "/metrics"))[1])
            bucket.clear()
        ask("/end_weight_update", {})
        return seconds

    with closing(SharedMemory()) as memory:
        yield load
