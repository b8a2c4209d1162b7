"""SGLang servers while they take new weights: paused, updated, named by a version, and let go on."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from megatron_bicc.rollout.sglang.client import ServerClient, ServerError, ServerRefusal

INCOMPLETE = "incomplete"
"""Weight version of a server whose weights are not known to be one version's"""
GIVE_UP_S = 10.0
"""Seconds that a call to a server that has failed may take"""
Result = TypeVar("Result")


class Run(Protocol):
    """Runs a coroutine function in the event loop that the servers' clients live in, and waits for it."""

    def __call__(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Result: ...


class Session:
    """A server between `open` and `close` or `give_up`.

    From `open` on it generates nothing and calls its weights incomplete, so that nobody takes a sample of
    mixed weights for a good one, even if this process ends before the sync does.
    """

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        """timeout_s: seconds that one call may take."""
        self.client = client
        self.timeout_s = timeout_s
        self.info: dict[str, Any] = {}
        """The server's arguments"""
        self.paths: set[str] = set()
        """What it can be asked for"""
        self.version = ""
        """Weight version that it had before"""
        self.error: ServerError | None = None
        """Why it does not get the weights; it takes no further part in the sync"""
        self._brackets = False

    @property
    def tensor_parallel(self) -> int:
        """The server's tensor-parallel size."""
        return int(self.info["tp_size"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the server's weights; if it does not say, the coarsest."""
        return getattr(torch, self.info["dtype"], torch.bfloat16)

    async def open(self, brackets: bool) -> None:
        """Pauses the server; running requests are aborted: no sequence is to be of two versions.

        brackets: whether begin and end must stand around the updates; servers before 0.5.21 have neither.
        Raises ServerError.
        """
        self.info = await self.client.server_info()
        self.paths = await self.client.paths()
        self.version = str((await self.client.model_info())["weight_version"])
        await self.client.pause("abort")
        await self._name(INCOMPLETE)
        self._brackets = brackets and "/begin_weight_update" in self.paths
        if self._brackets:
            await self._begin()

    async def _begin(self) -> None:
        try:
            await self.post("/begin_weight_update", {"selector": "all"})
        except ServerRefusal:  # a trainer that was killed left its session open
            await self.post("/end_weight_update", {})
            await self.post("/begin_weight_update", {"selector": "all"})

    async def end(self) -> None:
        """All weights have come: forgets the cache of the old ones. Raises ServerError."""
        if self._brackets:
            await self.post("/end_weight_update", {})
            self._brackets = False
        await self.client.flush_cache()

    async def close(self, version: int) -> None:
        """Names the weights and lets the server generate again. Raises ServerError."""
        await self._name(str(version))
        await self.client.resume()

    async def give_up(self) -> None:
        """After an error: lets the server generate if it can, its weights called incomplete."""
        for path in (
            ("/end_weight_update", "/continue_generation") if self._brackets else ("/continue_generation",)
        ):
            with contextlib.suppress(ServerError):
                await self.client.post(path, {}, GIVE_UP_S)

    async def post(self, path: str, body: dict[str, Any] | Sequence[bytes]) -> Any:
        """The server's answer within the sync's time. Raises ServerError."""
        return await self.client.post(path, body, self.timeout_s)

    async def _name(self, version: str) -> None:
        await self.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


class Sessions:
    """The servers of one process in one sync. What is asked of them is asked of all at once."""

    def __init__(self, clients: Sequence[ServerClient], timeout_s: float, run: Run) -> None:
        self._sessions = [Session(client, timeout_s) for client in clients]
        self.run = run

    def live(self) -> list[Session]:
        """Those that still take part."""
        return [session for session in self._sessions if session.error is None]

    def each(self, act: Callable[[Session], Awaitable[Result]]) -> list[Result]:
        """Does it with every live server; one that raises ServerError takes no further part.

        Returns what came of the others.
        """
        live = self.live()
        outcomes = self.run(_outcomes, [act(session) for session in live])
        for session, outcome in zip(live, outcomes, strict=True):
            if isinstance(outcome, ServerError):
                session.error = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, ServerError)]

    def give_up(self, everything: bool) -> None:
        """Lets those go on that failed, or all."""
        lost = [session for session in self._sessions if everything or session.error]
        self.run(_outcomes, [session.give_up() for session in lost])

    def failed(self) -> dict[str, str]:
        """The reasons, by URL."""
        return {s.client.url: str(s.error) for s in self._sessions if s.error}


async def _outcomes(acts: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*acts, return_exceptions=True)
