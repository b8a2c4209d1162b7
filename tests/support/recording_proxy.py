"""A proxy before a real SGLang server that knows what rollouts were asked for, and of which weights."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from megatron_bicc.sglang.client import ServerClient
from support.proxy import Proxy


class Asked(NamedTuple):
    """A request for the rollouts of a prompt. Equal ones are to be answered alike."""

    prompts: str
    """Token ids, as JSON"""
    sampling: str
    """Sampling parameters, seeds among them, as JSON"""
    version: str
    """Weight version that the server was last told"""
    weights: str
    """The server's own checksums of the weights that it had then"""


class RecordingProxy(Proxy):
    """Passes everything on. With `replay` a request that it has seen before gets the answer of that time."""

    def __init__(self, url: str, replay: bool) -> None:
        super().__init__(url)
        self.asked: list[Asked] = []
        """Every request for rollouts, in the order in which they came"""
        self.said: dict[Asked, bytes] = {}
        """With `replay`: the answers, HTTP with its headers"""
        self.requests: Counter[str] = Counter()
        """By path"""
        self._client, self._replay = ServerClient(url), replay
        self._version, self._weights = "", ""
        self._trap: tuple[str, str, Callable[[], object]] | None = None
        self._left = 0

    def trap(self, path: str, version: str, nth: int, act: Callable[[], object]) -> None:
        """Acts once: before the nth request from now, to this path while the weights are of this version, is
        passed on."""
        self._trap, self._left = (path, version, act), nth

    def drain(self) -> list[Asked]:
        """What was asked for since the last call."""
        asked, self.asked = self.asked, []
        return asked

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """That of the first time, where there was one."""
        body = request.partition(b"\r\n\r\n")[2]
        if path == "/update_weight_version":
            await self._named(json.loads(body)["new_version"])
        if path == "/generate" and not _is_rollout(body):
            return None
        self.requests[path] += 1
        if path != "/generate":
            await self._spring(path)
            return None
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

    async def _spring(self, path: str) -> None:
        if self._trap is None or self._trap[:2] != (path, self._version):
            return
        self._left -= 1
        if self._left == 0:
            await asyncio.to_thread(self._trap[2])

    async def _replayed(self, key: Asked, request: bytes) -> bytes:
        if key not in self.said:
            self.said[key] = await self.ask(request)
        return self.said[key]


def _is_rollout(body: bytes) -> bool:
    """Whether the engine sent it, which names its requests, and not the start-up or a weight sync's check."""
    return "rid" in json.loads(body)
