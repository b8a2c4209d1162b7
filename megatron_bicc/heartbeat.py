"""Notices that another host has gone silent.

A cut link sends no error: the next collective would wait for half an hour. So every host's first process
counts up a key in the store that the processes met at and reads the others' counts. A host whose count stands
still, or a store that does not answer, ends this process with one line; torchrun then ends its neighbours.
"""

import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_bicc.collective import gathered

INTERVAL_SECONDS = 2.0
EXIT_STATUS = 3


class Heartbeat:
    """Watches the other hosts of the job from two threads: one talks to the store, one looks at the clock."""

    def __init__(self, timeout_s: float, local_rank: int) -> None:
        """Collective. timeout_s: parallel.heartbeat_timeout_s, above 0. Only first processes watch."""
        self._silence = timeout_s
        self._hosts, self._prefix = _meet(local_rank)
        self._rank = dist.get_rank()
        self._ended = threading.Event()
        if len(self._hosts) > 1:
            if self._rank in self._hosts:
                self._start()
            # a count that is not there yet would be waited for: a host that is lost before its first beat
            # would be taken for a store that does not answer
            dist.barrier()

    def stop(self) -> None:
        """Watches no longer. To be called once no process waits for another any more."""
        self._ended.set()

    def _start(self) -> None:
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=self._silence)
        self._store = dist.TCPStore(*self._address, is_master=False, timeout=timeout)
        self._store.set(self._key(self._rank), "0")
        self._counts = {rank: b"" for rank in self._hosts if rank != self._rank}
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(self._counts, self._answered)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True).start()

    def _beat(self) -> None:
        """Counts up and reads the others' counts; blocks or fails when the link is cut, which _watch sees."""
        others, beats = [self._key(rank) for rank in self._counts], 0
        while not self._ended.wait(INTERVAL_SECONDS):
            try:
                beats += 1
                self._store.set(self._key(self._rank), str(beats))
                counts = self._store.multi_get(others)
            except RuntimeError:
                continue
            self._answered = time.monotonic()
            for rank, count in zip(self._counts, counts, strict=True):
                if count != self._counts[rank]:
                    self._counts[rank], self._heard[rank] = count, self._answered

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            if time.monotonic() - self._answered > self._silence:
                self._end(f"{self._address[0]}:{self._address[1]}, where the processes met, does not answer")
            for rank, heard in self._heard.items():
                if self._answered - heard > self._silence:
                    self._end(f"process {rank} on host {self._hosts[rank]} is silent")

    def _end(self, what: str) -> None:
        """The main thread may be inside a collective that never returns, so nothing softer would end it."""
        line = (
            f"megatron_bicc: error: process {self._rank} on host {self._hosts[self._rank]}: {what} for "
            f"{self._silence:g} seconds (parallel.heartbeat_timeout_s): the host or the link to it is down; "
            "checkpoint.resume=true goes on from the newest checkpoint"
        )
        print(f"\n{line}", file=sys.stderr, flush=True)  # not behind the progress bar
        os._exit(EXIT_STATUS)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"


def _meet(local_rank: int) -> tuple[dict[int, str], str]:
    """(host name by rank of every host's first process, a key prefix that only this start uses)."""
    everyone = gathered((local_rank == 0, socket.gethostname(), secrets.token_hex(8)))
    hosts = {rank: host for rank, (first, host, _) in enumerate(everyone) if first}
    return hosts, f"megatron_bicc/heartbeat/{everyone[0][2]}"
