"""The servers as one process sees them: which can be used, how busy they are, and what if one fails."""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

import anyio

from megatron_bicc.config import SglangConfig
from megatron_bicc.rollout.types import RolloutError
from megatron_bicc.sglang.client import (
    BadAnswer,
    ServerClient,
    ServerError,
    ServerRefusal,
    ServerUnavailable,
    StaleWeights,
)

log = logging.getLogger(__name__)
UNTOUCHED = "default"
"""Weight version of a server that no weights were ever sent to."""
LOOK_S = 1.0
"""Pause between two looks at a server."""
ABORT_S = 5.0
"""Longest time to tell a server that an answer is not wanted any more."""
LONGEST_PAUSE_S = 10.0
"""Between two attempts at one request; the first is half a second, and each is twice the one before."""
Result = TypeVar("Result")


class RequestTaken(Exception):
    """A server hangs, and a request was taken from it. One line: which, and how that is known."""


class Server:
    """One server."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.outstanding = 0
        """Samples that it is working on for this process"""
        self.reason = f"{client.url}: it has got no weights yet"
        """Why it is not used; empty if it is"""
        self.gate = anyio.Semaphore(0)
        """Taken by who looks after it"""
        self._running: set[anyio.CancelScope] = set()

    async def generate(self, body: dict[str, Any], timeout_s: float) -> Any:
        """The answer; cancelled, the server works no longer on it.

        Raises ServerUnavailable, and RequestTaken if `lose` is called before the answer came.
        """
        samples = len(body["input_ids"])
        self.outstanding += samples
        # names of this attempt: a server refuses one that it still works on
        rids = [uuid4().hex for _ in range(samples)]
        try:
            with anyio.CancelScope() as scope:
                self._running.add(scope)
                return await self.client.generate(body | {"rid": rids}, timeout_s)
            raise RequestTaken(self.reason)
        except anyio.get_cancelled_exc_class():
            await self._abort(rids)
            raise
        finally:
            self._running.discard(scope)
            self.outstanding -= samples

    async def _abort(self, rids: list[str]) -> None:
        """Has the server drop these; one that does not answer will see that the connection is gone."""
        with anyio.move_on_after(ABORT_S, shield=True), suppress(ServerError):
            for rid in rids:
                await self.client.abort(rid)

    def avoid(self, reason: str) -> None:
        """Gives it no new requests."""
        if not self.reason:
            log.warning("rollout server not used: %s", reason)
        self.reason = reason

    def lose(self, reason: str) -> None:
        """Gives it no new requests, and takes from it those that it has."""
        self.avoid(reason)
        for scope in self._running:
            scope.cancel()


class ServerPool:
    """All servers. Everything here runs in one event loop."""

    def __init__(
        self,
        clients: list[ServerClient],
        settings: SglangConfig,
        own: list[ServerClient],
        restore: Callable[[ServerClient], Awaitable[str]],
        first: int,
    ) -> None:
        """own: those that this process gives weights to, watched even when they have nothing to do.

        restore: gives a server that lacks the current weights those weights, or returns why it does not.
        first: of equally busy servers this one is taken, so that processes do not all begin with the same.
        """
        self.servers = [Server(client) for client in clients[first:] + clients[:first]]
        self.version = UNTOUCHED
        """Of the weights that a server must hold to be used"""
        self.resent = 0
        """Samples that were asked for again after a failure"""
        self.stale = 0
        """Samples that were refused as other weights had made them"""
        self._settings = settings
        self._own = own
        self._restore = restore

    def hold(self, version: str, failed: dict[str, str]) -> None:
        """All servers hold the weights of this version, but for those that failed: reasons by URL."""
        self.version = version
        for server in self.servers:
            reason = failed.get(server.client.url, "")
            if reason and server.client in self._own:  # others do not need to say it again
                log.warning("rollout server not used: %s", reason)
            server.reason = reason

    async def watch(self) -> None:
        """Watches every server, for ever, while the gates are open."""
        async with anyio.create_task_group() as watchers:
            for server in self.servers:
                watchers.start_soon(self._watch, server)

    async def close_gates(self) -> None:
        """Waits for what the watchers do and stops them, as the servers are to be left alone."""
        for server in self.servers:
            await server.gate.acquire()

    async def open_gates(self) -> None:
        """Lets the watchers go on."""
        for server in self.servers:
            server.gate.release()

    async def ask(self, body: dict[str, Any], read: Callable[[Any], Result]) -> Result:
        """What `read` makes of the answer of the least busy server, of another one if that one fails.

        read: raises StaleWeights or BadAnswer for an answer that cannot be used. Raises RolloutError when all
        attempts of retry_timeout_s seconds have failed, or a well server refuses the request.
        """
        attempts = Attempts(self._settings.retry_timeout_s)
        while True:
            await attempts.begin()
            server = min((s for s in self.servers if not s.reason), key=lambda s: s.outstanding, default=None)
            if server is None:
                attempts.failed(f"no rollout server can be used: {self.reasons()}")
                continue
            try:
                return read(await server.generate(body, self._settings.request_timeout_s))
            except ServerRefusal as refusal:
                raise RolloutError(str(refusal)) from None
            except (ServerUnavailable, RequestTaken, StaleWeights, BadAnswer) as error:
                samples = len(body["input_ids"])
                self.resent += samples
                self.stale += samples if isinstance(error, StaleWeights) else 0
                named = isinstance(error, ServerError | RequestTaken)
                reason = str(error) if named else f"{server.client.url}: {error}"
                server.avoid(reason)
                attempts.failed(reason)

    def reasons(self) -> str:
        """Why servers are not used."""
        return "; ".join(server.reason for server in self.servers if server.reason)

    async def _watch(self, server: Server) -> None:
        while True:
            async with server.gate:
                if server.outstanding or server.reason or server.client in self._own:
                    await self._look(server)
            await anyio.sleep(LOOK_S)

    async def _look(self, server: Server) -> None:
        """Loses a server that hangs, takes one back that is well again and has the current weights."""
        client, seconds = server.client, self._settings.health_timeout_s
        if (server.outstanding or server.reason) and not await client.is_healthy(seconds):
            return server.lose(f"{client.url}: /health was not answered well within {seconds:g} s")
        try:
            found = str((await client.model_info())["weight_version"])
            reason = "" if found == self.version else await self._restore(client)
        except ServerError as error:
            reason = str(error)
        if reason:
            server.avoid(reason)
        elif server.reason:
            log.warning("rollout server used again: %s", client.url)
            server.reason = ""


class Attempts:
    """The attempts at one request: the pauses between them, and when to give up."""

    def __init__(self, retry_timeout_s: float) -> None:
        self._retry_timeout_s = retry_timeout_s
        self._begun = 0.0
        self._failing_since: float | None = None
        self._pause_s = 0.0

    async def begin(self) -> None:
        """Waits before the next attempt; not before the first."""
        await anyio.sleep(self._pause_s)
        self._pause_s = min(max(0.5, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._begun = time.monotonic()

    def failed(self, reason: str) -> None:
        """Raises RolloutError with the reason if the time is up.

        An attempt that ran for longer than that time was real work lost: counting begins anew after it.
        """
        now = time.monotonic()
        if self._failing_since is None or now - self._begun > self._retry_timeout_s:
            self._failing_since = now
        if now - self._failing_since > self._retry_timeout_s:
            raise RolloutError(f"no answer after {self._retry_timeout_s:g} s of attempts; the last: {reason}")
