"""What an SGLang server is asked for a group of samples, and what its answer says.

HTTP to one SGLang server: its answers as Python values, its failures as two kinds of error.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import httpx2 as httpx
import numpy as np

from megatron_bicc.rollout.types import Request, Sample, Sampling

LEAST_LOG_PROB = float(np.finfo(np.float32).min)
LOG_PROB_ROUNDING = 1e-3
"""By which the log of a probability of 1 may come out above 0."""


class StaleWeights(Exception):
    """A server sampled with other weights than asked for. One line: which."""


class BadAnswer(Exception):
    """A server's answer is not what was asked for. One line: what is wrong with it."""


def generate_body(requests: list[Request], sampling: Sampling, ends: tuple[int, ...]) -> dict[str, Any]:
    """The JSON of POST /generate for requests of one prompt. ends: ids of the tokens that end a response.

    The whole distribution is sampled: what a server or a model's generation_config would cut off by default
    is switched off by name, as log-probs are not renormalised for it.
    """
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(ends),
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
    }
    return {
        "input_ids": [request.token_ids.tolist() for request in requests],
        "sampling_params": [settings | {"sampling_seed": request.seed} for request in requests],
        "return_logprob": True,
        "logprob_start_len": -1,
    }


def read_samples(
    answer: Any, count: int, version: str, vocab_size: int, ends: tuple[int, ...]
) -> list[Sample]:
    """The samples in an answer to `generate_body` of `count` requests.

    Raises StaleWeights if a sample is not of weight version `version` from its first token to its last, and
    BadAnswer if the answer is not whole, a token is no token of the policy, or a sample stopped at a token
    that is none of `ends`.
    """
    if not isinstance(answer, list) or len(answer) != count:
        raise BadAnswer(f"{count} samples were asked for, and the answer is {str(answer)[:100]}")
    try:
        return [_sample(item["output_ids"], item["meta_info"], version, vocab_size, ends) for item in answer]
    except (KeyError, IndexError) as error:
        raise BadAnswer(f"an answer without {error}") from None
    except (TypeError, AttributeError) as error:
        raise BadAnswer(f"an answer of another shape: {error}") from None


def _sample(
    output_ids: Any, meta: dict[str, Any], version: str, vocab_size: int, ends: tuple[int, ...]
) -> Sample:
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise BadAnswer(f"a sample ended by {meta['finish_reason']}")
    versions = {str(span["version"]) for span in meta.get("weight_versions") or ()}
    versions.add(str(meta["weight_version"]))
    if versions != {version}:
        raise StaleWeights(f"a sample of weight version {', '.join(sorted(versions))}, not {version}")
    _check_tokens(output_ids, vocab_size)
    ended = output_ids[-1] in ends
    if reason == "stop" and not ended:
        raise BadAnswer(
            f"a sample stopped at token {output_ids[-1]}, which ends no response of model.path: the server's "
            "model has another generation_config.json or tokenizer"
        )
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    if [entry[1] for entry in meta["output_token_logprobs"]] != output_ids:
        raise BadAnswer("the log-probs are not those of the tokens")
    _check_log_probs(log_probs)
    number = int(version) if version.isdigit() else 0
    # by the last token, as the local engine has it: an end may be the last token that is allowed
    reason = "stop" if ended else "length"
    return Sample(np.array(output_ids, np.int32), np.array(log_probs, np.float32), reason, number)


def _check_tokens(output_ids: Any, vocab_size: int) -> None:
    if not isinstance(output_ids, list) or not output_ids:
        raise BadAnswer(f"a sample whose tokens are {str(output_ids)[:100]}")
    for token in output_ids:
        if type(token) is not int:  # JSON's true is an int to isinstance
            raise BadAnswer(f"a sample with {str(token)[:100]} for a token")
        if not 0 <= token < vocab_size:
            raise BadAnswer(f"token {str(token)[:100]} was sampled, but the policy has {vocab_size} tokens")


def _check_log_probs(log_probs: list[Any]) -> None:
    for value in log_probs:
        # written so that a NaN fails
        if type(value) not in (int, float) or not LEAST_LOG_PROB <= value <= LOG_PROB_ROUNDING:
            raise BadAnswer(f"a sample with {str(value)[:100]} for a log-prob")


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
