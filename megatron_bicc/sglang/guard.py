"""Runs one server for as long as its trainer lives. Standard library only; Linux.

python -m megatron_bicc.sglang.guard LOG COMMAND...

Standard input is a pipe whose other end only the trainer holds, so it closes however the trainer ends, even
by kill -9. The guard then ends the server with every process that it started, and removes the shared memory
that they left in /dev/shm. A byte on the pipe means that the server is ready. Before that, the guard exits
with the server's status when the server ends; after it, the guard restarts the server.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

SHM = re.compile(r"/dev/shm/[^\s]+$")
POLL_S = 0.5
TERM_S = 15.0
"""Seconds that a server has to exit after SIGTERM"""
LONGEST_PAUSE_S = 60.0
"""Longest pause before a restart in seconds; the first is 1 s, doubled each time"""
PR_SET_PDEATHSIG = 1


def main(log: str, command: list[str]) -> int:
    """Runs `command` with its output appended to `log` until standard input ends. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # only the pipe ends the guard; a handler, unlike SIG_IGN, is not inherited by the server
        signal.signal(number, lambda *_: None)
    pause_s, ready = 1.0, False
    while True:
        began, server = time.monotonic(), start(log, command)
        left: set[str] = set()
        while server.poll() is None:
            left |= shared_memory(server.pid)
            byte = read_pipe(POLL_S)
            ready = ready or byte == b"r"
            if byte == b"":
                return finish(server, left, TERM_S)
        finish(server, left, 0.0)
        if not ready:
            return server.returncode or 1
        pause_s = 1.0 if time.monotonic() - began > LONGEST_PAUSE_S else min(2 * pause_s, LONGEST_PAUSE_S)
        if read_pipe(pause_s) == b"":
            return 0


def read_pipe(timeout_s: float) -> bytes | None:
    """Returns a byte from the trainer, b"" if the trainer has ended, None if none came within timeout_s."""
    if select.select([0], [], [], timeout_s)[0]:
        return os.read(0, 1)
    return None


def start(log: str, command: list[str]) -> subprocess.Popen:
    """Starts the server in a new session."""
    libc = ctypes.CDLL(None)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # ends the server even if the guard itself is killed
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )


def finish(server: subprocess.Popen, left: set[str], patience_s: float) -> int:
    """Ends the server's whole session, then removes the files of `left` that no process maps."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    wait_until(lambda: server.poll() is not None, patience_s)
    wait_until(lambda: not session(server.pid), min(patience_s, 2.0))
    for pid in session(server.pid):
        signal_process(pid, signal.SIGKILL)
    server.wait()
    wait_until(lambda: not session(server.pid), TERM_S)
    for path in left - mapped_by_anyone():
        if os.path.exists(path):
            os.remove(path)
    return 0


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    """Waits until `true()` holds, at most timeout_s seconds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and not true():
        time.sleep(0.05)


def session(leader: int) -> list[int]:
    """Returns the running processes of a session."""
    return [pid for pid in processes() if session_of(pid) == leader and not is_zombie(pid)]


def shared_memory(leader: int) -> set[str]:
    """Returns the files in /dev/shm that a session's processes map."""
    return {path for pid in session(leader) for path in mapped(pid)}


def mapped_by_anyone() -> set[str]:
    """Returns the files in /dev/shm that any process maps."""
    return {path for pid in processes() for path in mapped(pid)}


def mapped(pid: int) -> set[str]:
    """Returns the files in /dev/shm that a process maps."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            return {found.group() for line in lines if (found := SHM.search(line.rstrip()))}
    except OSError:  # the process has ended, or belongs to another user
        return set()


def processes() -> list[int]:
    """Returns the ids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def session_of(pid: int) -> int:
    """Returns a process's session; 0 if it has ended."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def is_zombie(pid: int) -> bool:
    """Returns whether a process has ended and waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def signal_process(pid: int, number: int) -> None:
    """Sends a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
