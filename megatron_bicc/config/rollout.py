"""Settings of the rollouts, and of the servers that they come from."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SglangConfig:
    """The rollout servers of rollout.engine=sglang (docs/rollout.md)."""

    servers: str = ""
    """attach: the servers' URLs, separated by commas, http://host:port each."""
    servers_per_node: int = 1
    """spawn: servers that the first process of each node starts."""
    host: str = "127.0.0.1"
    """spawn: address of the servers. Loopback: for their own node; 0.0.0.0: each node's, for all."""
    python: str = ".venv-sglang/bin/python"
    """spawn: Python of the environment that SGLang is installed in."""
    server_args: str = ""
    """spawn: more arguments of sglang.launch_server."""
    gpus: str = ""
    """spawn: GPUs of each of a node's servers, "0,1/2,3" for two servers; empty: all that are visible."""
    max_concurrency: int = 256
    """Rollouts asked for at a time, over all processes and servers."""
    start_timeout_s: float = 900.0
    """Seconds within which every server must be ready."""
    health_timeout_s: float = 30.0
    """Seconds within which a server must say that it is well, or it is taken for dead."""
    request_timeout_s: float = 3600.0
    """Seconds that a group of rollouts may take."""
    retry_s: float = 300.0
    """Seconds of failing attempts, on any server, after which the run stops."""
    api_key_variable: str = ""
    """attach: environment variable that holds the servers' API key."""


@dataclass
class RolloutConfig:
    """Generation of the rollouts that the policy learns from."""

    engine: Literal["local", "sglang"] = "local"
    """local: transformers' generate, in the training processes. sglang: SGLang servers."""
    launch: Literal["spawn", "attach"] = "spawn"
    """sglang: servers that the run starts and ends, or those of rollout.sglang.servers."""
    colocate: bool = False
    """sglang: the servers give up their memory while the policy trains on the same devices."""
    prompts_per_step: int = 32
    """Prompts (groups) sampled for every batch of rollouts."""
    group_size: int = 8
    """G: rollouts of each prompt."""
    max_new_tokens: int = 2048
    """Longest response in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    batch_size: int = 256
    """Rollouts that the local engine generates, and megatron_bicc.evaluate asks for, at once."""
    dynamic_sampling: bool | None = None
    """Draw prompts until prompts_per_step groups have right and wrong rollouts; None: as the preset says."""
    max_prompts_per_step: int = 320
    """Most prompts that dynamic sampling draws for a step; fewer groups than it needs by then is an error."""
    leftover: Literal["drop", "keep"] = "drop"
    """Groups with contrast beyond prompts_per_step: dropped, or learned from in the next step."""
    sglang: SglangConfig = field(default_factory=SglangConfig)


@dataclass
class WeightSyncConfig:
    """The policy's weights on their way to the rollout servers, after every step."""

    method: Literal["tensor", "disk", "distributed"] = "tensor"
    """Bytes by HTTP; files that the servers read; or a broadcast among trainer and servers."""
    bucket_mb: float = 512.0
    """Weights are sent in buckets of this size, in MiB; a larger tensor is one by itself."""
    path: str = ""
    """Directory for files of weights, on a disk or in memory; empty: rollout_weights in output_dir."""
    keep_files: bool = True
    """Keep the newest weights in files until the next sync, for a server that restarts before it."""
    timeout_s: float = 600.0
    """Seconds that a server may take for one call of a sync."""
