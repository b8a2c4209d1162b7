"""Runs functions in worker processes, so that no response can stall or crash the training process.

Computer algebra on hostile input, programs of a policy and a user's function may run for hours, exhaust the
memory or crash. `Workers` is the training process's side: it starts processes of this module when they are
first needed, writes one JSON request per line to a process's stdin and reads one JSON answer per line.

A worker process handles requests in a fork of itself, which has imported everything. The kernel kills the
fork once a request has used up its processor time, the training process kills it after its wall time, and a
new fork handles the next request. The worker ends when its stdin is closed, and so with the process that
started it.

This module is also the worker's main program, so it imports only the standard library until it serves.
"""

import base64
import contextlib
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any, NoReturn

import megatron_bicc

MATH, CODE = "math", "code"
"""What a worker serves, if not a user's function by import path"""
MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    cpu_s: float
    """Processor time of the fork that handles it"""
    wall_s: float | None = None
    """None: no limit, so that a busy machine changes no result"""
    memory_bytes: int = MEMORY_BYTES
    """Address space of the fork"""


class WorkerKilled(Exception):
    """A request ended its worker: it exceeded a limit or crashed. One line."""


class Workers:
    """Worker processes, started when first needed. Any thread may call them; each runs one request at a time.

    A request takes a process that is idle; so one process serves a caller that asks for one thing at a time.
    """

    def __init__(self, serves: str, limits: Limits, size: int = 1) -> None:
        """serves: MATH, CODE or the import path of a reward function. size: most processes."""
        self.killed = 0
        """Requests that ended their worker"""
        self._lock = threading.Lock()
        self._workers = [_Worker(serves, limits) for _ in range(size)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Returns the result of an operation (`_operations`). Raises WorkerKilled.

        Arguments and result are JSON values.
        """
        worker = self._idle.get()
        try:
            return worker.ask(operation, *arguments)
        except WorkerKilled:
            with self._lock:
                self.killed += 1
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes; a request that one handles raises RuntimeError."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One worker process."""

    def __init__(self, serves: str, limits: Limits) -> None:
        self._serves, self._limits = serves, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._fork = 0

    def ask(self, operation: str, *arguments: Any) -> Any:
        try:
            self._start()
            return self._exchange(json.dumps([operation, *arguments]))
        except WorkerKilled:
            raise
        except BaseException:  # such as an interrupt: the next request must not get this one's answer
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.stdin.close()  # stdout stays open: another thread may be reading
            process.wait()

    def _start(self) -> None:
        # a fork of this process must not share the pipes: it would read answers to its parent's requests
        if self._process is not None and self._owner == os.getpid():
            return
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(Path(megatron_bicc.__file__).parents[1]), *inherited])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_bicc.rewards.worker", self._serves, *self._limit_arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # the order of a set in a program's output must not differ between runs
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
        self._owner = os.getpid()
        self._fork = self._read(self._process, None)["fork"]

    def _limit_arguments(self) -> list[str]:
        return [str(self._limits.cpu_s), str(self._limits.memory_bytes)]

    def _exchange(self, request: str) -> Any:
        process, wall_s, late = self._process, self._limits.wall_s, False
        process.stdin.write(f"{request}\n".encode())
        process.stdin.flush()
        answer = self._read(process, wall_s)
        if answer is None:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._fork, signal.SIGKILL)
            answer = self._read(process, None)
            if "result" in answer:  # it had just finished
                answer = self._read(process, None)
        if "result" in answer:
            return answer["result"]
        self._fork = answer["fork"]
        if late:
            raise WorkerKilled(f"it took over {wall_s:g} s of wall time")
        raise WorkerKilled(self._reason(answer["status"]))

    def _reason(self, status: int) -> str:
        if not os.WIFSIGNALED(status):
            return f"it ended its process with status {os.waitstatus_to_exitcode(status)}"
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return f"it took over {self._limits.cpu_s:g} s of processor time"
        name = signal.Signals(number).name
        more = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"it crashed its process: {name}{more}"

    def _read(self, process: "subprocess.Popen[bytes]", seconds: float | None) -> dict[str, Any] | None:
        """Returns the next line; None if none comes within `seconds`."""
        # lines are answers to one request at a time, so none is left in the buffer
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("megatron_bicc.rewards.worker ended; see its error above")
        return json.loads(line)


def pack(value: Any) -> str:
    """Returns a value that can be pickled as an argument of a request."""
    return base64.b64encode(pickle.dumps(value)).decode()


def unpack(text: str) -> Any:
    """Returns the value that `pack` was given."""
    return pickle.loads(base64.b64decode(text))


def main(serves: str, cpu_s: float, memory_bytes: int) -> None:
    """Serves requests until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and then this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # what a function prints goes to the log, and it reads nothing of the requests
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    operations = _operations(serves)
    status = None
    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        while True:
            child = os.fork()
            if child == 0:
                _serve(operations, requests, answers, cpu_s, memory_bytes)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(child, child)
            _write(answers, {"fork": child, "status": status})
            status = _wait(child, requests)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it has started
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == END_OF_REQUESTS:
                return


END_OF_REQUESTS = 97
"""Exit status of a fork that found stdin closed"""
END_GRACE_S = 0.2
"""Seconds in which a fork must end once stdin is closed"""


def _wait(child: int, requests: int) -> int:
    """Waits for the fork; ends it if the parent process ends meanwhile. Returns its wait status."""
    ended = os.pidfd_open(child)
    either = select.poll()
    either.register(ended, select.POLLIN)
    either.register(requests, 0)  # reports POLLHUP only
    either.poll()
    # an idle fork reads the end of the requests itself; a busy one has nobody left to answer
    if not select.select([ended], [], [], END_GRACE_S)[0]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.close(ended)
    return os.waitpid(child, 0)[1]


def _operations(serves: str) -> dict[str, Callable[..., Any]]:
    """Returns the operations of a worker by name; imports what they need, once for all forks."""
    if serves == MATH:
        import math_verify  # noqa: F401 - it takes longer than most comparisons

        from megatron_bicc.rewards import verdict

        return {"same": verdict.same, "reading": verdict.reading}
    if serves == CODE:
        from megatron_bicc.rewards import sandbox

        return {"run": sandbox.run, "limits": sandbox.limits}
    from megatron_bicc.rewards.functions import load, portable

    function = load(serves)
    return {"score": lambda given: pack(portable(function.scores(unpack(given))))}


def _write(answers: int, value: dict[str, Any]) -> None:
    data = f"{json.dumps(value)}\n".encode()
    while data:
        data = data[os.write(answers, data) :]


def _serve(
    operations: dict[str, Callable[..., Any]], requests: int, answers: int, cpu_s: float, memory_bytes: int
) -> NoReturn:
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(BrokenPipeError), os.fdopen(requests) as lines:
        for line in lines:
            name, *arguments = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF kills the fork: nothing handles it
            try:
                answer = operations[name](*arguments)
            except (MemoryError, RecursionError):
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(answers, {"result": answer})
    os._exit(END_OF_REQUESTS)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
