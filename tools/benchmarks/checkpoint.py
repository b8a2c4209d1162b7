"""Measures how long a checkpoint delays a run: steps wait for a copy in host memory, not for the disk.

It runs BICC steps on a small random policy; the run's own writer saves checkpoints to --directory.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from benchmarks._measure import machine, one_process
from benchmarks._steps import make_groups, make_learner

from megatron_bicc.checkpoint.checkpoint import CheckpointWriter, Progress
from megatron_bicc.metrics import Stopwatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--layers", type=int, default=2, help="layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (%(default)s)")
    parser.add_argument("--mean-length", type=int, default=100, help="mean response length (%(default)s)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints of each kind (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where to write them (a temporary directory)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures blocking saves, and saves in the background of the following steps.

    Returns:
        parameters; median seconds: step (without a save), waited (a blocking save), stall (the snapshot of a
        background save), writing (from the snapshot to the final name), step_while_writing.
    """
    a = arguments
    directory = Path(mkdtemp(dir=a.directory))
    try:
        with one_process():
            figures = _measure(a, directory)
    finally:
        shutil.rmtree(directory)
    print("".join(f"{name:20}{value:>16,.3f}\n" for name, value in figures.items()), end="")
    return {**figures, "machine": machine()}


def _measure(a: argparse.Namespace, directory: Path) -> dict[str, float]:
    learner = make_learner("grpo+bicc", a.hidden, a.layers, 10 * a.mean_length + 100)
    groups = make_groups(1, a.mean_length, 5 * a.mean_length, learner.policy.hf_config.vocab_size)
    step = lambda: learner.step(groups, Stopwatch())  # noqa: E731
    writer, saves = CheckpointWriter(str(directory), keep=1), 0

    def snapshot() -> None:
        nonlocal saves
        saves += 1
        writer.snapshot(learner.policy, Progress(saves, {}, {}, {}, {}))

    def waited() -> None:
        snapshot()
        writer.start()
        writer.wait()

    step(), waited()  # the first of each is slower
    found: dict[str, list[float]] = {"step": [_seconds(step) for _ in range(3)]}
    found["waited"] = [_seconds(waited) for _ in range(a.saves)]
    for _ in range(a.saves):
        found.setdefault("stall", []).append(_seconds(snapshot))
        start = time.perf_counter()
        writer.start()
        while writer._writing and not writer._writing.done():
            found.setdefault("step_while_writing", []).append(_seconds(step))
        writer.wait()
        found.setdefault("writing", []).append(time.perf_counter() - start)
    parameters = sum(p.numel() for module in learner.policy.modules for p in module.parameters())
    return {"parameters": parameters} | {name: float(np.median(x)) for name, x in found.items()}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
