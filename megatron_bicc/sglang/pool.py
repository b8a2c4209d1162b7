"""The rollout servers of a run: started or attached, checked, and shared by all requests.

Requests go to the least busy healthy server, and to another one when it fails. An SGLang router is a server
for requests; its workers are servers for all else, and for the requests that it cannot take.
"""

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import anyio
import torch.distributed as dist
from anyio.from_thread import start_blocking_portal
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config, PauseMode, RolloutConfig, SglangConfig
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import waiting_for
from megatron_bicc.sglang.client import (
    CACHE,
    WEIGHTS,
    ConnectionBroken,
    ServerClient,
    ServerError,
    ServerRefusal,
    ServerUnavailable,
)
from megatron_bicc.sglang.process import ROUTING_ARGUMENT, SpawnedServer
from megatron_bicc.sglang.router import PATH, listed_workers, routed
from megatron_bicc.sglang.settings import context_length, pause_mode, server_urls

logger = logging.getLogger(__name__)

WAIT_S = 10.0
"""Seconds of waiting for a server after which the wait is logged"""
POLL_S = 0.2
"""Seconds between two attempts to reach a server that starts, or that is about to be idle"""
IDLE_TIMEOUT_S = 60.0
"""Seconds in which a server must be idle after all of its requests were aborted"""
READY_S = 30.0
"""Timeout of one request that asks whether a server is ready"""
Result = TypeVar("Result")

LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Keys of config.json that may hold the longest context, in the order in which SGLang looks for them"""


def server_positions(hf_config: PretrainedConfig, rollout: RolloutConfig) -> int:
    """Returns the longest sequence of a server in tokens; for an attached one, that of the model."""
    scaling = hf_config.rope_parameters
    factor = 1.0 if "original_max_position_embeddings" in scaling else scaling.get("factor", 1.0)
    most = int(factor * next(vars(hf_config)[key] for key in LENGTHS if vars(hf_config).get(key)))
    given = context_length(rollout.sglang.server_args) if rollout.launch == "spawn" else None
    return min(most, given or most)


async def wait_until_ready(
    client: ServerClient, timeout_s: float, check_starting: Callable[[], None] = lambda: None
) -> None:
    """Waits until a server is healthy and generates.

    check_starting: called before each attempt; raises if the server has ended. Raises UserError, one line,
    for a server that is not ready within timeout_s seconds or refuses the requests.
    """

    async def ready() -> None:
        check_starting()
        await client.resume()  # a trainer killed during a weight sync left the server paused
        await client.get("/health", READY_S)

    await _succeeds(ready, client, timeout_s)


async def find_workers(client: ServerClient, timeout_s: float) -> list[str] | None:
    """Waits until a server answers, and if it is a router, until it has a worker that it calls healthy.

    Returns the URLs of the router's workers; None for a server that is not a router. Raises UserError, one
    line, for one that does not within timeout_s seconds or refuses the request.
    """

    async def found() -> list[str] | None:
        workers = await listed_workers(client, READY_S)
        healthy = [worker.url for worker in workers or () if worker.healthy]
        if workers is not None and not healthy:
            raise ServerUnavailable(client.url, PATH, "the router has no healthy worker")
        return healthy or None

    return await _succeeds(found, client, timeout_s)


async def _succeeds(
    attempt: Callable[[], Awaitable[Result]], client: ServerClient, timeout_s: float
) -> Result:
    """Returns the result of the first attempt that raises no ServerError; raises UserError as its callers."""
    end = time.monotonic() + timeout_s
    with waiting_for(f"rollout server {client.url}, at most {timeout_s:g} s"):
        while True:
            try:
                return await attempt()
            except ServerRefusal as refusal:
                raise UserError(str(refusal)) from refusal
            except ServerError as error:
                if time.monotonic() > end:
                    raise UserError(f"{error}; not ready within {timeout_s:g} s") from error
            await anyio.sleep(POLL_S)


async def check_model(client: ServerClient, hf_config: PretrainedConfig) -> None:
    """Raises UserError, one line, for a server of another architecture or vocabulary, or one that fails.

    The first weight sync checks the name and shape of every parameter.
    """
    try:
        info = await client.model_info()
        theirs, ours = info.get("architectures"), hf_config.architectures
        if theirs != ours:
            raise UserError(
                f"rollout server {client.url} serves {info['model_path']}, whose architecture is "
                f"{' '.join(map(str, theirs or ['unknown']))}; model.path has {' '.join(ours)}"
            )
        last = hf_config.vocab_size - 1
        if not await _is_token(client, last) or await _is_token(client, last + 1):
            raise UserError(
                f"rollout server {client.url} serves {info['model_path']}, whose vocabulary is not the "
                f"{hf_config.vocab_size} tokens of model.path"
            )
    except ServerError as error:
        raise UserError(str(error)) from error


async def check_memory_saver(client: ServerClient) -> None:
    """Raises UserError, one line, for a server on a GPU that cannot release its memory, or one that fails."""
    info = await _arguments(client)
    if info.get("device") != "cpu" and not info.get("enable_memory_saver"):
        raise UserError(
            f"rollout.colocate is true, but rollout server {client.url} was started without "
            "--enable-memory-saver and would keep its memory while the policy trains; start it with that "
            "argument"
        )


async def check_routing(client: ServerClient) -> None:
    """Raises UserError, one line, for a server that does not return its routing, or one that fails."""
    if not (await _arguments(client)).get("enable_return_routed_experts"):
        raise UserError(
            f"model.routing_replay is engine, but rollout server {client.url} was started without "
            f"{ROUTING_ARGUMENT} and returns no routing; start it with that argument"
        )


async def _arguments(client: ServerClient) -> dict[str, Any]:
    """Returns a server's arguments. Raises UserError for one that fails."""
    try:
        return await client.server_info()
    except ServerError as error:
        raise UserError(str(error)) from error


async def _make_idle(client: ServerClient) -> None:
    """Aborts all requests of a server and waits until it has none. Raises ServerError.

    A request that is aborted stays in the server's batch until that has been computed.
    """
    await client.pause("abort")
    end = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        try:
            return await client.flush_cache()  # refused as long as the server is not idle
        except ServerRefusal as refusal:
            if time.monotonic() > end:
                raise ServerUnavailable(
                    client.url, "/flush_cache", f"not idle within {IDLE_TIMEOUT_S:g} s: {refusal}"
                ) from refusal
        await anyio.sleep(POLL_S)


async def _is_token(client: ServerClient, token: int) -> bool:
    """Returns whether a token id is in the server's vocabulary.

    An unknown id as input would crash the server; as the key of a logit bias it is rejected.
    """
    sampling: dict[str, Any] = {"max_new_tokens": 1, "logit_bias": {str(token): 0.0}}
    try:
        await client.generate({"input_ids": [0], "sampling_params": sampling})
    except ServerRefusal as refusal:
        if "logit_bias" in str(refusal):
            return False
        raise
    return True


INITIAL = "default"
"""Weight version of a server that still has the weights that it started with"""
CHECK_EVERY_S = 1.0
"""Pause between two health checks of a server"""
ABORT_S = 5.0
"""Timeout for aborting the requests of an answer that is no longer needed"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Pauses between attempts at one request: the first, doubled each time, up to the longest"""


class RequestFailed(Exception):
    """No server answered a request. One line: the last reason."""


class RequestWithdrawn(Exception):
    """A request was cancelled because its server hangs. One line: the server and the failed check."""


class StaleWeights(Exception):
    """A server sampled with weights other than the accepted ones. One line: their version."""


class BadAnswer(Exception):
    """An answer that does not fit its request. One line: the mismatch."""


class Server:
    """One server, with this process's state of it."""

    def __init__(self, client: ServerClient, router: "Router | None" = None) -> None:
        """router: whose worker it is."""
        self.client = client
        self.router = router
        self.outstanding = 0
        """Samples that the server is generating for this process"""
        self.reason = ""
        """Reason for sending it no requests; empty if it is used"""
        self.gate = anyio.Semaphore(0)
        """Held by the health check during a check, and by the pool while it is paused"""
        self._running: set[anyio.CancelScope] = set()

    async def generate(self, body: dict[str, Any], timeout_s: float) -> Any:
        """Returns the answer to POST /generate. If cancelled, aborts the request on the server.

        Raises ServerError, or RequestWithdrawn if `withdraw` is called before the answer comes.
        """
        samples = len(body["input_ids"])
        self.outstanding += samples
        # new ids for each attempt: a server rejects the id of a request that is still running
        rid = uuid4().hex
        rids = [f"{rid}_{i}" for i in range(samples)]
        try:
            with anyio.CancelScope() as scope:
                self._running.add(scope)
                return await self.client.generate(self._named(body, rid, rids), timeout_s)
            # reached only if `withdraw` cancelled the scope, which swallows the cancellation
            raise RequestWithdrawn(self.reason)
        except anyio.get_cancelled_exc_class():
            await self._abort(rids)
            raise
        finally:
            self._running.discard(scope)
            self.outstanding -= samples

    def takes(self, body: dict[str, Any]) -> bool:
        """Returns whether a request is to be sent here, not through a router."""
        return self.router is None or bool(self.router.reason) or not self.router.takes(body)

    def load(self) -> float:
        """Returns the samples of this process that each server behind this one is generating."""
        return self.outstanding

    def is_asked(self) -> bool:
        """Returns whether requests of this process may be running here, or would be but for `reason`."""
        return bool(self.outstanding or self.reason or (self.router and self.router.is_asked()))

    def _named(self, body: dict[str, Any], rid: str, rids: list[str]) -> dict[str, Any]:
        return body | {"rid": rids}

    async def _abort(self, rids: list[str]) -> None:
        # a server that does not answer notices that the connection is closed
        with anyio.move_on_after(ABORT_S, shield=True), suppress(ServerError):
            for rid in rids:
                await self.client.abort(rid)

    def avoid(self, reason: str) -> None:
        """Sends the server no new requests."""
        if not self.reason:
            logger.warning("rollout server marked unhealthy: %s", reason)
        self.reason = reason

    def withdraw(self, reason: str) -> None:
        """Sends the server no new requests, and cancels its running ones, which `ask` sends to others."""
        self.avoid(reason)
        for scope in self._running:
            scope.cancel()

    def judge(self, reason: str) -> None:
        """Sends the server no new requests if there is a reason for it, else uses it."""
        if reason:
            self.avoid(reason)
        elif self.reason:
            logger.warning("rollout server healthy again: %s", self.client.url)
            self.reason = ""


class Router(Server):
    """An SGLang router. It balances a group as one request; its workers are servers of the pool, too."""

    def __init__(self, client: ServerClient) -> None:
        super().__init__(client)
        self.workers: list[Server] = []
        self.asked: set[str] = set()
        """URLs of the workers that the router sends requests to: it calls the others unhealthy"""
        self.needs_seeds = False
        """Whether a worker samples by the seeds of its requests, which the router does not pass on"""

    def takes(self, body: dict[str, Any]) -> bool:
        """As Server.takes: False for a request that the router would refuse, or not pass on whole."""
        return not self.needs_seeds and routed(body) is not None

    def unusable(self) -> str:
        """Returns the reason why one of the workers that the router asks cannot be used; empty if all can."""
        reasons = [each.reason for each in self.workers if each.reason and each.client.url in self.asked]
        if not self.asked:
            reasons = ["it has no healthy worker"]
        return f"router {self.client.url}: {reasons[0]}" if reasons else ""

    def load(self) -> float:
        """As Server.load."""
        return self.outstanding / max(1, len(self.workers))

    def _named(self, body: dict[str, Any], rid: str, rids: list[str]) -> dict[str, Any]:
        return routed(body) | {"rid": rid}  # the worker makes the same `rids` of it

    async def _abort(self, rids: list[str]) -> None:
        # the router has not said which worker has the request; the others ignore its ids
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(worker._abort(rids) for worker in self.workers))


class ServerPool:
    """The servers that this process sends requests to, and the event loop of their clients.

    Coroutine methods run in that loop; the others may be called from any other thread. A new pool is paused
    and expects the servers to have their initial weights; `resume` starts the health checks.
    """

    def __init__(
        self,
        urls: list[str],
        own: list[str],
        settings: SglangConfig,
        first: int = 0,
        spawned: list[SpawnedServer] | None = None,
        routers: Mapping[str, list[str]] | None = None,
        pause_mode: PauseMode = "abort",
    ) -> None:
        """urls: all servers and routers. own: those whose weights and memory this process manages; a router's
        are those of its workers.

        first: index of the server preferred among equally busy ones; processes should differ in it.
        spawned: server processes to end on `close`. routers: those of `urls`, with the URLs of their workers.
        pause_mode: what a weight sync makes of running requests.
        """
        routers = routers or {}
        self._settings = settings
        self._clients: list[ServerClient] = []
        self.servers: list[Server] = []
        for url in urls[first:] + urls[:first]:
            self.servers.append((Router if url in routers else Server)(self._client(url)))
        for router in self._routers():
            for url in routers[router.client.url]:
                router.workers.append(Server(self._client(url), router))
                router.asked.add(url)
            self.servers += router.workers
        self._own_urls = own
        self.own = [
            server.client
            for server in self.servers
            if self._is_own(server) and not isinstance(server, Router)
        ]
        self.pause_mode = pause_mode
        self._versions = [INITIAL]
        """Every version so far, in order; the last may be on its way to the servers"""
        self._held = 0
        """Index of `version` in them"""
        self._resent = 0
        self._stale = 0
        self._without_weights: set[ServerClient] = set()
        self._without_cache: set[ServerClient] = set()
        """Those of `own` whose memory is released"""
        self.on_stale: Callable[[ServerClient], Awaitable[str]] = self._no_weights
        """Called by the health check for one of `own` that lacks the current weights: sends them, or returns
        the reason why the server cannot be used. Set by the weight sync."""
        self._spawned = spawned or []
        self._loop = start_blocking_portal()
        self.portal = self._loop.__enter__()
        self._paused = True
        self._checks = self.portal.start_task_soon(self._check_health)

    def start(self, hf_config: PretrainedConfig, colocate: bool, routing: bool = False) -> None:
        """Waits until this process's own servers are ready and checks that they serve this model.

        colocate: they must be able to release their memory. routing: they must return their routing. Raises
        UserError, one line, for a server that does not start, serves another model or cannot do that, and on
        any process for a router's worker that it does not reach.
        """
        self._check = partial(_check_server, hf_config=hf_config, colocate=colocate, routing=routing)
        for router in self._routers():
            for worker in router.workers:
                self.portal.call(_reach, worker)
            if self.own and (routing or router.needs_seeds):
                logger.warning(
                    "router %s passes on neither seeds, which --enable-deterministic-inference needs, nor "
                    "routing: all requests go to its workers directly",
                    router.client.url,
                )
        for client in self.own:
            self.portal.call(wait_until_ready, client, self._settings.start_timeout_s, self._check_spawned)
            self.portal.call(self._check, client)
        for server in self._spawned:
            server.ready()

    @property
    def version(self) -> str:
        """Version of the weights that a server must have to be used."""
        return self._versions[self._held]

    @property
    def is_updating(self) -> bool:
        """Whether servers may have a newer version than `version`, or be about to get it."""
        return self._held < len(self._versions) - 1

    def pause(self) -> None:
        """Waits for running health checks and stops them, so that they do not disturb a weight sync."""
        if not self._paused:
            self.portal.call(self._acquire_gates)
        self._paused = True

    def resume(self) -> None:
        """Resumes the health checks."""
        if self._paused:
            self.portal.call(self._release_gates)
        self._paused = False

    def expect(self, version: str) -> None:
        """Announces a version before it is sent: servers generate with it before `hold` is called."""
        if version != self._versions[-1]:
            self._versions.append(version)

    def hold(self, version: str, failed: dict[str, str]) -> None:
        """Sets the weight version that all servers have except the failed ones, given as reasons by URL.

        What the failed ones are generating is asked of others.
        """
        self.expect(version)
        self._held = len(self._versions) - 1
        for server in self.servers:
            reason = failed.get(server.client.url, "")
            if reason and server.client in self.own:  # logged once, by the process that sent the weights
                logger.warning("rollout server marked unhealthy: %s", reason)
            server.reason = reason
            if reason:
                self.portal.call(server.withdraw, reason)
        for router in self._routers():
            router.reason = router.unusable()
            if router.reason:
                self.portal.call(router.withdraw, router.reason)

    async def ask(
        self, body: dict[str, Any], read: Callable[[Any, Collection[str]], Result], strict: bool = True
    ) -> Result:
        """Sends a request to the least busy server, on failure to others. Returns `read` of the answer.

        read: gets the answer and the weight versions that its tokens may have; raises StaleWeights or
        BadAnswer for an unusable answer. strict: only the version at the time of the request; else also those
        that came until the answer. Raises RequestFailed when all attempts of retry_timeout_s seconds have
        failed, or when a healthy server refuses the request.
        """
        attempts = Attempts(self._settings.retry_timeout_s)
        while True:
            await attempts.begin()
            usable = [server for server in self.servers if not server.reason and server.takes(body)]
            server = min(usable, key=lambda server: server.load(), default=None)
            if server is None:
                attempts.failed(f"no rollout server can be used: {self.reasons()}")
                continue
            held = self._held
            if self.pause_mode == "in_place":  # the server's cache has prefixes of older weights, too
                body = body | {"extra_key": self.version}
            try:
                answer = await server.generate(body, self._settings.request_timeout_s)
                return read(answer, self._versions[held : held + 1] if strict else self._versions[held:])
            except ServerRefusal as refusal:
                raise RequestFailed(str(refusal)) from refusal
            except (ServerUnavailable, RequestWithdrawn, StaleWeights, BadAnswer) as error:
                samples = len(body["input_ids"])
                self._resent += samples
                self._stale += samples if isinstance(error, StaleWeights) else 0
                names_server = isinstance(error, ServerError | RequestWithdrawn)
                reason = str(error) if names_server else f"{server.client.url}: {error}"
                server.avoid(reason)
                attempts.failed(reason, error)

    def reasons(self) -> str:
        """Returns the reasons why servers are not used."""
        return "; ".join(server.reason for server in self.servers if server.reason)

    def release_memory(self) -> None:
        """Frees the memory of this process's own servers; they then need new weights. Raises ServerError.

        Aborts their requests. No process may send them any until the weight sync after `take_weights`.
        """
        self.pause()
        for server in self.servers:
            server.reason = f"{server.client.url}: its memory was released; it needs new weights"
        self.portal.call(self._each_own, self._release)

    def take_weights(self) -> None:
        """Allocates the weights' memory again; a weight sync must fill it. Raises ServerError."""
        self.portal.call(self._each_own, self._take_weights)

    async def take_cache(self, client: ServerClient) -> None:
        """Allocates a server's other memory again, if it is released. Raises ServerError.

        Called after new weights were sent: their buckets take memory of the same GPU.
        """
        if client in self._without_cache:
            self._without_cache.discard(client)  # first: a server must not be asked twice
            await client.take_memory(CACHE)

    def take_memory(self) -> None:
        """Allocates all released memory again. Raises ServerError."""
        self.take_weights()
        self.portal.call(self._each_own, self.take_cache)

    def drain_counts(self) -> tuple[int, int]:
        """Returns (samples requested again, those of them rejected as stale) since the last call."""
        counts = self._resent, self._stale
        self._resent = self._stale = 0
        return counts

    def close(self) -> None:
        """Closes the connections and ends the servers that this process started."""
        self._checks.cancel()
        for client in self._clients:
            self.portal.call(client.aclose)
        self._loop.__exit__(None, None, None)
        for server in self._spawned:
            server.stop()

    def _check_spawned(self) -> None:
        for server in self._spawned:
            server.check_starting()

    async def _release(self, client: ServerClient) -> None:
        await _make_idle(client)
        await client.release_memory()
        self._without_weights.add(client)
        self._without_cache.add(client)

    async def _take_weights(self, client: ServerClient) -> None:
        if client not in self._without_weights:
            return
        self._without_weights.discard(client)
        if str((await client.model_info())["weight_version"]) == INITIAL:
            self._without_cache.discard(client)  # restarted meanwhile: it has all of its memory
        else:
            await client.take_memory(WEIGHTS)

    async def _each_own(self, act: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Runs `act` on all own servers at once. Raises the first error after all have ended."""
        outcomes = await asyncio.gather(*map(act, self.own), return_exceptions=True)
        for error in filter(None, outcomes):
            raise error

    async def _no_weights(self, client: ServerClient) -> str:
        return f"{client.url}: its weights are not of version {self.version}"

    def _client(self, url: str) -> ServerClient:
        client = ServerClient(url, _api_key(self._settings))
        self._clients.append(client)
        return client

    def _is_own(self, server: Server) -> bool:
        return (server.router or server).client.url in self._own_urls

    def _routers(self) -> list[Router]:
        return [server for server in self.servers if isinstance(server, Router)]

    async def _acquire_gates(self) -> None:
        for router in self._routers():
            await router.gate.acquire()
            with suppress(ServerError):  # the next health check finds it, too
                await self._list_workers(router)  # a late worker gets the weights of this sync
        for server in self.servers:
            if not isinstance(server, Router):
                await server.gate.acquire()

    def _release_gates(self) -> None:
        for server in self.servers:
            server.gate.release()

    async def _check_health(self) -> None:
        async with anyio.create_task_group() as self._looking:
            for server in self.servers:
                self._looking.start_soon(self._look_often, server)

    async def _look_often(self, server: Server) -> None:
        while server in self.servers:
            async with server.gate:
                # an own server is checked even when idle: other processes may wait for its weights
                if server.is_asked() or self._is_own(server):
                    await (self._look_at_router if isinstance(server, Router) else self._look)(server)
            await anyio.sleep(CHECK_EVERY_S)

    async def _look(self, server: Server) -> None:
        """Cancels the requests of a server that hangs; uses one again that is healthy and up to date."""
        client, seconds = server.client, self._settings.health_timeout_s
        if server.is_asked():
            try:
                await client.get("/health", seconds)
            except ServerError as error:
                reason = f"{client.url}: /health did not succeed within {seconds:g} s"
                hangs = not isinstance(error, ConnectionBroken)
                # a router answers for a worker whose connections break, but waits for one that hangs
                if hangs and server.router and client.url in server.router.asked:
                    server.router.withdraw(reason)
                return server.withdraw(reason)
        try:
            found = str((await client.model_info())["weight_version"])
            reason = ""
            if found != self.version:
                restore = self.on_stale if client in self.own else self._no_weights
                reason = await restore(client)
        except ServerError as error:
            reason = str(error)
        server.judge(reason)

    async def _look_at_router(self, router: Router) -> None:
        """Uses a router as long as all workers that it asks are healthy and up to date."""
        try:
            await self._list_workers(router)
        except ServerError as error:
            return router.withdraw(str(error))
        router.judge(router.unusable())

    async def _list_workers(self, router: Router) -> None:
        """Adds and removes the workers that have joined and left a router. Raises ServerError."""
        listed = await listed_workers(router.client, self._settings.health_timeout_s) or []
        for worker in router.workers.copy():
            if worker.client.url not in (each.url for each in listed):
                logger.info("%s has left the router %s", worker.client.url, router.client.url)
                router.workers.remove(worker)
                self.servers.remove(worker)
                self.own = [client for client in self.own if client is not worker.client]
        router.asked = {each.url for each in listed if each.healthy}
        for url in sorted(router.asked - {worker.client.url for worker in router.workers}):
            await self._add_worker(router, url)

    async def _add_worker(self, router: Router, url: str) -> None:
        """Adds a worker that has joined a router; the health check decides when it is used."""
        worker = Server(self._client(url), router)
        worker.reason = f"{url} has joined the router {router.client.url}"
        logger.info(worker.reason)
        try:
            await _reach(worker)
            if self._is_own(worker):
                await self._check(worker.client)
                self.own.append(worker.client)
        except UserError as error:
            worker.reason = str(error)
        worker.gate.release()
        router.workers.append(worker)
        self.servers.append(worker)
        self._looking.start_soon(self._look_often, worker)


async def _check_server(
    client: ServerClient, hf_config: PretrainedConfig, colocate: bool, routing: bool
) -> None:
    """Raises UserError, one line, for a server that cannot serve this run."""
    await check_model(client, hf_config)
    if colocate:
        await check_memory_saver(client)
    if routing:
        await check_routing(client)


async def _reach(worker: Server) -> None:
    """Raises UserError, one line, for a worker of a router that this process does not reach."""
    try:
        info = await worker.client.server_info()
    except ServerError as error:
        raise UserError(
            f"router {worker.router.client.url} has the worker {worker.client.url}, which the trainer must "
            f"reach, too, to send it weights: {error}"
        ) from error
    worker.router.needs_seeds |= bool(info.get("enable_deterministic_inference"))


def start_servers(config: Config, hf_config: PretrainedConfig) -> ServerPool:
    """Starts the servers, or connects to those of rollout.sglang.servers, and waits for them. Collective.

    Every process sends requests to all servers that it can reach. A server's weights and memory are managed
    by one process: the first if the servers were attached, else the first of its node, which started it.
    Raises UserError, one line and on every process, for a server that does not start or serves another model.
    """
    rollout = config.rollout
    spawned: list[SpawnedServer] = []
    if rollout.launch == "spawn" and device.local_rank() == 0:
        spawned = [SpawnedServer(config, index) for index in range(rollout.sglang.servers_per_node)]
    urls, own = _urls(rollout, spawned)
    routers = _attached_routers(rollout.sglang) if rollout.launch == "attach" else {}
    first = dist.get_rank() % len(urls)
    pool = ServerPool(urls, own, rollout.sglang, first, spawned, routers, pause_mode(rollout))
    try:
        with raised_on_all_ranks(UserError):
            pool.start(hf_config, rollout.colocate, config.model.routing_replay == "engine")
    except BaseException:
        pool.close()
        raise
    return pool


def _urls(rollout: RolloutConfig, spawned: list[SpawnedServer]) -> tuple[list[str], list[str]]:
    """Returns (URLs of all servers that this process can reach, URLs of its own servers). Collective."""
    if rollout.launch == "attach":
        urls = server_urls(rollout.sglang.servers)
        return urls, urls if dist.get_rank() == 0 else []
    own = [server.url for server in spawned]
    nodes = gathered((device.node_rank(), own))
    on_loopback = ipaddress.ip_address(rollout.sglang.host).is_loopback
    reachable = (urls for node, urls in nodes if not on_loopback or node == device.node_rank())
    return [url for urls in reachable for url in urls], own


def _attached_routers(settings: SglangConfig) -> dict[str, list[str]]:
    """Returns the routers of rollout.sglang.servers, with the URLs of their workers. Collective.

    Raises UserError, one line and on every process, for a URL that does not answer, and for a server that
    is named twice.
    """
    routers: dict[str, list[str]] = {}
    with raised_on_all_ranks(UserError):
        if dist.get_rank() == 0:
            routers = anyio.run(_routers, settings)
    return gathered(routers)[0]


async def _routers(settings: SglangConfig) -> dict[str, list[str]]:
    clients = [ServerClient(url, _api_key(settings)) for url in server_urls(settings.servers)]
    found = await asyncio.gather(*(find_workers(client, settings.start_timeout_s) for client in clients))
    named = {client.url: "by itself" for client in clients}
    for client, workers in zip(clients, found, strict=True):
        await client.aclose()
        for url in workers or ():
            if url in named:
                raise UserError(
                    f"rollout.sglang.servers has {url} twice, {named[url]} and as a worker of the router "
                    f"{client.url}; name it once"
                )
            named[url] = f"as a worker of the router {client.url}"
        if workers:
            logger.info("router %s with %d workers: %s", client.url, len(workers), ", ".join(workers))
    return {client.url: workers for client, workers in zip(clients, found, strict=True) if workers}


def _api_key(settings: SglangConfig) -> str | None:
    return os.environ.get(settings.api_key_variable) if settings.api_key_variable else None


class Attempts:
    """Paces the attempts at one request and decides when to give up."""

    def __init__(self, retry_timeout_s: float) -> None:
        self._retry_s = retry_timeout_s
        self._begun = 0.0
        self._failing_since: float | None = None
        self._pause_s = 0.0

    async def begin(self) -> None:
        """Waits before every attempt but the first."""
        await anyio.sleep(self._pause_s)
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._begun = time.monotonic()

    def failed(self, reason: str, cause: Exception | None = None) -> None:
        """Raises RequestFailed with this reason if retry_timeout_s seconds of failures have passed.

        After an attempt that ran longer than that, the time restarts: the server was working, not failing.
        """
        now = time.monotonic()
        if self._failing_since is None or now - self._begun > self._retry_s:
            self._failing_since = now
        if now - self._failing_since > self._retry_s:
            raise RequestFailed(
                f"no answer after {self._retry_s:g} s of attempts; the last: {reason}"
            ) from cause
