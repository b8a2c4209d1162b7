"""csrc's CUDA kernels against their references: the tests marked gpu"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_checks._check import REPOSITORY, Check, holds, need_gpus


def run(out: Path) -> Iterator[Check]:
    """Runs the tests."""
    need_gpus(1)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout)
    counts = re.findall(r"(\d+ (?:passed|failed|skipped|errors?))", done.stdout.strip().splitlines()[-1])
    passed = done.returncode == 0 and "skipped" not in " ".join(counts)
    yield holds("tests marked gpu", passed, ", ".join(counts), "all passed")
