"""Checks running rollout servers: readiness, context length, and whether they serve the policy's model."""

import time
from collections.abc import Callable
from typing import Any

import anyio
from transformers import PretrainedConfig

from megatron_bicc.config import RolloutConfig
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import waiting_for
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal
from megatron_bicc.sglang.settings import context_length

WAIT_S = 10.0
"""Seconds of waiting for a server after which the wait is logged"""
POLL_S = 0.2
"""Seconds between two attempts to reach a server that starts"""


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
    end = time.monotonic() + timeout_s
    with waiting_for(f"rollout server {client.url}, at most {timeout_s:g} s"):
        while True:
            check_starting()
            try:
                await client.resume()  # a trainer killed during a weight sync left the server paused
                await client.get("/health", 30.0)
                return
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
