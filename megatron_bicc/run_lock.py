"""One run in a directory at a time. What a killed run leaves behind is taken over by itself.

DIRECTORY/run.lock says who writes there, and its writer counts up in it every few seconds. A newcomer on the
same host asks the kernel for that process. One on another host, or in another container, looks at the count,
by its own clock: if it moves the run is alive, if it stands still for SILENCE_S seconds the lock is taken
over. Only what NFS and Lustre have is used: exclusive creation, rename, and reading what another host wrote
before. A run that was suspended and finds the lock taken ends before it writes anything.

Standard library only.
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
from megatron_bicc.processes import process

FILE = "run.lock"
BEAT_S = 2.0
SILENCE_S = 30.0
"""Long beside a beat: a thread may wait for seconds while another one pickles gigabytes"""
GRACE_S = 2.0
"""How long a run on this host may take to end: its launcher may have been killed just now"""
SETTLE_S = 0.1
"""After which a newcomer that took the lock over looks whether another one did so after it; a beat where that
may be on another host"""
FILE_BYTES = 1024
"""Always written whole, so that a reader never finds the end of an older text"""
EXIT_STATUS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who writes to a directory."""

    token: str
    """Of this run alone"""
    host: str
    machine: str
    """The kernel's boot and the pid namespace, in which `pid` means something; empty if unknown"""
    pid: int
    start: int
    """processes.Process.start"""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, which has written to it since {self.since}"


class RunLock:
    """The lock of a directory, from `acquire` to `release` kept by a thread."""

    def __init__(self, directory: Path, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        """beat_s: seconds between two counts. silence_s: how long a count of another host may stand still."""
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
        """Returns with the lock. Raises UserError naming host and process if another run has it.

        OSError if no file can be written there.
        """
        while not self._create():
            held = self._read()
            if held is None or not self._is_left(held):
                continue
            if self._replace(held):
                break
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def refuse_if_alive(self) -> None:
        """Raises UserError as `acquire` does, but only for what this host knows at once. Writes nothing."""
        with contextlib.suppress(OSError):
            held = self._read()
            holder = _holder(held) if held else None
            if holder and self._is_alive(holder):
                raise self._in_use(holder)

    def check(self) -> None:
        """To be called before anything is written: ends this process if another run has the lock."""
        with self._mutex, contextlib.suppress(OSError):
            # one that was deleted by hand is made again
            while not self._released.is_set() and (held := self._read()) is None:
                self._create()
            if not self._released.is_set() and self._own.token.encode() not in held:
                self._end(_holder(held))

    def release(self) -> None:
        """Removes the lock, if it is still this run's."""
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
                    # into the file that was opened: never into another run's of the same name
                    self._write(self._file)

    def _read(self) -> bytes | None:
        """What the lock's file holds; None if there is none."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _create(self) -> bool:
        """Whether there was no lock, and this run's is there now."""
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
        """Whether the run of a lock has ended; not if the lock has gone. Raises UserError if it is alive."""
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
        """Whether the process of a lock is running; None if this host cannot tell."""
        if not self._is_here(holder):
            return None
        found = process(holder.pid)
        if found:
            return found.start == holder.start
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, of whom this one may see nothing
            return None
        return False  # a zombie

    def _is_here(self, holder: Holder) -> bool:
        """Whether its process id is one of this process's own kernel and namespace."""
        machine = (self._own.host, self._own.machine)
        return bool(self._own.machine) and (holder.host, holder.machine) == machine

    def _stands_still(self, held: bytes, holder: Holder | None) -> bool:
        """Whether a lock's count does, for long enough. Raises UserError if it moves."""
        logger.warning(
            "%s is of %s; waiting %g seconds to see whether that one is alive",
            self._path,
            holder or "a run that wrote nothing",
            self._silence_s,
        )
        # so many reads, not so much time: while a file server is down nothing can be read
        for _ in range(round(self._silence_s / self._beat_s)):
            time.sleep(self._beat_s)
            now = self._read()
            if now is None:
                return False
            if now != held:
                raise self._in_use(_holder(now))
        return True

    def _replace(self, held: bytes) -> bool:
        """Whether this run's lock is there instead of `held`; of several newcomers the last one's stays."""
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
            "wait until that one has ended, end it, or choose another directory"
        )

    def _end(self, holder: Holder | None) -> NoReturn:
        """The main thread may be inside a collective that never returns, so nothing softer would end it."""
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
    """Whom a lock's file names; None if it was never written whole."""
    try:
        record = json.loads(held)
        record.pop("count")
        return Holder(**record)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


_lock: RunLock | None = None


def hold(directory: str) -> None:
    """Takes the lock of a directory for this process, to its end.

    Raises UserError, one line, if another run has it or nothing can be written there.
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
    # at exit, as a checkpoint may be written until then
    atexit.register(lock.release)


def refuse_if_alive(directory: str) -> None:
    """Raises UserError, one line, if another run of this host has the directory. Writes nothing."""
    if not _holds(directory):
        RunLock(Path(directory)).refuse_if_alive()


def _holds(directory: str) -> bool:
    return _lock is not None and _lock.directory == Path(directory)


def check() -> None:
    """To be called before a run's files are written: ends this process if another run has the directory."""
    if _lock:
        _lock.check()
