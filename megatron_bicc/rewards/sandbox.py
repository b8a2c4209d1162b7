"""Runs a program of the policy against tests, each in a process of its own with few rights. Linux only.

The limits are processor time, wall time, memory, size and number of files, and processes; where the kernel
permits, no network (a namespace, else Landlock for TCP), no process of others in sight (a PID namespace),
and writing in a temporary directory only (Landlock). They are for accidents: a program can read what the user
can, and shares its interpreter with the code that tests it.

Runs in a fork of a worker process (rewards.worker), one thread, standard library only.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TypedDict

MOST_PROCESSES, MOST_OPEN_FILES, MOST_FILE_BYTES = 64, 64, 16 << 20
END = b"end"
"""What a process writes once program and test have come to their end: leaving early is not passing"""

_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE, _CHANGES = 1 << 1, sum(1 << bit for bit in (1, *range(4, 13)))
"""Landlock's rights to write a file, and all of its first version that change something"""
_TCP = 0b11
_libc = ctypes.CDLL(None, use_errno=True)


class Test(TypedDict, total=False):
    """One test of a program: `code` that must run to its end after it, or `stdin` and the `stdout` for it."""

    code: str
    stdin: str
    stdout: str


class Report(TypedDict):
    """What the tests of a program have shown."""

    passed: int
    timeouts: int
    """Tests that used up their processor time, or what was left of the wall time"""
    feedback: str
    """What the first test that failed said; empty if all passed"""


def run(program: str, tests: list[Test], cpu_s: float, wall_s: float, memory_bytes: int) -> Report:
    """Runs a program with each of its tests.

    cpu_s: processor time of a test, rounded up to seconds. wall_s: wall time of all of them. memory_bytes:
    address space of a process.
    """
    end, passed, timeouts, feedback = time.monotonic() + wall_s, 0, 0, ""
    for number, test in enumerate(tests, 1):
        left = end - time.monotonic()
        problem = _run_test(program, test, cpu_s, left, memory_bytes) if left > 0 else TIMEOUT
        passed += problem is None
        timeouts += problem == TIMEOUT
        if problem and not feedback:
            feedback = f"test {number}: {problem}"
    return Report(passed=passed, timeouts=timeouts, feedback=feedback)


TIMEOUT = "out of time"


def limits() -> list[str]:
    """Returns what is not limited here because the kernel does not permit it, in words."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(_isolate() + _write_only_in(tempfile.gettempdir())).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return json.loads(answer.read() or '["anything"]')


def _run_test(program: str, test: Test, cpu_s: float, wall_s: float, memory_bytes: int) -> str | None:
    """Returns what went wrong, in one line; None if the test passes."""
    folder = Path(tempfile.mkdtemp(prefix="megatron_bicc_code_"))
    try:
        work, stdin, stdout, stderr = (folder / name for name in ("work", "stdin", "stdout", "stderr"))
        work.mkdir()
        stdin.write_text(test.get("stdin", ""))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _guard(program, test, (stdin, stdout, stderr), work, write, math.ceil(cpu_s), memory_bytes)
        os.close(write)
        os.setpgid(child, child)
        status = _waited(child, wall_s)
        ended = os.read(read, len(END)) == END
        os.close(read)
        if status is None or status == 128 + signal.SIGXCPU:
            return TIMEOUT
        if "stdout" not in test:
            return None if ended and status == 0 else _last_line(stderr, status)
        if status != 0:
            return _last_line(stderr, status)
        found, wanted = _lines(stdout.read_text(errors="replace")), _lines(test["stdout"])
        return None if found == wanted else f"it printed {_short(found)}, not {_short(wanted)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _waited(child: int, wall_s: float) -> int | None:
    """Waits for a process, and ends its group. Returns its exit status; None if wall_s was not enough."""
    ended = os.pidfd_open(child)
    in_time = bool(select.select([ended], [], [], wall_s)[0])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if in_time else None


def _last_line(stderr: Path, status: int) -> str:
    lines = stderr.read_text(errors="replace").strip().splitlines() if stderr.exists() else []
    if lines:
        return lines[-1][:200]
    return f"it ended with signal {status - 128}" if status > 128 else "it left before its end"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _short(lines: list[str]) -> str:
    return repr("\n".join(lines))[:80]


def _guard(
    program: str,
    test: Test,
    streams: tuple[Path, Path, Path],
    work: Path,
    report: int,
    cpu_s: int,
    memory_bytes: int,
) -> NoReturn:
    """Runs the test in a child that is the first of its PID namespace, and leaves with its exit status.

    With the child ends all that it has started.
    """
    status = 1
    try:
        isolated = not _isolate()
        _end_with_parent()
        child = os.fork()
        if child == 0:
            _end_with_parent()
            _execute(program, test, streams, work, report, cpu_s, memory_bytes, isolated)
        os.close(report)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = code if code >= 0 else 128 - code
    finally:
        os._exit(status)


def _execute(
    program: str,
    test: Test,
    streams: tuple[Path, Path, Path],
    work: Path,
    report: int,
    cpu_s: int,
    memory_bytes: int,
    isolated: bool,
) -> NoReturn:
    status = 1
    try:
        _redirect(streams, report)
        os.chdir(work)
        os.environ.clear()
        os.environ.update(HOME=str(work), TMPDIR=str(work), PATH="/usr/bin:/bin", LANG="C.UTF-8")
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.argv = ["program"]
        _write_only_in(str(work))
        _limit(cpu_s, memory_bytes, isolated)
        scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        try:
            exec(compile(program, "<program>", "exec"), scope)
            if "code" in test:
                exec(compile(test["code"], "<test>", "exec"), scope)
            os.write(REPORT, END)
            status = 0
        except SystemExit as left:
            status = 0 if left.code in (None, 0) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # such as a stdout that the program has closed, or that has become too long
        status = 1
    finally:
        os._exit(status)


REPORT = 3


def _redirect(streams: tuple[Path, Path, Path], report: int) -> None:
    """Opens stdin, stdout and stderr, and closes all other files but the report."""
    stdin, stdout, stderr = streams
    # above the numbers that they replace
    opened = [os.open(stdin, os.O_RDONLY)]
    opened += [os.open(each, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for each in (stdout, stderr)]
    moved = [os.dup2(each, 100 + place) for place, each in enumerate([*opened, report])]
    for place, each in enumerate(moved):
        os.dup2(each, place)
    os.closerange(REPORT + 1, 4096)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, closefd=False) for i, mode in enumerate("rww"))


def _limit(cpu_s: int, memory_bytes: int, isolated: bool) -> None:
    bounds = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_FSIZE: (MOST_FILE_BYTES, MOST_FILE_BYTES),
        resource.RLIMIT_NOFILE: (MOST_OPEN_FILES, MOST_OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    if isolated:  # elsewhere all processes of the user count
        bounds[resource.RLIMIT_NPROC] = (MOST_PROCESSES, MOST_PROCESSES)
    for which, bound in bounds.items():
        resource.setrlimit(which, bound)


def _end_with_parent() -> None:
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _isolate() -> list[str]:
    """Moves this process to its own user, network and IPC namespaces, and its children to a PID namespace.

    Returns what it lacks if that is not permitted.
    """
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC):
        return ["network other than TCP" if _landlock_version() >= 4 else "network", "processes"]
    # files that a user without a name creates would be refused
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return []


def _landlock_version() -> int:
    return int(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1))


def _write_only_in(folder: str) -> list[str]:
    """Forbids writing outside a folder, and TCP. Returns what it lacks if the kernel has no Landlock."""
    version = _landlock_version()
    if version < 1:
        return ["files that the user may write"]
    rights = struct.pack("QQ", _CHANGES, _TCP if version >= 4 else 0)[: 16 if version >= 4 else 8]
    ruleset = _libc.syscall(_LANDLOCK_CREATE, rights, len(rights), 0)
    for path, allowed in ((folder, _CHANGES), (os.devnull, _WRITE_FILE)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    failed = _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return ["files that the user may write"] if failed else []
