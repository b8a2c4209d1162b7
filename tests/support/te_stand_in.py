"""Programs that find tests/te_stand_in as their Transformer Engine.

megatron-core decides at import whether Transformer Engine is there, so they run in processes of their own.
"""

import functools
import os
from pathlib import Path

from support.forked import torchrun_variables
from support.warm import REPOSITORY, WarmProcess

PATH = REPOSITORY / "tests" / "te_stand_in"


def python_path() -> str:
    """Returns the PYTHONPATH of a process that is to find the stand-in."""
    return os.pathsep.join([str(PATH), *filter(None, [os.environ.get("PYTHONPATH")])])


@functools.cache
def warm_process() -> WarmProcess:
    """Returns this test process's warm process that has the stand-in, started at the first call."""
    return WarmProcess(PYTHONPATH=python_path())


def run_job(processes: int, worker: str | Path, *arguments: str | Path) -> None:
    """Runs a script with the stand-in in that many processes on this host.

    Raises AssertionError with the end of its stderr.
    """
    command = [str(worker), *map(str, arguments)]
    done = warm_process().run(command, torchrun_variables(processes), timeout_s=800)
    assert done.returncode == 0, done.stderr[-4000:]
