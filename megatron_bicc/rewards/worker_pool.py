"""Answers compared in another process, so that none can hold up or take down this one."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import megatron_bicc

CPU_SECONDS = 2.0
"""Processor time of one request; by the clock a busy machine would turn right answers into wrong ones."""
KILLED = "killed"
"""What the worker answers to a request that used up its limit"""

_log = logging.getLogger(__name__)


class OutOfTimeError(Exception):
    """An answer used up its processor time or memory."""


class Worker:
    """One rewards.worker process, started when first needed; for any number of threads, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.killed = 0
        """Requests that used up their limit"""

    def ask(self, operation: str, *arguments: str) -> Any:
        """What `operation` of the worker answers. Raises OutOfTimeError; logs the first."""
        with self._lock:
            process = self._started()
            answer = self._exchange(process, json.dumps([operation, *arguments]))
            if answer != KILLED:
                return answer
            self.killed += 1
            first = self.killed == 1
        if first:
            _log.warning(
                "an answer or its truth took over %g s of processor time, or too much memory, to compare, "
                "and scores 0: %s (later ones are not logged)",
                CPU_SECONDS,
                " against ".join(f"{argument:.60}" for argument in arguments),
            )
        raise OutOfTimeError

    def _started(self) -> "subprocess.Popen[bytes]":
        # a fork of this process would read the answers meant for it
        if self._process is None or self._owner != os.getpid():
            path = os.pathsep.join([str(Path(megatron_bicc.__file__).parents[1]), *_inherited_path()])
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


def _inherited_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


WORKER = Worker()
"""This process's"""
