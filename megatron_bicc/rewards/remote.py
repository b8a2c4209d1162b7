"""Scores responses by HTTP: a client of a server that answers JSON, with retries and bounds."""

import asyncio
import json
from typing import Any

import httpx2 as httpx

from megatron_bicc.rewards.types import Completion

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
"""Seconds before the first retry; each later wait is twice the one before, up to the longest"""
CONNECT_TIMEOUT_S = 10.0
QUOTED_CHARACTERS = 200
"""Most characters of an answer that an error quotes"""


class RewardServerError(Exception):
    """A reward server did not give a usable answer. One line: URL and why."""


class RewardServer:
    """Posts JSON to one URL. Used within one event loop."""

    def __init__(self, url: str, timeout_s: float = 60.0, retries: int = 3, concurrency: int = 16) -> None:
        """timeout_s: of one attempt, the connection included. retries: attempts after the first.

        concurrency: most requests in flight; further ones wait, and their time has not begun.
        """
        self.url, self._timeout_s, self._retries = url, timeout_s, retries
        self._slots = asyncio.Semaphore(concurrency)
        self._http: httpx.AsyncClient | None = None

    async def post(self, body: Any) -> Any:
        """Returns the decoded answer to a POST of JSON.

        Repeats the request after a connection that fails or closes, an attempt out of time, HTTP 429 and
        5xx: the server must accept the same request twice. Raises RewardServerError after the last attempt,
        and at once for any other status and for an answer that is not JSON.
        """
        async with self._slots:
            wait_s = FIRST_WAIT_S
            for left in range(self._retries, -1, -1):
                problem, answer = await self._attempt(body)
                if not problem:
                    return self._decoded(answer)
                if left:
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise RewardServerError(f"{self.url}: {problem}, after {self._retries + 1} attempts")

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _attempt(self, body: Any) -> tuple[str, httpx.Response | None]:
        """Returns (why a retry may help, or empty; the answer)."""
        if self._http is None:  # in the event loop that uses it
            # HTTP_PROXY is ignored: the traffic stays inside the cluster
            self._http = httpx.AsyncClient(trust_env=False, timeout=None)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._http.post(
                    self.url,
                    content=json.dumps(body, default=str),
                    headers={"Content-Type": "application/json"},
                )
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s", None
        except httpx.RequestError as error:
            return f"{type(error).__name__}: {str(error) or 'the connection was closed'}", None
        if answer.status_code == 429 or answer.status_code >= 500:
            return f"HTTP {answer.status_code}: {_quoted(answer.text)}", None
        return "", answer

    def _decoded(self, answer: httpx.Response) -> Any:
        if not answer.is_success:
            raise RewardServerError(f"{self.url}: HTTP {answer.status_code}: {_quoted(answer.text)}")
        try:
            return json.loads(answer.content)
        except (ValueError, RecursionError):
            raise RewardServerError(f"{self.url}: the answer is not JSON: {_quoted(answer.text)}") from None


def _quoted(text: str) -> str:
    return " ".join(text.split())[:QUOTED_CHARACTERS] or "no text"


class Remote:
    """The function of reward.function=remote: sends the responses to a prompt to reward.url, in batches."""

    def __init__(self, server: RewardServer, batch_size: int) -> None:
        self._server, self._batch_size = server, batch_size

    async def __call__(self, completions: list[Completion]) -> list[Any]:
        """Returns the scores as the server gives them (docs/rewards.md)."""
        size = self._batch_size
        batches = [completions[i : i + size] for i in range(0, len(completions), size)]
        return [each for scores in await asyncio.gather(*map(self._scores, batches)) for each in scores]

    async def _scores(self, completions: list[Completion]) -> list[Any]:
        answer = await self._server.post({"completions": [_sent(each) for each in completions]})
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise RewardServerError(
                f"{self._server.url}: {_quoted(json.dumps(answer))} has no list 'scores' of "
                f"{len(completions)}, one per completion"
            )
        return scores

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._server.aclose()


def _sent(completion: Completion) -> dict[str, Any]:
    return vars(completion) | {"token_ids": completion.token_ids.tolist()}
