"""two steps with an SGLang server on the policy's own GPUs; the GPUs' memory meanwhile"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_checks._check import Check, Skip, holds, need_gpus, noted, run_command
from gpu_checks.environment import SERVER_PYTHON, nvidia_smi

INTERVAL_S = 0.5


def run(out: Path) -> Iterator[Check]:
    """Yields whether the run ended well, and the least and the largest memory in use over all GPUs."""
    need_gpus(1)
    if not SERVER_PYTHON.exists():
        raise Skip("SGLang is not installed: make sglang")
    directory = out / f"colocate_{os.getpid()}"
    variables = {"ENGINE": "sglang", "STEPS": "2", "OUT": str(directory), "PYTHON": sys.executable}
    with _used_memory() as used:
        run_command(["examples/run_bicc_tiny.sh", "rollout.colocate=true"], **variables)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    yield holds("two steps", len(lines) == 3, f"{len(lines) - 1} steps in metrics.jsonl", "2 steps")
    yield noted("least memory in use", min(used) / 1e3, "GB")
    yield noted("largest memory in use", max(used) / 1e3, "GB")


@contextmanager
def _used_memory() -> Iterator[list[float]]:
    """Yields a list that gets the largest memory in use of a GPU, in MiB, twice a second."""
    used: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_S):
            try:
                found = nvidia_smi("--query-gpu=memory.used", "--format=csv,noheader,nounits")
            except subprocess.CalledProcessError:
                continue
            used.append(max(map(float, found.split())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        ended.set()
        thread.join()
