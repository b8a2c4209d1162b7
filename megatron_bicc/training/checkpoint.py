"""Checkpoints by megatron-core's dist_checkpointing: written aside, renamed when whole.

OUTPUT_DIR/checkpoints/step_00000050/    weights and optimizer, sharded, and progress.json
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_bicc import platform
from megatron_bicc.policy.policy import Policy

PROGRESS = "progress.json"
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights."""

    step: int
    """Finished steps"""
    sampler: dict[str, Any]
    """The prompt sampler's state"""
    scheduler: dict[str, Any]
    """The learning-rate scheduler's state"""
    config: dict[str, Any]
    """The configuration that the run was started with"""


def checkpoints(output_dir: str) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    root = Path(output_dir) / "checkpoints"
    found = [
        p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / PROGRESS).is_file()
    ]
    return sorted(found)


def save_checkpoint(output_dir: str, policy: Policy, progress: Progress, keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`. Collective."""
    final = Path(output_dir) / "checkpoints" / f"step_{progress.step:08d}"
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with platform.megatron():
        dist_checkpointing.save(_state(policy, is_loading=False), str(partial))
    if dist.get_rank() == 0:
        (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(path: Path, policy: Policy) -> Progress:
    """Fills the policy and its optimizer; returns where the run stood. Collective."""
    progress = Progress(**json.loads((path / PROGRESS).read_text()))
    with platform.megatron():
        state = dist_checkpointing.load(_state(policy, is_loading=True), str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.module.load_state_dict(state[f"model{i}"], strict=False)
        policy.optimizer.load_state_dict(state["optimizer"])
    policy.scheduler.load_state_dict(progress.scheduler)
    return progress


def _state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    model = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)
    return model | {"optimizer": optimizer}
