"""Whether the settings of the rollout servers make sense together."""

import ipaddress
import os
import re
import shlex
import shutil
import socket
from urllib.parse import urlsplit

from megatron_bicc.config import RolloutConfig

OURS = ("--model-path", "--model", "--host", "--port", "--dtype", "--random-seed", "--config")
SECRETS = ("--api-key", "--admin-api-key")


def check_servers(rollout: RolloutConfig) -> None:
    """Raises ValueError, one line that names setting, value and remedy, for the first mistake found."""
    if rollout.engine != "sglang":
        if rollout.colocate:
            raise ValueError("rollout.colocate is true; it needs rollout.engine=sglang")
        return
    if rollout.launch == "attach":
        _check_attach(rollout)
    else:
        _check_spawn(rollout)


def _check_attach(rollout: RolloutConfig) -> None:
    settings = rollout.sglang
    if not settings.servers:
        raise ValueError("rollout.launch is attach; name the servers in rollout.sglang.servers")
    urls = [url.strip() for url in settings.servers.split(",")]
    for url in urls:
        _check_url(url)
        if urls.count(url) > 1:
            raise ValueError(f"rollout.sglang.servers names {url} more than once; name it once")
    if settings.api_key_variable:
        _check_key(os.environ.get(settings.api_key_variable, ""))


def _check_key(key: str) -> None:
    """Tells neither the key nor the variable's name, which may be the key given by mistake."""
    if not key:
        raise ValueError(
            "rollout.sglang.api_key_variable names a variable that is not set; give the name of the "
            "environment variable that holds the key, not the key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            "rollout.sglang.api_key_variable: the key in that variable has a character that no HTTP header "
            "can carry, such as a space or a newline at its end; take it out"
        )


def _check_url(url: str) -> None:
    if "@" in url:
        raise ValueError(
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
        raise ValueError(
            f"rollout.sglang.servers has {url!r}; write http://host:port, commas between several"
        )


def _check_spawn(rollout: RolloutConfig) -> None:
    settings = rollout.sglang
    if settings.servers:
        raise ValueError("rollout.sglang.servers is set; it needs rollout.launch=attach")
    if settings.api_key_variable:
        raise ValueError(
            "rollout.sglang.api_key_variable is set; it needs rollout.launch=attach: a server writes its key "
            "into its log"
        )
    if not shutil.which(settings.python):
        raise ValueError(
            f"rollout.sglang.python is {settings.python}; there is no such program: `make sglang` makes it, "
            "with SGLang"
        )
    _check_host(settings.host)
    _check_arguments(settings.server_args)
    if settings.gpus:
        _check_gpus(settings.gpus, settings.servers_per_node)


def _check_host(host: str) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise ValueError(f"rollout.sglang.host is {host!r}; it must be an IPv4 address") from None
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ValueError(
                f"rollout.sglang.host is {host!r}; servers cannot bind to it here: {error.strerror}"
            ) from None


def _check_gpus(gpus: str, servers: int) -> None:
    named = [server.split(",") for server in gpus.split("/")]
    if len(named) != servers:
        raise ValueError(
            f"rollout.sglang.gpus is {gpus!r}; it must name the GPUs of "
            f"rollout.sglang.servers_per_node = {servers} servers, with / between them"
        )
    for gpu in (gpu for server in named for gpu in server):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w-]+", gpu):
            raise ValueError(
                f"rollout.sglang.gpus is {gpus!r}; {gpu!r} is no GPU: write numbers, or UUIDs as "
                "nvidia-smi -L prints them, with commas between a server's and / between servers"
            )
    for server in named:
        if len(set(server)) < len(server):
            raise ValueError(f"rollout.sglang.gpus is {gpus!r}; it names a GPU of one server twice")


def _check_arguments(text: str) -> None:
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"rollout.sglang.server_args is {text!r}: {error}") from None
    for name in (argument.partition("=")[0] for argument in arguments):
        if name in OURS:
            raise ValueError(
                f"rollout.sglang.server_args has {name}; the run sets it from its other settings"
            )
        if name in SECRETS:
            raise ValueError(
                f"rollout.sglang.server_args has {name}; a server writes it into its log: start the servers "
                "yourself and use rollout.launch=attach"
            )
        if name == "--preferred-sampling-params":
            raise ValueError(
                f"rollout.sglang.server_args has {name}; the policy gradient needs samples of the whole "
                "distribution, so top_p, top_k, min_p and penalties stay off"
            )
