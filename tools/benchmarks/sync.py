"""Measures weight sync to a real SGLang server against a plain copy of the same bytes on the same path.

disk: a copy from file to file. tensor: a copy from memory to memory. distributed: one broadcast of a flat
tensor to another process. A sync also pauses the server, gathers Megatron's shards into
whole tensors, makes the server load them, and verifies its weights by checksums and log-probs. Sync and copy
take turns, so that a busy machine slows both alike.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks._copies import PLAIN
from benchmarks._measure import machine, one_process, peak_beyond, return_freed_memory
from benchmarks._steps import TOKENIZER, random_model
from transformers import AutoTokenizer

from megatron_bicc import device
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.model.families import supported_config
from megatron_bicc.rollout.types import unscored
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.sglang.process import SpawnedServer
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.verify import CHECKER, Checksums


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="layers (%(default)s)")
    parser.add_argument("--bucket-mb", type=float, default=8, help="weight_sync.bucket_mb (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed syncs; takes the median (%(default)s)")
    parser.add_argument(
        "--methods", nargs="+", choices=PLAIN, default=list(PLAIN), help="values of weight_sync.method (all)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every method, and the plain copies.

    Returns:
        bytes and bucket_bytes; checksum_seconds, of both sides' checksums; for each method seconds
        and gb_per_s, plain_seconds and plain_gb_per_s of the plain copy, ratio of the times, and peak_bytes,
        the trainer's additional memory.
    """
    a = arguments
    with TemporaryDirectory() as directory, one_process():
        config = _config(Path(directory), a)
        learner = Learner(config, load_policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        nbytes = sum(tensor.nbytes for _, tensor in _stream(learner))
        figures: dict[str, Any] = {"bytes": nbytes, "bucket_bytes": int(a.bucket_mb * 2**20)}
        with _server(config) as pool:
            for method in a.methods:
                with (
                    _sync(config, learner, pool, method) as sync,
                    PLAIN[method](nbytes, Path(directory)) as call,
                ):
                    figures[method] = _rates(nbytes, *_seconds(a.repeats, sync, call))
            checksums = partial(_checksums, learner, pool)
            (figures["checksum_seconds"],) = _seconds(a.repeats, checksums)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
                for method, peak in other.submit(_peaks, config, pool.own[0].url, a.methods).result().items():
                    figures[method]["peak_bytes"] = peak
    _print(figures)
    return {**figures, "machine": machine()}


def _peaks(config: Config, url: str, methods: list[str]) -> dict[str, int]:
    """Returns the bytes that each method needs in addition to the policy, measured in a child process."""
    return_freed_memory()
    peaks = {}
    with one_process():
        learner = Learner(config, load_policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        pool = ServerPool([url], [url], config.rollout.sglang)
        for method in methods:
            with _sync(config, learner, pool, method) as sync:
                sync()  # what is allocated only once does not count
                peaks[method] = peak_beyond(sync)
        pool.close()
    return peaks


def _rates(nbytes: int, seconds: float, plain_seconds: float) -> dict[str, float]:
    return {
        "seconds": seconds,
        "gb_per_s": nbytes / seconds / 1e9,
        "plain_seconds": plain_seconds,
        "plain_gb_per_s": nbytes / plain_seconds / 1e9,
        "ratio": seconds / plain_seconds,
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['bytes']:,} bytes in buckets of {figures['bucket_bytes']:,}")
    print(f"both sides' checksums alone: {figures['checksum_seconds']:.3g} s")
    for method in filter(figures.__contains__, PLAIN):
        print(f"{method:12}" + "".join(f" {name} {value:<9.3g}" for name, value in figures[method].items()))


def _config(directory: Path, a: argparse.Namespace) -> Config:
    """Returns the configuration of a random policy, in fp32 on a CPU, bf16 on a GPU."""
    config = Config(output_dir=str(directory / "run"))
    config.model.path = str(directory / "model")
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    config.weight_sync.bucket_mb, config.weight_sync.keep_files = a.bucket_mb, False
    config.rollout.sglang.server_args = "--max-total-tokens 4096"
    if device.has_cuda():
        # NCCL, of method distributed, takes one rank per GPU; the policy is on the first
        config.rollout.sglang.gpus = str(torch.cuda.device_count() - 1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(config.model.path)
    random_model(a.hidden, a.layers, len(tokenizer)).save_pretrained(config.model.path)
    return resolve(config)


def _stream(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    with device.megatron():
        yield from hf_tensors(learner.policy.modules, learner.policy.hf_config)


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
def _sync(config: Config, learner: Learner, pool: ServerPool, method: str) -> Iterator[Callable[[], None]]:
    """Yields a function that syncs, as the next version at every call."""
    config.weight_sync.method = method
    sync = ServerWeightSync(config, learner.policy, pool, lambda some: learner.log_probs(unscored(some)))

    def push() -> None:
        failed = sync.push(_stream(learner), sync.version + 1)
        assert not failed, failed

    yield push
    sync.close()


def _checksums(learner: Learner, pool: ServerPool) -> None:
    checksums = Checksums(learner.policy.hf_config, 1, getattr(torch, learner.config.model.dtype))
    for name, tensor in _stream(learner):
        checksums.add(name, tensor.cpu())
    pool.portal.call(pool.own[0].post, CHECKER, {"action": "checksum"}, 600)


def _seconds(repeats: int, *calls: Callable[[], Any]) -> list[float]:
    """Returns the median time of each call; they take turns, and the first turn is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [float(np.median(own[1:])) for own in times]
