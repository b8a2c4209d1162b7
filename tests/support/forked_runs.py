"""Runs forked from one process that has everything loaded: each ends as a program of its own does.

python tests/support/forked_runs.py: takes orders on stdin, [command line, file for stderr] as JSON, and
answers each with the run's process id, then, once that has ended, with its exit status.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class ForkedRuns:
    """Starts runs, one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        # unbuffered: what `select` does not see must not have been read already
        self._worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self._err = Path()

    def start(self, settings: list[str], err: Path) -> int:
        """The process id of a run with this command line. err: file for what it says on stderr."""
        self._err = err
        self._worker.stdin.write(json.dumps([settings, str(err)]).encode() + b"\n")
        return int(self._worker.stdout.readline())

    def wait(self, timeout_s: float = 300) -> dict:
        """The run's end: {"status": exit status, "err": what it said on stderr}."""
        assert select.select([self._worker.stdout], [], [], timeout_s)[0], (
            f"the run has not ended: {self._err.read_text()}"
        )
        return {"status": int(self._worker.stdout.readline()), "err": self._err.read_text()}

    def close(self) -> None:
        """Ends the process that runs are forked from, and a run that has not ended."""
        os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.wait()


def serve() -> None:
    """The worker's life. In a forked child it returns when the run has ended."""
    from megatron_bicc.cli import parse_config
    from megatron_bicc.startup import read_inputs
    from megatron_bicc.train import main

    # what every run would load anew
    settings = ["parallel.tensor=1", "data.train=examples/data/heldout.parquet"]
    read_inputs(parse_config(["--config", "examples/configs/tiny.yaml", *settings]))
    for order in iter(sys.stdin.readline, ""):
        command_line, err = json.loads(order)
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            return main(command_line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
