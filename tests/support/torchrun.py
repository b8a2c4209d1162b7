"""Several processes for a test."""

import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, worker: str | Path, *arguments: str | Path) -> None:
    """Runs a script in that many processes on this host. Raises AssertionError with the end of its stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(worker), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
