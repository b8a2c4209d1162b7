"""Worker of test_checkpoint_gather.py, on two data-parallel processes: gather_worker.py MODEL OUT.

Each process writes to OUT/RANK.json what its part of a checkpoint holds, and the collectives that made it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import host_state
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.weights.hf_weights import load_policy

COLLECTIVES = ("all_gather", "gather", "all_gather_into_tensor", "broadcast", "all_reduce")


def record(calls: list[tuple[str, str, int]], name: str) -> None:
    """Makes a collective note its name, its group's backend and the bytes that this process hands over."""
    collective = getattr(dist, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        group = next((a for a in (*args, *kwargs.values()) if isinstance(a, dist.ProcessGroup)), None)
        sent = max((a.nbytes for a in args if isinstance(a, Tensor)), default=0)
        calls.append((name, dist.get_backend(group), sent))
        return collective(*args, **kwargs)

    setattr(dist, name, recorded)


def main(model: str, out: Path) -> None:
    """One process's part."""
    config = Config()
    config.model.path, config.model.dtype = model, "bfloat16"
    device.start_distributed()
    start_model_parallel(config)
    policy = load_policy(config)
    calls: list[tuple[str, str, int]] = []
    for name in COLLECTIVES:
        record(calls, name)
    with device.megatron():
        state = host_state(policy)
    held = [e for e in nested_values(state["optimizer"]) if isinstance(e, ShardedBase)]
    report = {
        "calls": calls,
        "optimizer_bytes": sum(entry.data.nbytes for entry in held),
        "parameters": sum(p.numel() for module in policy.modules for p in module.parameters()),
    }
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    device.end_distributed()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
