"""Servers that the run starts itself: their arguments, ports, processes and logs."""

import os
import shlex
import socket
import subprocess
import sys
from collections import deque
from itertools import zip_longest
from pathlib import Path

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError

SET_BY_THE_RUN = "the run sets it from its other settings"
TOLD_BY_THE_SERVER = (
    "a server writes it into its log: start the servers yourself and use rollout.launch=attach"
)
REFUSED = {
    **dict.fromkeys(("--model-path", "--model", "--host", "--port", "--dtype"), SET_BY_THE_RUN),
    **dict.fromkeys(("--random-seed", "--config", "--weight-version"), SET_BY_THE_RUN),
    **dict.fromkeys(("--api-key", "--admin-api-key", "--ssl-keyfile-password"), TOLD_BY_THE_SERVER),
    "--preferred-sampling-params": "the policy gradient needs samples of the whole distribution, so top_p, "
    "top_k, min_p and penalties stay off",
}
LOAD_FORMAT, CONTEXT_LENGTH = "--load-format", "--context-length"


def check_arguments(text: str) -> None:
    """Raises UserError, one line, for text that no shell reads or an argument that does not fit."""
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise UserError(f"rollout.sglang.server_args is {text!r}: {error}") from None
    for argument, following in zip_longest(arguments, arguments[1:]):
        given, equals, value = argument.partition("=")
        for name, reason in REFUSED.items():
            if _means(given, name):
                raise UserError(f"rollout.sglang.server_args has {_told(given, name)}; {reason}")
        if _means(given, LOAD_FORMAT) and (value if equals else following) == "dummy":
            raise UserError(
                f"rollout.sglang.server_args has {_told(given, LOAD_FORMAT)} dummy; the server would begin "
                "with random weights, not those of model.path"
            )


def context_length(text: str) -> int | None:
    """The value of --context-length in arguments that `check_arguments` accepts; None without one."""
    arguments = shlex.split(text)
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        given, equals, value = argument.partition("=")
        value = value if equals else following
        if _means(given, CONTEXT_LENGTH) and value.isdecimal():
            return int(value)
    return None


def _means(given: str, name: str) -> bool:
    """Whether SGLang's parser takes it for that name: argparse takes the beginning of one, too."""
    return len(given) > len("--") and name.startswith(given)


def _told(given: str, name: str) -> str:
    return name if given == name else f"{given}, which is short for {name}"


CPU_ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--disable-overlap-schedule --sleep-on-idle"
)
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
EVERY_NODE = "0.0.0.0"
"""As rollout.sglang.host: the node's own address; the server does not bind to all interfaces"""
LOG_LINES = 12
"""Last lines of the log that the error of a failed start quotes"""


class SpawnedServer:
    """A server process under its guard (megatron_bicc.sglang.guard), which ends it with this process."""

    def __init__(self, config: Config, index: int) -> None:
        """index: number of the server on its node."""
        settings = config.rollout.sglang
        host = device.node_address() if settings.host == EVERY_NODE else settings.host
        self.url = f"http://{host}:{_free_port(host)}"
        self.log = Path(config.output_dir) / f"servers/{socket.gethostname()}_{index}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # servers with the same seed would sample the same numbers
        seed = config.seed + device.node_rank() * settings.servers_per_node + index
        guard = [sys.executable, "-m", "megatron_bicc.sglang.guard", str(self.log)]
        self._guard = subprocess.Popen(
            [*guard, *_command(config, self.url, seed)],
            stdin=subprocess.PIPE,
            env=_environment(config, index),
        )

    def check_starting(self) -> None:
        """Raises UserError, which quotes the end of the log, if the server has ended."""
        if self._guard.poll() is not None:
            with open(self.log, encoding="utf-8", errors="replace") as lines:
                last = " | ".join(line.strip() for line in deque(lines, LOG_LINES) if line.strip())
            raise UserError(f"rollout server {self.url} ended during its start, see {self.log}: {last}")

    def ready(self) -> None:
        """Has the guard restart the server from now on when it ends."""
        self._guard.stdin.write(b"r")
        self._guard.stdin.flush()

    def stop(self) -> None:
        """Ends the server and waits for it."""
        self._guard.stdin.close()
        self._guard.wait()


def _command(config: Config, url: str, seed: int) -> list[str]:
    settings = config.rollout.sglang
    host, _, port = url.removeprefix("http://").rpartition(":")
    given = ["--model-path", config.model.path, "--dtype", config.model.dtype, "--host", host, "--port", port]
    given += ["--random-seed", str(seed), "--log-level-http", "warning"]
    if config.rollout.colocate and device.has_cuda():
        given.append("--enable-memory-saver")
    if not device.has_cuda():
        given += CPU_ARGUMENTS.split()
    start = [settings.python, "-W", "ignore", "-m", "sglang.launch_server"]
    return [*start, *given, *shlex.split(settings.server_args)]


def _environment(config: Config, index: int) -> dict[str, str]:
    # with torchrun's settings a server would wait forever for a store at the trainer's address
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    # torchrun's variables describe the trainer's job, not the server's
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # log-probs must be at the sampling temperature
    if not device.has_cuda():
        env |= CPU_ENVIRONMENT
    if config.rollout.sglang.gpus:
        env["CUDA_VISIBLE_DEVICES"] = config.rollout.sglang.gpus.split("/")[index]
    return env


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
