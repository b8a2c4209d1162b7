"""Compares answers in a separate process, so that no answer can stall or crash the training process.

Computer algebra on hostile input may run for hours or exhaust the memory. `Worker` is the training process's
side: it starts `python -m megatron_bicc.rewards.worker` when first needed, writes one JSON request per line
to its stdin and reads one JSON answer per line from its stdout.

The worker process handles requests in a fork of itself, which has imported everything. The kernel kills the
fork once a request has used up its processor time, and a new fork handles the next request. The worker ends
when its stdin is closed, and so with the process that started it.

This module is also the worker's main program, so it imports only the standard library until it serves.
"""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import megatron_bicc

CPU_SECONDS = 2.0
"""Processor time of one request. A limit on wall time would score right answers 0 on a busy machine."""
MEMORY_BYTES = 4 << 30
"""Address space of the fork"""
KILLED = "killed"
"""Answer of the worker to a request that exceeded its limits"""

_log = logging.getLogger(__name__)


class OutOfTimeError(Exception):
    """A comparison exceeded its processor time or memory."""


class Worker:
    """One worker process, started when first needed. Any thread may call it; requests run one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.killed = 0
        """Requests that exceeded their limits"""

    def ask(self, operation: str, *arguments: str) -> Any:
        """Returns the worker's result of `operation`. Raises OutOfTimeError, and logs the first one.

        operation: "same" or "reading", the functions of rewards.verdict.
        """
        with self._lock:
            process = self._started()
            answer = self._exchange(process, json.dumps([operation, *arguments]))
            if answer != KILLED:
                return answer
            self.killed += 1
            first = self.killed == 1
        if first:
            _log.warning(
                "comparing an answer with its ground truth took over %g s of processor time, or too much "
                "memory; it scores 0: %s (further ones are not logged)",
                CPU_SECONDS,
                " against ".join(f"{argument:.60}" for argument in arguments),
            )
        raise OutOfTimeError

    def _started(self) -> "subprocess.Popen[bytes]":
        # a fork of this process must not share the pipes: it would read answers to its parent's requests
        if self._process is None or self._owner != os.getpid():
            inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            path = os.pathsep.join([str(Path(megatron_bicc.__file__).parents[1]), *inherited])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_bicc.rewards.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
            self._owner = os.getpid()
            self._read(self._process)
        return self._process

    def _exchange(self, process: "subprocess.Popen[bytes]", request: str) -> Any:
        assert process.stdin
        process.stdin.write(f"{request}\n".encode())
        process.stdin.flush()
        return self._read(process)

    def _read(self, process: "subprocess.Popen[bytes]") -> Any:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            self._process = None
            raise RuntimeError("megatron_bicc.rewards.worker ended; see its error above")
        return json.loads(line)


WORKER = Worker()
"""The worker of this process"""


def main() -> None:
    """Serves requests until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and then this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import math_verify  # noqa: F401 - imported before forking: it takes longer than most comparisons

    with suppress(BrokenPipeError):  # the parent has ended
        _answer("ready")
        while _fork_was_killed():
            _answer(KILLED)


def _answer(value: str | bool | None) -> None:
    os.write(sys.stdout.fileno(), f"{json.dumps(value)}\n".encode())


def _fork_was_killed() -> bool:
    """Serves in a fork. Returns True if the fork was killed, False if stdin was closed."""
    child = os.fork()
    if child == 0:
        _serve()
    _, status = os.waitpid(child, 0)
    return not os.WIFEXITED(status)


def _serve() -> None:
    from megatron_bicc.rewards import verdict

    operations = {"same": verdict.same, "reading": verdict.reading}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(BrokenPipeError):
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF kills the fork: nothing handles it
            try:
                answer = operations[name](*arguments)
            except (MemoryError, RecursionError):
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _answer(answer)
    os._exit(0)


if __name__ == "__main__":
    main()
