"""Whether SGLang reads a Hugging Face directory as the policy does: its rules are not transformers'.

Whether a server serves the policy's architecture and vocabulary, before it is used.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
from transformers import PretrainedConfig

from megatron_bicc.config import RolloutConfig
from megatron_bicc.errors import UserError
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal
from megatron_bicc.sglang.settings import context_length
from megatron_bicc.weights.hf_files import INDEX, SINGLE, weight_map

ACCEPTED: dict[str, Any] = {
    "rope_is_neox_style": True,
    "dual_chunk_attention_config": None,
    "scale_emb": None,
    "original_num_attention_heads": None,
}
"""Entries of config.json that SGLang reads and transformers does not, and the value that changes nothing"""
LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Where SGLang looks for the longest context, the first that is there"""


def check_model_files(path: Path, hf_config: PretrainedConfig, files: set[str]) -> None:
    """Raises UserError, one line, where a server would load other files than `files`, or compute otherwise.

    SGLang loads what the index names if there is one, else every safetensors file of the directory.
    """
    index = path / INDEX
    if index.is_file():
        theirs = set(weight_map(index).values())
    else:
        theirs = {file.name for file in path.glob("*.safetensors")}
        if theirs == {"consolidated.safetensors", SINGLE}:
            theirs = {SINGLE}
    for name in sorted(theirs ^ files):
        named = f"{SINGLE} and {INDEX} lie side by side: " if index.is_file() else ""
        reader, other = ("SGLang", "transformers") if name in theirs else ("transformers", "SGLang")
        raise UserError(
            f"{path}: {named}{reader} reads {name} and {other} does not; remove what is left over"
        )
    for key, value in ACCEPTED.items():
        found = vars(hf_config).get(key, value)
        if found != value:
            raise UserError(
                f"{path}/config.json: {key} is {found!r}, which SGLang computes and the policy does not; "
                "remove it or use rollout.engine=local"
            )


def server_positions(hf_config: PretrainedConfig, rollout: RolloutConfig) -> int:
    """Tokens of the longest sequence that a server takes; one that is attached is taken to have no less."""
    scaling = hf_config.rope_parameters
    factor = 1.0 if "original_max_position_embeddings" in scaling else scaling.get("factor", 1.0)
    most = int(factor * next(vars(hf_config)[key] for key in LENGTHS if vars(hf_config).get(key)))
    given = context_length(rollout.sglang.server_args) if rollout.launch == "spawn" else None
    return min(most, given or most)


log = logging.getLogger(__name__)
PATIENCE_S = 10.0
"""After which it is said that a server is waited for."""


async def until_well(client: ServerClient, timeout_s: float, check_starting: Callable[[], None]) -> None:
    """Waits for a server. Raises UserError, one line, if it is not well in that time, or if check_starting
    does."""
    begin, told = time.monotonic(), False
    while True:
        check_starting()
        try:
            await client.resume()  # a trainer that was killed while it sent weights left the server paused
            await client.get("/health", 30.0)
            return
        except ServerRefusal as refusal:
            raise UserError(str(refusal)) from None
        except ServerError as error:
            waited = time.monotonic() - begin
            if waited > timeout_s:
                raise UserError(f"{error}; it was waited for {timeout_s:g} s") from None
            if waited > PATIENCE_S and not told:
                log.warning("waiting for a rollout server, %g s at most: %s", timeout_s, error)
                told = True
        await anyio.sleep(0.5)


async def check_model(client: ServerClient, hf_config: PretrainedConfig) -> None:
    """Raises UserError, one line, for a server of another architecture or vocabulary, or one that fails.

    The first weight sync checks every parameter's name and shape.
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
        if not await _knows(client, last) or await _knows(client, last + 1):
            raise UserError(
                f"rollout server {client.url} serves {info['model_path']}, whose vocabulary is not the "
                f"{hf_config.vocab_size} tokens of model.path"
            )
    except ServerError as error:
        raise UserError(str(error)) from None


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
