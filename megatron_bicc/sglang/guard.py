"""Runs one server for as long as its trainer lives. Standard library only; Linux.

python -m megatron_bicc.sglang.guard LOG COMMAND...

Standard input is a pipe whose other end only the trainer holds, so it closes however the trainer ends. Then
the server is ended, with every process that it started, and what they left in /dev/shm is removed. A byte on
the pipe says that the server has become ready: until then its end ends the guard, with its status; from then
on it is started again.
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
LOOK_S = 0.5
TERM_S = 15.0
"""Time to end by itself."""
LONGEST_PAUSE_S = 60.0
"""Before the server is started again; the first is a second, and each is twice the one before."""
PR_SET_PDEATHSIG = 1


def main(log: str, command: list[str]) -> int:
    """Runs `command`, its output appended to `log`, until standard input ends. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # the pipe says when to end; a handler, unlike SIG_IGN, is not handed down to the server
        signal.signal(number, lambda *_: None)
    pause_s, ready = 1.0, False
    while True:
        began, server = time.monotonic(), start(log, command)
        left: set[str] = set()
        while server.poll() is None:
            left |= shared_memory(server.pid)
            trainer = heard(LOOK_S)
            ready = ready or trainer == b"r"
            if trainer == b"":
                return finish(server, left, TERM_S)
        finish(server, left, 0.0)
        if not ready:
            return server.returncode or 1
        pause_s = 1.0 if time.monotonic() - began > LONGEST_PAUSE_S else min(2 * pause_s, LONGEST_PAUSE_S)
        if heard(pause_s) == b"":
            return 0


def heard(timeout_s: float) -> bytes | None:
    """A byte of the trainer's, b"" if it has ended, None if it said nothing in that time."""
    if select.select([0], [], [], timeout_s)[0]:
        return os.read(0, 1)
    return None


def start(log: str, command: list[str]) -> subprocess.Popen:
    """The server, in a session of its own."""
    libc = ctypes.CDLL(None)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # should the guard itself be killed
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )


def finish(server: subprocess.Popen, left: set[str], patience_s: float) -> int:
    """Ends the server's whole session and removes the files in /dev/shm that only it had."""
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
    """Returns when it is true, at the latest after that time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and not true():
        time.sleep(0.05)


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    return [pid for pid in processes() if session_of(pid) == leader and not is_zombie(pid)]


def shared_memory(leader: int) -> set[str]:
    """The files in /dev/shm that a session's processes have mapped."""
    return {path for pid in session(leader) for path in mapped(pid)}


def mapped_by_anyone() -> set[str]:
    """The files in /dev/shm that any process has mapped."""
    return {path for pid in processes() for path in mapped(pid)}


def mapped(pid: int) -> set[str]:
    """The files in /dev/shm that a process has mapped."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            return {found.group() for line in lines if (found := SHM.search(line.rstrip()))}
    except OSError:  # it ended, or is another user's
        return set()


def processes() -> list[int]:
    """Every process."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def session_of(pid: int) -> int:
    """A process's session; 0 if it has ended."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and waits for its parent to notice."""
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
