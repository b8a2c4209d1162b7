"""What the kernel says about other processes. Standard library only; nothing is known outside Linux."""

import contextlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same id by its start."""

    pid: int
    name: str
    parent: int
    group: int
    session: int
    start: int
    """Clock ticks since the machine started"""

    def is_running(self) -> bool:
        """Whether it has not ended; a zombie has."""
        now = process(self.pid)
        return now is not None and now.start == self.start


def process(pid: int) -> Process | None:
    """The process of that id; None if it has ended, is a zombie, or cannot be looked at."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        # proc(5): pid (name) state ppid pgrp session ... starttime, the name with any characters
        head, _, rest = stat.read().rpartition(")")
        fields = rest.split()
        if fields[0] not in ("Z", "X"):
            name = head.partition("(")[2]
            return Process(pid, name, *map(int, fields[1:4]), int(fields[19]))
    return None


def ancestors(pid: int) -> list[Process]:
    """Its parent, the parent's parent, and so on, as far as they can be looked at."""
    found: list[Process] = []
    own = process(pid)
    while own and (own := process(own.parent)):
        found.append(own)
    return found
