"""Checks the rollout servers' settings, before anything is started. Imports neither torch nor SGLang."""

import ipaddress
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from itertools import combinations, pairwise
from urllib.parse import urlsplit

from megatron_bicc.config import PauseMode, RolloutConfig
from megatron_bicc.errors import UserError

SET_BY_THE_RUN = "the run sets it from its other settings"
LOGGED_BY_THE_SERVER = (
    "a server writes it into its log: start the servers yourself and use rollout.launch=attach"
)
REFUSED = {
    **dict.fromkeys(("--model-path", "--model", "--host", "--port", "--dtype"), SET_BY_THE_RUN),
    **dict.fromkeys(("--random-seed", "--config", "--weight-version"), SET_BY_THE_RUN),
    **dict.fromkeys(("--api-key", "--admin-api-key", "--ssl-keyfile-password"), LOGGED_BY_THE_SERVER),
    "--preferred-sampling-params": "the policy gradient needs samples of the whole distribution, so top_p, "
    "top_k, min_p and penalties stay off",
}
"""Arguments that rollout.sglang.server_args must not contain, and why"""


def check_servers(rollout: RolloutConfig) -> None:
    """Raises UserError, one line with setting, value and remedy, for the first unusable setting."""
    if rollout.engine != "sglang":
        if rollout.colocate:
            raise UserError("rollout.colocate is true; it needs rollout.engine=sglang")
        return
    if rollout.launch == "attach":
        _check_attach(rollout)
    else:
        _check_spawn(rollout)


def pause_mode(rollout: RolloutConfig) -> PauseMode:
    """Returns how a weight sync pauses servers: a run without max_staleness has no request to keep."""
    return rollout.pause if rollout.max_staleness else "abort"


def server_urls(servers: str) -> list[str]:
    """Returns the URLs of rollout.sglang.servers in canonical spelling."""
    return [url.strip().rstrip("/").lower() for url in servers.split(",")]


def context_length(server_args: str) -> int | None:
    """Returns the value of --context-length in arguments that `check_servers` accepts; None without one."""
    return _number(server_args, "--context-length")


def _number(server_args: str, *names: str) -> int | None:
    """Returns the number that an argument of any of these names has; None without one."""
    for given, value in _options(shlex.split(server_args)):
        if any(_stands_for(given, name) for name in names) and value.isdecimal():
            return int(value)
    return None


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
    # The messages hold neither the key nor the variable's name, which may be the key, given by mistake.
    if not key:
        raise UserError(
            "rollout.sglang.api_key_variable names a variable that is not set; give the name of the "
            "environment variable that contains the key, not the key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "rollout.sglang.api_key_variable: the key in that variable has a character that no HTTP header "
            "can carry, such as a space or a newline at its end; remove it"
        )


def _check_url(url: str) -> None:
    if "@" in url:
        raise UserError(
            "rollout.sglang.servers contains a password; remove it and use rollout.sglang.api_key_variable"
        )
    try:
        parts = urlsplit(url)
        # urlsplit drops some characters that no host name has, and accepts others
        good = url.isprintable() and not re.search(r"[\s\"%<>\\^`{|}]", url)
        good = good and parts.scheme in ("http", "https") and parts.hostname and parts.port
        good = good and not (parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:  # the port is not a number or too large, or half of an IPv6 address
        good = False
    if not good:
        raise UserError(f"rollout.sglang.servers has {url!r}; write http://host:port, separated by commas")


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
            f"rollout.sglang.python is {settings.python}; there is no such program: `make sglang` installs "
            "one, with SGLang"
        )
    _check_host(settings.host)
    _check_arguments(settings.server_args)
    if settings.gpus:
        _check_gpus(settings.gpus, settings.servers_per_node)
        _check_sizes(settings.gpus, settings.server_args)


def _check_host(host: str) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError as error:
        raise UserError(f"rollout.sglang.host is {host!r}; it must be an IPv4 address") from error
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise UserError(
                f"rollout.sglang.host is {host!r}; servers cannot bind to it here: {error.strerror}"
            ) from error


def _check_arguments(server_args: str) -> None:
    try:
        arguments = shlex.split(server_args)
    except ValueError as error:  # an open quotation mark
        raise UserError(f"rollout.sglang.server_args is {server_args!r}: {error}") from error
    for given, value in _options(arguments):
        for name, reason in REFUSED.items():
            if _stands_for(given, name):
                raise UserError(f"rollout.sglang.server_args has {_spelling(given, name)}; {reason}")
        if _stands_for(given, "--load-format") and value == "dummy":
            raise UserError(
                f"rollout.sglang.server_args has {_spelling(given, '--load-format')} dummy; the server would "
                "start with random weights, not those of model.path"
            )


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yields each argument with the value after its "=", or else the argument that follows it."""
    for argument, following in pairwise([*arguments, ""]):
        given, equals, value = argument.partition("=")
        yield given, value if equals else following


def _stands_for(given: str, name: str) -> bool:
    # argparse, which SGLang uses, also accepts a unique prefix of a name
    return len(given) > len("--") and name.startswith(given)


def _spelling(given: str, name: str) -> str:
    return name if given == name else f"{given}, which is short for {name}"


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
                f"rollout.sglang.gpus is {gpus!r}; {gpu!r} is not a GPU: write numbers, or UUIDs as "
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


def _check_sizes(gpus: str, server_args: str) -> None:
    tensor = _number(server_args, "--tp-size", "--tensor-parallel-size") or 1
    pipeline = _number(server_args, "--pp-size", "--pipeline-parallel-size") or 1
    for server in gpus.split("/"):
        named = server.count(",") + 1
        if named < tensor * pipeline:
            raise UserError(
                f"rollout.sglang.gpus is {gpus!r}; it names {named} GPUs ({server}) for a server that needs "
                f"{tensor * pipeline}: --tp-size is {tensor} and --pp-size {pipeline} in "
                "rollout.sglang.server_args"
            )
