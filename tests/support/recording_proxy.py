"""A proxy of a real SGLang server that records the rollout requests and the server's weights at each."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from megatron_bicc.sglang.client import ServerClient
from support.proxy import Proxy


class Asked(NamedTuple):
    """A request for the rollouts of a prompt. Equal requests must get equal answers."""

    prompts: str
    """Token ids, as JSON"""
    sampling: str
    """Sampling parameters, seeds among them, as JSON"""
    version: str
    """Weight version that was last set on the server"""
    weights: str
    """The server's own checksums of its weights at that time"""


class RecordingProxy(Proxy):
    """Forwards everything. With `replay` a repeated request gets the recorded answer."""

    def __init__(self, url: str, replay: bool) -> None:
        super().__init__(url)
        self.asked: list[Asked] = []
        """All requests for rollouts, in order of arrival"""
        self.said: dict[Asked, bytes] = {}
        """With `replay`: recorded answers, HTTP with headers"""
        self.requests: Counter[str] = Counter()
        """Number of requests by path"""
        self._client, self._replay = ServerClient(url), replay
        self._version, self._weights = "", ""
        self._trap: tuple[str, str, Callable[[], object]] | None = None
        self._left = 0

    def trap(self, path: str, version: str, nth: int, act: Callable[[], object]) -> None:
        """Calls `act` once, just before it forwards the nth request from now to this path at this weight
        version. A request with weights is not forwarded then: the memory that it names ends with a trainer
        that `act` kills, and SGLang ends if it cannot open it."""
        self._trap, self._left = (path, version, act), nth

    def drain(self) -> list[Asked]:
        """Returns the requests since the last call."""
        asked, self.asked = self.asked, []
        return asked

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """Records the request; with `replay`, returns the recorded answer."""
        body = request.partition(b"\r\n\r\n")[2]
        if path == "/update_weight_version":
            await self._named(json.loads(body)["new_version"])
        if path == "/generate" and not _is_rollout(body):
            return None
        self.requests[path] += 1
        if path != "/generate":
            return b"" if await self._spring(path) else None
        key = self._key(json.loads(body))
        self.asked.append(key)
        await self._spring(path)
        return await self._replayed(key, request) if self._replay else None

    async def _named(self, version: str) -> None:
        checksums = await self._client.post("/weights_checker", {"action": "checksum"})
        self._weights = json.dumps([rank["checksums"] for rank in checksums["ranks"]], sort_keys=True)
        self._version = version

    def _key(self, body: dict) -> Asked:
        prompts, sampling = (
            json.dumps(body[name], sort_keys=True) for name in ("input_ids", "sampling_params")
        )
        return Asked(prompts, sampling, self._version, self._weights)

    async def _spring(self, path: str) -> bool:
        """Returns whether this request was the trap's."""
        if self._trap is None or self._trap[:2] != (path, self._version):
            return False
        self._left -= 1
        if self._left == 0:
            await asyncio.to_thread(self._trap[2])
        return self._left == 0

    async def _replayed(self, key: Asked, request: bytes) -> bytes:
        if key not in self.said:
            self.said[key] = await self.ask(request)
        return self.said[key]


def _is_rollout(body: bytes) -> bool:
    """Returns whether the engine sent it: start-up and weight sync do not set request ids."""
    return "rid" in json.loads(body)
