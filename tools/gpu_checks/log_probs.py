"""log-probs, entropy and gradients over 151,936 tokens against dense fp32, on one process and on all GPUs"""

import json
from collections.abc import Iterator
from pathlib import Path

from gpu_checks._check import REPOSITORY, Check, at_most, gpu_count, torchrun

WORKER = REPOSITORY / "tools/gpu_checks/_log_probs_worker.py"
BOUNDS = {"log_probs": 1e-5, "entropy": 1e-5, "hidden's gradient": 5e-3, "weight's gradient": 5e-3}
"""Relative errors. On a GPU the inputs are bf16: gradients are rounded to it."""


def run(out: Path) -> Iterator[Check]:
    """Yields relative errors for TP 1 and TP over all GPUs; without a GPU for TP 1 and 2 of few rows."""
    gpus = gpu_count()
    for processes in sorted({1, gpus or 2}):
        result = out / f"log_probs_{processes}.json"
        torchrun(processes, WORKER, result, 4096 if gpus else 64)
        for name, error in json.loads(result.read_text()).items():
            yield at_most(f"TP {processes}: {name}", error, BOUNDS[name])
