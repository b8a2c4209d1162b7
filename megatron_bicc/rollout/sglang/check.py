"""Whether a server serves the policy's architecture and vocabulary, before it is used."""

import logging
import time
from collections.abc import Callable
from typing import Any

import anyio
from transformers import PretrainedConfig

from megatron_bicc.rollout.sglang.client import ServerClient, ServerError, ServerRefusal

log = logging.getLogger(__name__)
PATIENCE_S = 10.0
"""After which it is said that a server is waited for."""


async def until_well(client: ServerClient, timeout_s: float, check_starting: Callable[[], None]) -> None:
    """Waits for a server. Raises ValueError, one line, if it is not well in that time, or if check_starting
    does."""
    begin, told = time.monotonic(), False
    while True:
        check_starting()
        try:
            await client.resume()  # a trainer that was killed while it sent weights left the server paused
            await client.get("/health", 30.0)
            return
        except ServerRefusal as refusal:
            raise ValueError(str(refusal)) from None
        except ServerError as error:
            waited = time.monotonic() - begin
            if waited > timeout_s:
                raise ValueError(f"{error}; it was waited for {timeout_s:g} s") from None
            if waited > PATIENCE_S and not told:
                log.warning("waiting for a rollout server, %g s at most: %s", timeout_s, error)
                told = True
        await anyio.sleep(0.5)


async def check_model(client: ServerClient, hf_config: PretrainedConfig) -> None:
    """Raises ValueError, one line, for a server of another architecture or vocabulary, or one that fails.

    The first weight sync checks every parameter's name and shape.
    """
    try:
        info = await client.model_info()
        theirs, ours = info.get("architectures"), hf_config.architectures
        if theirs != ours:
            raise ValueError(
                f"rollout server {client.url} serves {info['model_path']}, whose architecture is "
                f"{' '.join(map(str, theirs or ['unknown']))}; model.path has {' '.join(ours)}"
            )
        last = hf_config.vocab_size - 1
        if not await _knows(client, last) or await _knows(client, last + 1):
            raise ValueError(
                f"rollout server {client.url} serves {info['model_path']}, whose vocabulary is not the "
                f"{hf_config.vocab_size} tokens of model.path"
            )
    except ServerError as error:
        raise ValueError(str(error)) from None


async def _knows(client: ServerClient, token: int) -> bool:
    """Whether a token is within the vocabulary. As an input an unknown one would end the server; as the key
    of a bias it is refused."""
    sampling: dict[str, Any] = {"max_new_tokens": 1, "logit_bias": {str(token): 0.0}}
    try:
        await client.generate({"input_ids": [0], "sampling_params": sampling})
    except ServerRefusal as refusal:
        if "logit_bias" in str(refusal):
            return False
        raise
    return True
