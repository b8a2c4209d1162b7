"""The HTTP API of SGLang's router (sglang-router), as far as it differs from that of a server.

A router passes POST /generate on to one of its workers, which are SGLang servers, and knows no other path of
a server: weights, pauses, aborts and the health of a worker go to the worker itself.
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_bicc.sglang.client import NotSglang, ServerClient, ServerRefusal

PATH = "/workers"
CARRIED = frozenset(("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "extra_key"))
"""Keys of a request that sglang-router 0.3.2 passes on; it drops those it does not know"""


@dataclass(frozen=True)
class Worker:
    """A worker that a router lists."""

    url: str
    healthy: bool
    """Whether the router sends it requests"""


async def listed_workers(client: ServerClient, timeout_s: float) -> list[Worker] | None:
    """Returns the workers of a router, which may have none yet; None for a server that is not a router.

    Raises ServerError, for a worker that is not a regular one over HTTP, too.
    """
    try:
        answer = await client.get(PATH, timeout_s)
    except ServerRefusal as refusal:
        if "HTTP 404" in str(refusal):
            return None
        raise
    if not isinstance(answer, dict) or not isinstance(answer.get("workers"), list):
        return None
    try:
        workers = [_worker(client, entry) for entry in answer["workers"]]
    except (KeyError, TypeError, AttributeError):
        raise NotSglang(client.url, PATH, answer) from None
    return list({worker.url: worker for worker in workers}.values())


def _worker(client: ServerClient, entry: dict[str, Any]) -> Worker:
    # with --dp-aware a router lists a worker once for each of its data-parallel ranks, as URL@RANK
    url = re.sub(r"@\d+$", "", entry["url"]).rstrip("/").lower()
    if entry["worker_type"] != "regular" or not url.startswith(("http://", "https://")):
        reason = f"{url} is a worker of type {entry['worker_type']}; the run needs regular ones over HTTP"
        raise ServerRefusal(client.url, PATH, reason)
    return Worker(url, entry["is_healthy"] is True)


def routed(body: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a group's request in the form that a router passes on whole; None if there is none.

    A router takes one set of sampling parameters, which SGLang then uses for every sample, and drops what it
    does not know. Seeds are left out: a worker uses them with --enable-deterministic-inference only.
    """
    first, *others = (
        {name: value for name, value in settings.items() if name != "sampling_seed"}
        for settings in body["sampling_params"]
    )
    if body.keys() - CARRIED or any(other != first for other in others):
        return None
    return body | {"sampling_params": first}
