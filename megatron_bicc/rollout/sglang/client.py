"""HTTP to one SGLang server: its answers as Python values, its failures as two kinds of error."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import httpx2 as httpx

CONNECT_TIMEOUT_S = 10.0
QUOTED_CHARACTERS = 300
"""Of what a server said, in an error."""


class ServerError(Exception):
    """A server did not do what it was asked for. One line: URL, path, and what it said."""

    def __init__(self, url: str, path: str, reason: str) -> None:
        super().__init__(f"SGLang server {url}{path}: {' '.join(reason.split())[:QUOTED_CHARACTERS]}")
        self.url = url


class ServerUnavailable(ServerError):
    """No usable answer: no connection, time run out, HTTP 5xx, an answer that breaks off. Another server, or
    the same one later, may do better."""


class NotSglang(ServerUnavailable):
    """An answer that no SGLang server gives."""

    def __init__(self, url: str, path: str, answer: Any) -> None:
        super().__init__(url, path, "")
        said = " ".join(str(answer).split())[:QUOTED_CHARACTERS]
        self.args = (f"{url} is no SGLang server: {path} answered {said or 'nothing'}",)


class ConnectionBroken(ServerUnavailable):
    """No connection, or one that ended before the answer."""


class ServerRefusal(ServerError):
    """HTTP 4xx, or `success: false`: the server is well and says no to this request."""


class ServerClient:
    """One server. Used within one event loop; `aclose` ends its connections."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        """url: http://host:port. api_key: sent as a bearer token, told to nobody else.

        timeout_s: seconds to wait for an answer where a call does not say otherwise.
        """
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # the caller bounds the requests in flight; the server closes idle connections after 5 s, and a
            # request must not meet it at that
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            # a proxy of the environment is for the world outside
            trust_env=False,
        )

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        """The answer to GET, decoded. Raises ServerUnavailable or ServerRefusal."""
        try:
            return await self._ask("GET", path, None, timeout_s)
        except ConnectionBroken:
            # on a busy machine the server may close an idle connection as it is used again
            return await self._ask("GET", path, None, timeout_s)

    async def post(
        self, path: str, body: dict[str, Any] | Sequence[bytes], timeout_s: float | None = None
    ) -> Any:
        """The answer to a POST of JSON, decoded; a large body comes as the parts of its text.

        Raises ServerUnavailable or ServerRefusal, the latter also for an answer that carries
        `success: false`.
        """
        answer = await self._ask("POST", path, body, timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusal(self.url, path, str(answer.get("message") or answer))
        return answer

    async def generate(self, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """POST /generate: {output_ids, meta_info}, a list of them for batched input."""
        return await self.post("/generate", body, timeout_s)

    async def abort(self, rid: str) -> None:
        """Ends the request with this id; nothing happens if there is none."""
        await self.post("/abort_request", {"rid": rid})

    async def model_info(self) -> dict[str, Any]:
        """model_path, weight_version, ... Raises ServerUnavailable or ServerRefusal, as those below."""
        kinds = {"model_path": str, "weight_version": (str, int), "architectures": (list, type(None))}
        return await self._described("/model_info", kinds)

    async def server_info(self) -> dict[str, Any]:
        """The server's arguments and state."""
        return await self._described("/server_info", {})

    async def paths(self) -> set[str]:
        """What the server can be asked for: SGLang's versions differ in it."""
        return set((await self._described("/openapi.json", {"paths": dict}))["paths"])

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether the server answers within timeout_s that it can serve."""
        try:
            await self.get("/health", timeout_s)
        except ServerError:
            return False
        return True

    async def flush_cache(self) -> None:
        """Forgets cached prefixes. Refused while requests run."""
        await self.post("/flush_cache", {})

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Stops generation; what becomes of unfinished requests is the mode."""
        await self.post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Goes on generating after `pause`."""
        await self.post("/continue_generation", {})

    async def release_memory(self) -> None:
        """Gives back the memory of weights and cache. The server must be idle."""
        await self.post("/release_memory_occupation", {})

    async def take_memory(self) -> None:
        """Takes the memory back; the weights in it are undefined until the next update."""
        await self.post("/resume_memory_occupation", {})

    async def aclose(self) -> None:
        """Closes every connection."""
        await self._http.aclose()

    async def _described(self, path: str, kinds: dict[str, Any]) -> dict[str, Any]:
        """The answer to GET: an object whose entries are of these kinds."""
        answer = await self.get(path)
        if not isinstance(answer, dict):
            raise NotSglang(self.url, path, answer)
        if not all(isinstance(answer.get(name), kind) for name, kind in kinds.items()):
            raise NotSglang(self.url, path, answer)
        return answer

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | Sequence[bytes] | None, timeout_s: float | None
    ) -> Any:
        sent: dict[str, Any] = {"json": body}
        if body is not None and not isinstance(body, dict):
            sent = {"content": _parts(body), "headers": {"Content-Type": "application/json"}}
        timeout = httpx.Timeout(timeout_s or self.timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            response = await self._http.request(method, self.url + path, timeout=timeout, **sent)
        except httpx.TimeoutException:
            reason = f"no answer within {timeout_s or self.timeout_s:g} s"
            raise ServerUnavailable(self.url, path, reason) from None
        except httpx.RequestError as error:
            reason = self._masked(str(error)) or "the connection broke off"
            raise ConnectionBroken(self.url, path, f"{type(error).__name__}: {reason}") from None
        return self._decoded(path, response)

    def _masked(self, text: str) -> str:
        """What a server said, without the key: some servers repeat the header that they refuse."""
        # kept in the headers alone, which do not show it when they are printed
        key = self._http.headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text

    def _decoded(self, path: str, response: httpx.Response) -> Any:
        text = self._masked(response.text)
        said = f"HTTP {response.status_code}: {text or 'no text'}"
        if response.status_code >= 500:
            raise ServerUnavailable(self.url, path, said)
        if not response.is_success:
            raise ServerRefusal(self.url, path, said)
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise ServerUnavailable(self.url, path, f"an answer that is no JSON: {text}") from None


async def _parts(text: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in text:
        yield part
