"""Scripts and modules run as programs of their own, forked from one process that has imported all they need.

A fresh Python takes 7 CPU seconds to import what training needs, a fork takes none. Each program gets its own
session, command line, environment, stdout and stderr, and ends as a fresh Python would.
"""

import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class WarmProcess:
    """The process that programs are forked from."""

    def __init__(self, **variables: str) -> None:
        """variables: added to its environment before it imports."""
        # unbuffered: `select` must see all that has not been read
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            start_new_session=True,
        )

    def start(
        self, command: list[str], variables: list[dict[str, str]], out: Path, err: Path, timeout_s: float
    ) -> list[int]:
        """Starts `command` once for each of the environments; returns the process ids.

        Their output goes to the files `out` and `err`. `wait` until they have ended before the next start.
        """
        order = json.dumps([command, variables, str(out), str(err), timeout_s])
        self._process.stdin.write(order.encode() + b"\n")
        return json.loads(self._process.stdout.readline())

    def wait(self, timeout_s: float) -> int | None:
        """Returns the exit status, negative for a signal, once all have ended; None if time was up.

        It is that of the first to fail. The others are killed then, as by torchrun.
        """
        # a minute more than the process itself waits
        assert select.select([self._process.stdout], [], [], timeout_s + 60)[0], "no answer"
        return json.loads(self._process.stdout.readline())

    def run(
        self, command: list[str], variables: list[dict[str, str]], timeout_s: float
    ) -> subprocess.CompletedProcess:
        """Runs `command` to its end. Raises AssertionError if it has not ended after timeout_s seconds."""
        with tempfile.TemporaryDirectory() as directory:
            out, err = Path(directory, "out"), Path(directory, "err")
            self.start(command, variables, out, err, timeout_s)
            status = self.wait(timeout_s)
            assert status is not None, f"not ended after {timeout_s:g} s:\n{err.read_text()[-4000:]}"
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


@functools.cache
def warm_process() -> WarmProcess:
    """Returns this test process's, started at the first call. It ends with the test process."""
    return WarmProcess()


def run(command: list[str | Path], timeout_s: float = 800, **variables: str) -> subprocess.CompletedProcess:
    """Runs what `python -W ignore COMMAND` would: [script, argument, ...] or ["-m", module, argument, ...].

    The working directory is the repository's root; `variables` are added to the environment.
    """
    return warm_process().run([*map(str, command)], [variables], timeout_s)


def serve() -> list[str] | None:
    """Takes orders on stdin. Returns in a forked child: the command line that it has to run."""
    import megatron_bicc.evaluate
    import megatron_bicc.planning.dry_run
    import megatron_bicc.report.page
    import megatron_bicc.train  # noqa: F401 all are imported for the children
    from megatron_bicc.cli import parse_config
    from megatron_bicc.startup import read_inputs

    # what most of them would load anew
    settings = ["parallel.tensor=1", "data.train=examples/data/heldout.parquet"]
    read_inputs(parse_config(["--config", "examples/configs/tiny.yaml", *settings]))
    for line in iter(sys.stdin.readline, ""):
        command, variables, out, err, timeout_s = json.loads(line)
        for stream in (out, err):
            Path(stream).write_bytes(b"")
        children = []
        for more in variables:
            child = os.fork()
            if not child:
                become(out, err, more)
                return command
            children.append(child)
        print(json.dumps(children), flush=True)
        status = status_of(children, timeout_s)
        try:
            print(json.dumps(status), flush=True)
        except BrokenPipeError:  # the test process has ended
            os._exit(0)
    return None


def become(out: str, err: str, variables: dict[str, str]) -> None:
    """Gives this forked child a session, streams and an environment of its own."""
    os.setsid()
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, appending), (2, err, appending)):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    os.environ |= variables


def status_of(children: list[int], timeout_s: float) -> int | None:
    """Returns the first exit status that is not 0, or 0. None of the children is left.

    None if time was up or the test process has ended.
    """
    end, running, status = time.monotonic() + timeout_s, list(children), 0
    gone = select.poll()
    gone.register(sys.stdin, 0)  # only that the test process has closed its end
    while running and status == 0:
        for child in running:
            ended, raw = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                status = os.waitstatus_to_exitcode(raw)
                break
        else:
            if gone.poll(10) or time.monotonic() > end:
                status = None
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status


def run_as_main(command: list[str]) -> None:
    """Runs a script or module as Python itself does with this command line."""
    if command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__" and (ordered := serve()) is not None:
    run_as_main(ordered)
