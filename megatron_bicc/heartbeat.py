"""Heartbeat between hosts: detects a host or a link that has gone down.

A cut link sends no error, and the next collective would wait until its timeout of half an hour. So the
first process of every host increments a counter in the rendezvous store and reads the counters of the other
hosts. If a counter stops, or the store no longer answers, the process ends with one line; torchrun then
ends the other processes of that host.
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

INTERVAL_S = 2.0
CHECK_S = 1.0
EXIT_STATUS = 3


class Heartbeat:
    """Watches the other hosts of the job.

    Two threads, because a call to the store may block for as long as the link is cut: one calls the store,
    the other compares times.
    """

    def __init__(self, timeout_s: float, local_rank: int) -> None:
        """Starts the threads on the first process of each host. Collective.

        timeout_s: how long another host, or the store, may be silent (parallel.heartbeat_timeout_s).
        """
        self._silence_s = timeout_s
        self._hosts, self._prefix = _first_processes(local_rank)
        self._rank = dist.get_rank()
        self._ended = threading.Event()
        if len(self._hosts) > 1:
            if self._rank in self._hosts:
                self._start()
            # Reading a key waits until it is set. Without this barrier a host that is lost before it sets
            # its key would be reported as a store that does not answer.
            dist.barrier()

    def stop(self) -> None:
        """Stops watching. Call once no process waits for another."""
        self._ended.set()

    def _start(self) -> None:
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: if it blocks, the process group's store must not
        self._store = dist.TCPStore(
            *self._address, is_master=False, timeout=timedelta(seconds=self._silence_s)
        )
        self._store.set(self._key(self._rank), "0")
        self._counters = {rank: b"" for rank in self._hosts if rank != self._rank}
        self._store_answered_at = time.monotonic()
        self._moved_at = dict.fromkeys(self._counters, self._store_answered_at)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True).start()

    def _beat(self) -> None:
        """Increments this host's counter and reads the others'. Blocks or fails while the link is cut."""
        others, count = [self._key(rank) for rank in self._counters], 0
        while not self._ended.wait(INTERVAL_S):
            try:
                count += 1
                self._store.set(self._key(self._rank), str(count))
                counters = self._store.multi_get(others)
            except RuntimeError:  # _watch notices that _store_answered_at has stopped
                continue
            self._store_answered_at = time.monotonic()
            for rank, counter in zip(self._counters, counters, strict=True):
                if counter != self._counters[rank]:
                    self._counters[rank], self._moved_at[rank] = counter, self._store_answered_at

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_S):
            if time.monotonic() - self._store_answered_at > self._silence_s:
                address = f"{self._address[0]}:{self._address[1]}"
                self._end(f"the rendezvous store at {address} does not answer")
            # measured at the last answer: while the store is silent, nothing is known of the other hosts
            for rank, moved_at in self._moved_at.items():
                if self._store_answered_at - moved_at > self._silence_s:
                    self._end(f"process {rank} on host {self._hosts[rank]} is silent")

    def _end(self, what: str) -> None:
        """Ends the process at once: its main thread may be inside a collective that never returns."""
        line = (
            f"megatron_bicc: error: process {self._rank} on host {self._hosts[self._rank]}: {what} for "
            f"{self._silence_s:g} seconds (parallel.heartbeat_timeout_s): the host or the link is down; "
            "resume from the newest checkpoint with checkpoint.resume=true"
        )
        print(f"\n{line}", file=sys.stderr, flush=True)  # a new line, not behind the progress bar
        os._exit(EXIT_STATUS)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"


def _first_processes(local_rank: int) -> tuple[dict[int, str], str]:
    """Returns (host name by rank, for the first process of every host; a key prefix unique to this start).

    The prefix is new at every start because torchrun keeps the store when it restarts the workers.
    """
    everyone = gathered((local_rank == 0, socket.gethostname(), secrets.token_hex(8)))
    hosts = {rank: host for rank, (first, host, _) in enumerate(everyone) if first}
    return hosts, f"megatron_bicc/heartbeat/{everyone[0][2]}"
