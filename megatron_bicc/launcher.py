"""Ends a worker when what launched it is gone. Standard library only: it runs before anything is imported.

torchrun that is killed with -9 ends no worker: they would train on, beside the run that is started in their
place, or wait at the rendezvous for half an hour.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from itertools import takewhile

from megatron_bicc.processes import Process, ancestors

LOOK_S = 0.5
EXIT_STATUS = 3
VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "SLURM_PROCID")
"""Of each a launcher sets one at least"""


def end_with_launcher() -> None:
    """From now on this process ends, with a line on stderr and status 3, soon after its launcher has ended.

    The launcher is torchrun, which starts each worker in a session of its own, under SLURM the step's
    slurmstepd, else the parent and those before it in its process group, such as a script that was called by
    a script; what stands between is watched with it. A process has none if no variable of a launcher is set,
    or if SIGHUP is ignored, as by nohup, and it was neither torchrun nor SLURM: such a one is to outlive its
    shell. A thread looks: the kernel's own signal at a parent's death (prctl) would come when the parent's
    thread ends, and to those alone whose parent it is.
    """
    if any(name in os.environ for name in VARIABLES):
        parent, chain = os.getppid(), ancestors(os.getpid())
        watched = _up_to_launcher(chain)
        if watched is not None:
            threading.Thread(target=_watch, args=(parent, watched), name="launcher", daemon=True).start()


def _up_to_launcher(chain: list[Process]) -> list[Process] | None:
    """The launcher and what stands between; None without one. chain: this process's ancestors."""
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
    # the parent is known everywhere, and is another one at once when it ends
    while os.getppid() == parent and all(process.is_running() for process in watched):
        time.sleep(LOOK_S)
    place = f"process {os.environ.get('RANK', '0')} on host {socket.gethostname()}"
    line = f"\nmegatron_bicc: error: {place}: its launcher, process {parent}, has ended, so it ends too\n"
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # else whoever reads is gone or stopped
            os.write(2, line.encode())
    os._exit(EXIT_STATUS)
