"""HTTP client of one SGLang server. Failures are of two kinds: retry elsewhere, or give up."""

import json
from typing import Any, Literal

import httpx2 as httpx

CONNECT_TIMEOUT_S = 10.0
WEIGHTS, CACHE = ("weights",), ("kv_cache", "cuda_graph")
"""SGLang's names of the memory that a server releases: the weights, and the rest"""
QUOTED_CHARACTERS = 300
"""Most characters of a server's answer that an error quotes"""


class ServerError(Exception):
    """A request to a server failed. One line: URL, path, and the server's answer."""

    def __init__(self, url: str, path: str, reason: str) -> None:
        super().__init__(f"SGLang server {url}{path}: {' '.join(reason.split())[:QUOTED_CHARACTERS]}")
        self.url = url


class ServerUnavailable(ServerError):
    """No usable answer: no connection, a timeout, HTTP 5xx, a truncated answer. A retry may succeed."""


class NotSglang(ServerUnavailable):
    """The answer is not one of an SGLang server."""

    def __init__(self, url: str, path: str, answer: Any) -> None:
        super().__init__(url, path, "")
        quoted = " ".join(str(answer).split())[:QUOTED_CHARACTERS]
        self.args = (f"{url} is not an SGLang server: {path} answered {quoted or 'nothing'}",)


class ConnectionBroken(ServerUnavailable):
    """The connection failed, or closed before the answer."""


class ServerRefusal(ServerError):
    """HTTP 4xx, or `success: false`: a healthy server refuses this request, so a retry is useless."""


class ServerClient:
    """Client of one server. Used within one event loop; `aclose` closes its connections."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        """url: http://host:port. api_key: sent as a bearer token, never logged.

        timeout_s: default timeout of a request in seconds.
        """
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # The caller bounds the requests in flight. The server closes idle connections after 5 s; expiring
            # ours earlier keeps a new request off a connection that is being closed.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            # ignore HTTP_PROXY: the traffic stays inside the cluster
            trust_env=False,
        )

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        """Returns the decoded answer to GET. Raises ServerUnavailable or ServerRefusal."""
        try:
            return await self._ask("GET", path, None, timeout_s)
        except ConnectionBroken:
            # a GET has no effect, so it is safe to repeat when the server closed an idle connection just now
            return await self._ask("GET", path, None, timeout_s)

    async def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """Returns the decoded answer to a POST of JSON.

        Raises ServerUnavailable or ServerRefusal, the latter also for an answer with `success: false`.
        """
        answer = await self._ask("POST", path, body, timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusal(self.url, path, str(answer.get("message") or answer))
        return answer

    async def generate(self, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """Sends POST /generate. Returns {output_ids, meta_info}, or a list of them for batched input."""
        return await self.post("/generate", body, timeout_s)

    async def abort(self, rid: str) -> None:
        """Aborts the request with this id; does nothing if there is none."""
        await self.post("/abort_request", {"rid": rid})

    async def model_info(self) -> dict[str, Any]:
        """Returns model_path, weight_version and more. Raises ServerError, like the calls below."""
        kinds = {"model_path": str, "weight_version": (str, int), "architectures": (list, type(None))}
        return await self._described("/model_info", kinds)

    async def server_info(self) -> dict[str, Any]:
        """Returns the server's arguments and state."""
        return await self._described("/server_info", {})

    async def paths(self) -> set[str]:
        """Returns the server's HTTP paths; they differ between SGLang versions."""
        return set((await self._described("/openapi.json", {"paths": dict}))["paths"])

    async def flush_cache(self) -> None:
        """Drops cached prefixes. The server refuses while requests are running."""
        await self.post("/flush_cache", {})

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Stops generation; `mode` decides what happens to unfinished requests."""
        await self.post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Resumes generation after `pause`."""
        await self.post("/continue_generation", {})

    async def release_memory(self) -> None:
        """Frees the memory of weights, cache and CUDA graphs. A server that is not idle ends."""
        await self.post("/release_memory_occupation", {})

    async def take_memory(self, tags: tuple[str, ...]) -> None:
        """Allocates released memory again; weights in it are undefined until the next update.

        tags: kinds of memory, of WEIGHTS and CACHE. A server that has not released them ends.
        """
        await self.post("/resume_memory_occupation", {"tags": list(tags)})

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def _described(self, path: str, kinds: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to GET, a JSON object whose entries have these types. Raises NotSglang."""
        answer = await self.get(path)
        if not isinstance(answer, dict):
            raise NotSglang(self.url, path, answer)
        if not all(isinstance(answer.get(name), kind) for name, kind in kinds.items()):
            raise NotSglang(self.url, path, answer)
        return answer

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None) -> Any:
        timeout = httpx.Timeout(timeout_s or self.timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            response = await self._http.request(method, self.url + path, timeout=timeout, json=body)
        except httpx.TimeoutException as error:
            reason = f"no answer within {timeout_s or self.timeout_s:g} s"
            raise ServerUnavailable(self.url, path, reason) from error
        except httpx.RequestError as error:
            reason = self._masked(str(error)) or "the connection was closed"
            # The cause's text may quote the API key, and a traceback would print it.
            raise ConnectionBroken(self.url, path, f"{type(error).__name__}: {reason}") from None
        return self._decoded(path, response)

    def _masked(self, text: str) -> str:
        """Returns `text` without the API key: some servers quote a header that they reject."""
        # the key is stored in the headers only, whose repr masks it
        key = self._http.headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text

    def _decoded(self, path: str, response: httpx.Response) -> Any:
        if not response.is_success:
            kind = ServerUnavailable if response.status_code >= 500 else ServerRefusal
            text = self._masked(response.text) or "no text"
            raise kind(self.url, path, f"HTTP {response.status_code}: {text}")
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            # no cause: a JSONDecodeError holds the whole answer, which may repeat the API key
            text = self._masked(response.text)
            raise ServerUnavailable(self.url, path, f"the answer is not JSON: {text}") from None
