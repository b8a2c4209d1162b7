"""A lock on the output directory: one run per directory, and the lock of a killed run is taken over.

DIRECTORY/run.lock names the process that writes there, which increments a counter in it every few seconds.
A new run on the same host looks for that process in /proc. A new run on another host, or in another
container, watches the counter by its own clock: if it moves, the run is alive; if it does not move for
SILENCE_S seconds, the lock is taken over. Only operations that NFS and Lustre support are used: exclusive
creation, rename, and reading what another host wrote earlier. A run that was suspended and finds its lock
taken over ends before it writes anything.

Standard library only. The file is not written by `files.atomic_file`: the counter needs one that stays
open, so that a suspended run can never write into the lock of the run that replaced it.
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from megatron_bicc.errors import UserError
from megatron_bicc.launcher import process

FILE = "run.lock"
BEAT_S = 2.0
SILENCE_S = 30.0
"""Much longer than BEAT_S: a thread may be held up for seconds while another one pickles gigabytes"""
GRACE_S = 2.0
"""Seconds for a run on this host to end: its launcher may just have been killed"""
SETTLE_S = 0.1
"""Seconds from a takeover to the check that no other new run took over later; BEAT_S across hosts"""
FILE_BYTES = 1024
"""Every write has this length, so that no reader finds the end of an older, longer text"""
EXIT_STATUS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    token: str
    """Unique to this run"""
    host: str
    machine: str
    """Boot id and pid namespace, within which `pid` is meaningful; empty if unknown"""
    pid: int
    start: int
    """launcher.Process.start"""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, which has written to it since {self.since}"


class RunLock:
    """A lock on a directory, refreshed by a thread from `acquire` to `release`."""

    def __init__(self, directory: Path, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        """beat_s: seconds between increments; silence_s: seconds without one until a takeover."""
        self.directory, self._path = directory, directory / FILE
        self._beat_s, self._silence_s = beat_s, silence_s
        own = process(os.getpid())
        self._own = Holder(
            token=secrets.token_hex(16),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            start=own.start if own else 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )
        self._file: int | None = None
        self._count = 0
        self._mutex = threading.Lock()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the lock; waits up to `silence_s` to see whether a holder on another host is alive.

        Raises UserError that names host and process if another run holds it, OSError if the directory
        cannot be written.
        """
        while not self._create():
            held = self._read()
            if held is None or not self._is_left(held):
                continue
            if self._replace(held):
                break
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def refuse_if_alive(self) -> None:
        """Raises UserError if a process of this host holds the lock. Does not wait, writes nothing."""
        with contextlib.suppress(OSError):
            held = self._read()
            holder = _holder(held) if held else None
            if holder and self._is_alive(holder):
                raise self._in_use(holder)

    def check(self) -> None:
        """Ends this process if another run has taken the lock over. Call before every write."""
        with self._mutex, contextlib.suppress(OSError):
            # a lock that was deleted by hand is created again
            while not self._released.is_set() and (held := self._read()) is None:
                self._create()
            if not self._released.is_set() and self._own.token.encode() not in held:
                self._end(_holder(held))

    def release(self) -> None:
        """Removes the lock if it is still this run's."""
        with self._mutex:
            self._released.set()
            with contextlib.suppress(OSError):
                held = self._read()
                if held and self._own.token.encode() in held:
                    self._path.unlink()
            self._close()

    def _beat(self) -> None:
        while not self._released.wait(self._beat_s):
            self.check()
            with self._mutex, contextlib.suppress(OSError):
                if self._file is not None:
                    # by descriptor, not by name: the name may belong to another run since `check`
                    self._write(self._file)

    def _read(self) -> bytes | None:
        """Returns the content of the lock file; None if there is none."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _create(self) -> bool:
        """Creates the lock file; returns False if there is one already."""
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        self._take(file)
        return True

    def _take(self, file: int) -> None:
        self._close()
        self._file = file
        self._write(file)

    def _write(self, file: int) -> None:
        self._count += 1
        text = json.dumps(asdict(self._own) | {"count": self._count})
        os.pwrite(file, text.ljust(FILE_BYTES - 1).encode() + b"\n", 0)
        os.fsync(file)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _is_left(self, held: bytes) -> bool:
        """Returns True if the holder has ended, False if the lock is gone. Raises UserError otherwise."""
        holder = _holder(held)
        alive = self._is_alive(holder) if holder else None
        if alive is None:
            return self._stands_still(held, holder)
        end = time.monotonic() + GRACE_S
        while alive and time.monotonic() < end:
            time.sleep(0.1)
            alive = self._is_alive(holder)
        if alive:
            raise self._in_use(holder)
        return True

    def _is_alive(self, holder: Holder) -> bool | None:
        """Returns whether the holder is running; None if this host cannot know."""
        if not self._is_here(holder):
            return None
        found = process(holder.pid)
        if found:
            return found.start == holder.start
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process, hidden from this one in /proc
            return None
        return False  # a zombie

    def _is_here(self, holder: Holder) -> bool:
        """Returns whether the holder's process id belongs to this kernel and pid namespace."""
        machine = (self._own.host, self._own.machine)
        return bool(self._own.machine) and (holder.host, holder.machine) == machine

    def _stands_still(self, held: bytes, holder: Holder | None) -> bool:
        """Returns whether the counter stops for `silence_s`; False if the lock is gone.

        Raises UserError if the counter moves.
        """
        logger.warning(
            "%s is held by %s; waiting %g seconds to see whether that run is alive",
            self._path,
            holder or "a run that wrote nothing to it",
            self._silence_s,
        )
        # counts reads, not seconds: while a file server is down, a blocked read proves nothing
        for _ in range(round(self._silence_s / self._beat_s)):
            time.sleep(self._beat_s)
            now = self._read()
            if now is None:
                return False
            if now != held:
                raise self._in_use(_holder(now))
        return True

    def _replace(self, held: bytes) -> bool:
        """Replaces the lock `held`; if several new runs do so, only the last returns True."""
        draft = self._path.with_name(f"{FILE}.{self._own.token}")
        self._take(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
        if self._read() != held:
            draft.unlink()
            return False
        os.replace(draft, self._path)
        holder = _holder(held)
        time.sleep(SETTLE_S if holder and self._is_here(holder) else self._beat_s)
        return self._own.token.encode() in (self._read() or b"")

    def _in_use(self, holder: Holder | None) -> UserError:
        return UserError(
            f"output directory {self.directory} is in use by {holder or 'another run'}: "
            "wait until that run has ended, end it, or choose another directory"
        )

    def _end(self, holder: Holder | None) -> NoReturn:
        """Ends the process at once: its main thread may be inside a collective that never returns."""
        line = (
            f"megatron_bicc: error: process {self._own.pid} on host {self._own.host}: {self.directory} was "
            f"taken over by {holder or 'another run'}: this run was suspended, or cut off from its files, "
            f"for more than {self._silence_s:g} seconds; it ends and writes nothing more"
        )
        print(f"\n{line}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _holder(held: bytes) -> Holder | None:
    """Parses the content of a lock file; None if it was never written whole."""
    try:
        record = json.loads(held)
        record.pop("count")
        return Holder(**record)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


_lock: RunLock | None = None


def hold(directory: str) -> None:
    """Locks a directory until this process ends.

    Raises UserError, one line, if another run holds it or the directory cannot be written.
    """
    global _lock
    if _holds(directory):
        return
    lock = RunLock(Path(directory))
    try:
        lock.directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"output directory {directory} cannot be written: {error.strerror}") from error
    if _lock:
        _lock.release()
    _lock = lock
    # not earlier: a thread may be writing a checkpoint until then
    atexit.register(lock.release)


def refuse_if_alive(directory: str) -> None:
    """Raises UserError, one line, if another run of this host holds the directory. Writes nothing."""
    if not _holds(directory):
        RunLock(Path(directory)).refuse_if_alive()


def _holds(directory: str) -> bool:
    return _lock is not None and _lock.directory == Path(directory)


def check() -> None:
    """Ends this process if another run has taken the directory over. Call before every write."""
    if _lock:
        _lock.check()
