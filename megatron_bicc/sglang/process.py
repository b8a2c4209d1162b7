"""Starts servers of the run: arguments, ports, processes and logs."""

import os
import shlex
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError

CPU_ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--disable-overlap-schedule --sleep-on-idle"
)
ROUTING_ARGUMENT = "--enable-return-routed-experts"
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
COLOCATED_FRACTION = 0.8
"""Share of the memory that is free when a colocated server starts that its weights and its cache take.

What remains holds its CUDA graphs and activations (SGLang's own reserve is 10 GiB of an 80 GB GPU, about as
much as a fifth of what the policy leaves there) and, while it does not generate, a weight sync's buckets.
"""
IN_SERVER = Path(__file__).with_name("in_server")
"""Modules that servers import"""
CHANGES_LOADER = "bicc_weights.apply_changes"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EVERY_NODE = "0.0.0.0"
"""Value of rollout.sglang.host for the node's own address; the server does not bind to all interfaces"""
LOG_LINES = 12
"""Number of last log lines that the error of a failed start quotes"""


class SpawnedServer:
    """A server process under a guard (megatron_bicc.sglang.guard) that ends it when this process ends."""

    def __init__(self, config: Config, index: int) -> None:
        """index: of the server on its node."""
        settings = config.rollout.sglang
        host = device.node_address() if settings.host == EVERY_NODE else settings.host
        self.url = f"http://{host}:{_free_port(host)}"
        self.log = Path(config.output_dir) / f"servers/{socket.gethostname()}_{index}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # servers with equal seeds would sample equal random numbers
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
        """Signals the guard that the server is ready: from now on it restarts the server when it ends."""
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
    if config.model.routing_replay == "engine":
        given.append(ROUTING_ARGUMENT)
    if config.weight_sync.delta:
        given += ["--custom-weight-loader", CHANGES_LOADER]
    if config.rollout.colocate and device.has_cuda():
        given += ["--enable-memory-saver", "--mem-fraction-static", str(COLOCATED_FRACTION)]
    if not device.has_cuda():
        given += CPU_ARGUMENTS.split()
    start = [settings.python, "-W", "ignore", "-m", "sglang.launch_server"]
    return [*start, *given, *shlex.split(settings.server_args)]


def _environment(config: Config, index: int) -> dict[str, str]:
    # with torchrun's variables a server would wait forever for a store at the trainer's address
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    # torchrun's variables describe the trainer's job, not the server's
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # set for the trainer (device.limit_connections)
    env.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # log-probs must be at the sampling temperature
    # the memory saver of colocated servers refuses expandable segments, which the policy may use
    for name in ALLOCATOR_VARIABLES:
        if name in env:
            kept = [part for part in env.pop(name).split(",") if "expandable_segments" not in part]
            env |= {name: ",".join(kept)} if kept else {}
    if config.weight_sync.delta:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(IN_SERVER), env.get("PYTHONPATH")]))
    if not device.has_cuda():
        env |= CPU_ENVIRONMENT
    if config.rollout.sglang.gpus:
        env["CUDA_VISIBLE_DEVICES"] = config.rollout.sglang.gpus.split("/")[index]
    return env


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
