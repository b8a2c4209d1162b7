"""Processes as /proc shows them. Standard library only; on other systems than Linux nothing is found."""

import contextlib
from dataclasses import dataclass


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
    """Returns the parent, the parent's parent and so on, as far as they can be read."""
    found: list[Process] = []
    own = process(pid)
    while own and (own := process(own.parent)):
        found.append(own)
    return found
