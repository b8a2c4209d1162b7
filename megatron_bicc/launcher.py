"""The launcher of this process (torchrun, SLURM, a shell): its variables; workers end when it ends.

Standard library only: `end_with_launcher` runs before anything else is imported. A torchrun that is killed
with SIGKILL does not end its workers. They would keep training beside the run that replaces them, or wait at
the rendezvous for half an hour.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass
from itertools import takewhile

POLL_S = 0.5
EXIT_STATUS = 3
VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "SLURM_PROCID")
"""Every launcher sets at least one of these"""


@dataclass(frozen=True)
class Process:
    """A process; its start time distinguishes it from a later one with the same id."""

    pid: int
    name: str
    parent: int
    group: int
    session: int
    start: int
    """Clock ticks from the boot of the machine to the start of the process"""

    def is_running(self) -> bool:
        """Returns whether the process is still running; a zombie is not."""
        now = process(self.pid)
        return now is not None and now.start == self.start


def process(pid: int) -> Process | None:
    """Returns the process with this id; None if it has ended, is a zombie, or may not be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        # proc(5): pid (name) state ppid pgrp session ... starttime; the name may hold any characters
        head, _, rest = stat.read().rpartition(")")
        fields = rest.split()
        if fields[0] not in ("Z", "X"):
            name = head.partition("(")[2]
            return Process(pid, name, *map(int, fields[1:4]), int(fields[19]))
    return None


def ancestors(pid: int) -> list[Process]:
    """Returns the ancestors of a process, its parent first, as far as /proc can be read."""
    found: list[Process] = []
    own = process(pid)
    while own and (own := process(own.parent)):
        found.append(own)
    return found


def rank() -> int:
    """Returns the rank of this process in the job; 0 without a launcher. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns the rank of this process on its host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def place() -> str:
    """Returns "process RANK on host NAME", for messages."""
    return f"process {rank()} on host {socket.gethostname()}"


def end_with_launcher() -> None:
    """Starts a thread that ends this process, with one line and status 3, when its launcher has ended.

    The launcher is torchrun, which starts every worker in its own session; under SLURM the step's
    slurmstepd; else the parent and the processes before it in the same process group, such as a script
    that was called by a script. All processes between launcher and worker are watched too. Nothing is
    started if no launcher set its variables, or if SIGHUP is ignored, as under nohup, and the launcher is
    neither torchrun nor SLURM: such a process should outlive its shell.
    """
    # A thread, not prctl(PR_SET_PDEATHSIG): that signal comes when the parent's *thread* ends, and only from
    # the direct parent.
    if any(name in os.environ for name in VARIABLES):
        parent, chain = os.getppid(), ancestors(os.getpid())
        watched = _up_to_launcher(chain)
        if watched is not None:
            threading.Thread(target=_watch, args=(parent, watched), name="launcher", daemon=True).start()


def _up_to_launcher(chain: list[Process]) -> list[Process] | None:
    """Returns the launcher and all processes between; None if there is no launcher.

    chain: this process's ancestors, the parent first.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    ends = [i for i, process in enumerate(chain) if process.name == "slurmstepd"][:1]
    if by_torchrun:
        ends += [i for i, process in enumerate(chain) if process.session != os.getsid(0)][:1]
    if ends:
        return chain[: max(ends) + 1]
    if not by_torchrun and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return None
    return chain[:1] + list(takewhile(lambda process: process.group == os.getpgrp(), chain[1:]))


def _watch(parent: int, watched: list[Process]) -> None:
    # getppid works on every platform, and changes at once when the parent ends
    while os.getppid() == parent and all(process.is_running() for process in watched):
        time.sleep(POLL_S)
    line = f"\nmegatron_bicc: error: {place()}: its launcher, process {parent}, has ended, so it ends too\n"
    with contextlib.suppress(OSError, ValueError):
        # written only if it does not block: the reader of stderr may be gone or stopped
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode())
    os._exit(EXIT_STATUS)
