"""Several processes of one job, without torchrun's own process and imports."""

import subprocess
from pathlib import Path

from support.forked import torchrun_variables
from support.warm import warm_process


def torchrun(processes: int, worker: str | Path, *arguments: str | Path) -> None:
    """Runs a script in that many processes on this host. Raises AssertionError with the end of its stderr."""
    done = run_job(processes, worker, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]


def run_job(processes: int, worker: str | Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """The same, however it ends. The first process to fail gives the exit status; the others are killed."""
    command = [str(worker), *map(str, arguments)]
    return warm_process().run(command, torchrun_variables(processes), timeout_s=800)
