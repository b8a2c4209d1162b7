"""Whether the settings of the rollout servers make sense together."""

import ipaddress
import os
import re
import shutil
import socket
from itertools import combinations
from urllib.parse import urlsplit

from megatron_bicc.config import RolloutConfig
from megatron_bicc.rollout.sglang.arguments import check_arguments


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


def server_urls(servers: str) -> list[str]:
    """The URLs of rollout.sglang.servers, each spelled in the one way that it has."""
    return [url.strip().rstrip("/").lower() for url in servers.split(",")]


def _check_attach(rollout: RolloutConfig) -> None:
    settings = rollout.sglang
    if not settings.servers:
        raise ValueError("rollout.launch is attach; name the servers in rollout.sglang.servers")
    for url in settings.servers.split(","):
        _check_url(url.strip())
    urls = server_urls(settings.servers)
    for url in urls:
        if urls.count(url) > 1:
            raise ValueError(f"rollout.sglang.servers names {url} more than once; name it once")
    for name in ("server_args", "gpus"):
        if getattr(settings, name):
            raise ValueError(
                f"rollout.sglang.{name} is set; it needs rollout.launch=spawn: leave it empty, "
                "the servers have been started without it"
            )
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
    check_arguments(settings.server_args)
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
    for one, other in combinations(map(set, named), 2):
        # servers may share all of their GPUs, each with a part of the memory
        if one & other and one != other:
            raise ValueError(
                f"rollout.sglang.gpus is {gpus!r}; two servers share {', '.join(sorted(one & other))}, but "
                "not their other GPUs"
            )
