"""weight sync to an SGLang server by every method: verified, seconds, GB/s; engine against policy"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_checks._check import Check, Skip, at_most, gpu_count, noted, run_command
from gpu_checks.environment import SERVER_PYTHON

KL_BOUND = 1e-3


def run(out: Path) -> Iterator[Check]:
    """Yields each method's rates; a sync that its server does not confirm ends the part with an error."""
    if not SERVER_PYTHON.exists():
        raise Skip("SGLang is not installed: make sglang")
    sizes = ["--hidden", 2048, "--layers", 8, "--bucket-mb", 512] if gpu_count() else ["--layers", 2]
    # NCCL refuses a group of two ranks on one GPU
    methods = ["tensor", "disk"] if gpu_count() == 1 else ["tensor", "disk", "distributed"]
    file = out / "sync.json"
    run_command([sys.executable, "tools/benchmark.py", "sync", *sizes, "--methods", *methods, "--json", file])
    figures = json.loads(file.read_text())
    for method in methods:
        yield noted(f"{method}: {figures['bytes'] / 1e6:,.0f} MB", figures[method]["seconds"], "s")
        yield noted(f"{method}: rate", figures[method]["gb_per_s"], "GB/s")
    yield at_most("kl/rollout_old of a run with SGLang", _mismatch(out), KL_BOUND)


def _mismatch(out: Path) -> float:
    """Returns kl/rollout_old of the demo's second step with SGLang."""
    run = out / f"sglang_run_{os.getpid()}"
    settings = {"ENGINE": "sglang", "STEPS": "2", "OUT": str(run), "PYTHON": sys.executable}
    run_command(["examples/run_bicc_tiny.sh"], **settings)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["kl/rollout_old"]
