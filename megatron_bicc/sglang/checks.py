"""Checks of the rollout servers: their settings, and whether a running one serves the policy's model."""

import ipaddress
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any
from urllib.parse import urlsplit

import anyio
from transformers import PretrainedConfig

from megatron_bicc.config import RolloutConfig
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import waiting_for
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal
from megatron_bicc.sglang.process import check_arguments, context_length

log = logging.getLogger(__name__)
POLL_S = 0.2
"""Seconds between two attempts to reach a server that starts"""


def check_servers(rollout: RolloutConfig) -> None:
    """Raises UserError, one line that names setting, value and remedy, for the first mistake found."""
    if rollout.engine != "sglang":
        if rollout.colocate:
            raise UserError("rollout.colocate is true; it needs rollout.engine=sglang")
        return
    if rollout.launch == "attach":
        _check_attach(rollout)
    else:
        _check_spawn(rollout)


def server_urls(servers: str) -> list[str]:
    """The URLs of rollout.sglang.servers, each spelled in the one way that it has."""
    return [url.strip().rstrip("/").lower() for url in servers.split(",")]


def _check_attach(rollout: RolloutConfig) -> None:
    settings = rollout.sglang
    if not settings.servers:
        raise UserError("rollout.launch is attach; name the servers in rollout.sglang.servers")
    for url in settings.servers.split(","):
        _check_url(url.strip())
    urls = server_urls(settings.servers)
    for url in urls:
        if urls.count(url) > 1:
            raise UserError(f"rollout.sglang.servers names {url} more than once; name it once")
    for name in ("server_args", "gpus"):
        if getattr(settings, name):
            raise UserError(
                f"rollout.sglang.{name} is set; it needs rollout.launch=spawn: leave it empty, "
                "the servers have been started without it"
            )
    if settings.api_key_variable:
        _check_key(os.environ.get(settings.api_key_variable, ""))


def _check_key(key: str) -> None:
    """Tells neither the key nor the variable's name, which may be the key given by mistake."""
    if not key:
        raise UserError(
            "rollout.sglang.api_key_variable names a variable that is not set; give the name of the "
            "environment variable that holds the key, not the key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "rollout.sglang.api_key_variable: the key in that variable has a character that no HTTP header "
            "can carry, such as a space or a newline at its end; take it out"
        )


def _check_url(url: str) -> None:
    if "@" in url:
        raise UserError(
            "rollout.sglang.servers holds a password; take it out and use rollout.sglang.api_key_variable"
        )
    try:
        parts = urlsplit(url)
        # urlsplit drops some characters that no host has, and lets others pass
        good = url.isprintable() and not re.search(r"[\s\"%<>\\^`{|}]", url)
        good = good and parts.scheme in ("http", "https") and parts.hostname and parts.port
        good = good and not (parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:  # a port that is no number or too large, half an IPv6 address
        good = False
    if not good:
        raise UserError(f"rollout.sglang.servers has {url!r}; write http://host:port, commas between several")


def _check_spawn(rollout: RolloutConfig) -> None:
    settings = rollout.sglang
    if settings.servers:
        raise UserError("rollout.sglang.servers is set; it needs rollout.launch=attach")
    if settings.api_key_variable:
        raise UserError(
            "rollout.sglang.api_key_variable is set; it needs rollout.launch=attach: a server writes its key "
            "into its log"
        )
    if not shutil.which(settings.python):
        raise UserError(
            f"rollout.sglang.python is {settings.python}; there is no such program: `make sglang` makes it, "
            "with SGLang"
        )
    _check_host(settings.host)
    check_arguments(settings.server_args)
    if settings.gpus:
        _check_gpus(settings.gpus, settings.servers_per_node)


def _check_host(host: str) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise UserError(f"rollout.sglang.host is {host!r}; it must be an IPv4 address") from None
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise UserError(
                f"rollout.sglang.host is {host!r}; servers cannot bind to it here: {error.strerror}"
            ) from None


def _check_gpus(gpus: str, servers: int) -> None:
    named = [server.split(",") for server in gpus.split("/")]
    if len(named) != servers:
        raise UserError(
            f"rollout.sglang.gpus is {gpus!r}; it must name the GPUs of "
            f"rollout.sglang.servers_per_node = {servers} servers, with / between them"
        )
    for gpu in (gpu for server in named for gpu in server):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w-]+", gpu):
            raise UserError(
                f"rollout.sglang.gpus is {gpus!r}; {gpu!r} is no GPU: write numbers, or UUIDs as "
                "nvidia-smi -L prints them, with commas between a server's and / between servers"
            )
    for server in named:
        if len(set(server)) < len(server):
            raise UserError(f"rollout.sglang.gpus is {gpus!r}; it names a GPU of one server twice")
    for one, other in combinations(map(set, named), 2):
        # servers may share all of their GPUs, each with a part of the memory
        if one & other and one != other:
            raise UserError(
                f"rollout.sglang.gpus is {gpus!r}; two servers share {', '.join(sorted(one & other))}, but "
                "not their other GPUs"
            )


LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Keys of config.json that may hold the longest context, in the order in which SGLang looks for them"""


def server_positions(hf_config: PretrainedConfig, rollout: RolloutConfig) -> int:
    """Returns the most tokens that a server takes; an attached one is assumed to take what the model does."""
    scaling = hf_config.rope_parameters
    factor = 1.0 if "original_max_position_embeddings" in scaling else scaling.get("factor", 1.0)
    most = int(factor * next(vars(hf_config)[key] for key in LENGTHS if vars(hf_config).get(key)))
    given = context_length(rollout.sglang.server_args) if rollout.launch == "spawn" else None
    return min(most, given or most)


async def wait_until_ready(
    client: ServerClient, timeout_s: float, check_starting: Callable[[], None] = lambda: None
) -> None:
    """Waits until a server is healthy and generates.

    check_starting: called between attempts; raises if waiting is useless. Raises UserError, one line, for a
    server that is not ready within timeout_s seconds or refuses the requests.
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

    An unknown id as input would crash the server; as the key of a bias it is refused.
    """
    sampling: dict[str, Any] = {"max_new_tokens": 1, "logit_bias": {str(token): 0.0}}
    try:
        await client.generate({"input_ids": [0], "sampling_params": sampling})
    except ServerRefusal as refusal:
        if "logit_bias" in str(refusal):
            return False
        raise
    return True
