"""Weights by a broadcast from this process to every rank of its servers, over gloo or NCCL."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from megatron_bicc import platform
from megatron_bicc.rollout.sglang.client import ServerClient, ServerError, ServerUnavailable
from megatron_bicc.weight_sync.buckets import Bucket
from megatron_bicc.weight_sync.session import GIVE_UP_S, Run, Session, Sessions

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""By the device of the policy; that of the servers is to be the same"""
PATH = "/update_weights_from_distributed"


class Distributed:
    """This process and all ranks of its servers in one process group, made again when one of them is lost."""

    brackets = True
    reads_files = False

    def __init__(self) -> None:
        self._group: _Group | None = None

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """Broadcasts every tensor.

        A server that was lost, or restarted since the last sync, breaks the group for all: then once more,
        in a group of those that are left.
        """
        if not self._try(sessions, bucket):
            self.close()
            self._try(sessions, bucket, last=True)

    def close(self) -> None:
        """Leaves the group, and makes the servers leave it."""
        if self._group:
            self._group.leave()
            self._group = None

    def _try(self, sessions: Sessions, bucket: Bucket, last: bool = False) -> bool:
        """Whether nothing failed. Servers without an answer are taken out; at last, all that failed."""
        live = sessions.live()
        if not live:
            return True
        if self._group is None or self._group.urls != [session.client.url for session in live]:
            self.close()
            self._group = _Group(live, sessions.run)
            if _take_out(live, self._group.join(), last):
                return False
        return not _take_out(live, self._group.broadcast(live, bucket), last)


def _take_out(sessions: list[Session], errors: list[ServerError | None], last: bool) -> bool:
    """Whether there are errors; keeps those that end a server's part in the sync."""
    for session, error in zip(sessions, errors, strict=True):
        if error and (last or isinstance(error, ServerUnavailable)):
            session.error = error
    return any(errors)


class _Group:
    """A process group apart from the default one: this process is rank 0, the servers' ranks follow."""

    def __init__(self, sessions: list[Session], run: Run) -> None:
        self.clients = [session.client for session in sessions]
        self.urls = [client.url for client in self.clients]
        self.sizes = [session.tensor_parallel for session in sessions]
        self.timeout = timedelta(seconds=sessions[0].timeout_s)
        # never used before: a server may still be in the group of a trainer that was killed
        self.name = f"weights_{uuid.uuid4().hex}"
        self.backend = BACKENDS[platform.device().type]
        self.run = run
        self._process_group: dist.ProcessGroup | None = None

    def join(self) -> list[ServerError | None]:
        """Meets all servers in the group; what failed, a server each."""
        address = _address_for(self.urls[-1])
        store = _store(address, self._world_size(), self.timeout)
        posts = []
        for i, client in enumerate(self.clients):
            body = {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": 1 + sum(self.sizes[:i]),
                "world_size": self._world_size(),
                "group_name": self.name,
                "backend": self.backend,
            }
            posts.append(client.post("/init_weights_update_group", body, self.timeout.total_seconds()))
        return self.run(_together, lambda: self._make(store), posts, self._abort, self._drop)

    def broadcast(self, sessions: list[Session], bucket: Bucket) -> list[ServerError | None]:
        """Sends every tensor to all; what failed, a server each."""
        body = {
            "names": [name for name, _ in bucket.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for _, tensor in bucket.tensors],
            "group_name": self.name,
            "flush_cache": False,
        }
        posts = [session.post(PATH, body) for session in sessions]
        return self.run(_together, lambda: self._send(bucket), posts, self._abort, self._drop)

    def leave(self) -> None:
        """Ends the group here and on the servers that still answer."""
        self.run(_leave, self.clients, self.name)
        self._drop()

    def _world_size(self) -> int:
        return 1 + sum(self.sizes)

    def _make(self, store: dist.Store) -> None:
        # the servers make theirs by the same function: it settles the keys by which ranks find each other
        group, _ = _new_process_group_helper(
            self._world_size(),
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=self.timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self._world_size())}
        self._process_group = group

    def _send(self, bucket: Bucket) -> None:
        works = [
            dist.broadcast(tensor, group=self._process_group, group_src=0, async_op=True)
            for _, tensor in bucket.tensors
        ]
        try:
            while works:
                works.pop(0).wait()
        finally:
            works.clear()  # one that an exception's traceback kept would keep the connections

    def _abort(self) -> None:
        """Frees who waits here, over NCCL; over gloo that is for the other side to do, or for the time."""
        if self._process_group:
            self._process_group.abort()

    def _drop(self) -> None:
        """Ends the connections: servers that wait in the group are freed."""
        if self._process_group:
            dist.destroy_process_group(self._process_group)
            self._process_group = None


async def _together(
    work: Callable[[], None],
    posts: list[Awaitable[Any]],
    abort: Callable[[], None],
    drop: Callable[[], None],
) -> list[ServerError | None]:
    """Runs `work` in a thread beside the requests, which end together with it.

    At a failure `abort` ends the work, and after it `drop` the requests. Returns each request's failure. If
    only `work` fails, that stands for all.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    requests = [asyncio.ensure_future(post) for post in posts]
    done, _ = await asyncio.wait([thread, *requests], return_when=asyncio.FIRST_EXCEPTION)
    if any(task.exception() for task in done):
        abort()
        await asyncio.wait([thread])
        drop()
        await asyncio.wait(requests)
    errors = [request.exception() for request in requests]
    unexpected = [error for error in errors if error and not isinstance(error, ServerError)]
    if unexpected:
        raise unexpected[0]
    if thread.exception() and not any(errors):
        raise RuntimeError("the broadcast failed, though no server says so") from thread.exception()
    return errors


async def _leave(clients: list[ServerClient], name: str) -> None:
    for client in clients:
        with contextlib.suppress(ServerError):
            await client.post("/destroy_weights_update_group", {"group_name": name}, GIVE_UP_S)


def _address_for(url: str) -> str:
    """This host's address as a server sees it: loopback where the server is on this host."""
    server = urlsplit(url)
    with socket.create_connection((server.hostname, server.port or 80), timeout=10) as connection:
        return connection.getsockname()[0]


def _store(address: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Where the ranks find each other; it listens at that address only, at a free port."""
    listener = socket.create_server(
        (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
