"""Checkpoints by megatron-core's dist_checkpointing: written aside, renamed when whole.

OUTPUT_DIR/checkpoints/step_00000050/    weights and optimizer, sharded, progress.json and manifest.json
OUTPUT_DIR/checkpoints/latest            symbolic link to the newest
"""

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bicc import platform
from megatron_bicc.policy.policy import Policy
from megatron_bicc.training.manifest import check_manifest, write_manifest

PROGRESS, LATEST, PARTIAL = "progress.json", "latest", ".partial"
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, in one line that names the file."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights."""

    step: int
    """Finished steps"""
    sampler: dict[str, Any]
    """The state of rollout.dynamic.Collector: the position in the data, and groups left over"""
    scheduler: dict[str, Any]
    """The learning-rate scheduler's state"""
    config: dict[str, Any]
    """The configuration that the run was started with"""
    contents: dict[str, str]
    """training.resume.contents: what the files that the configuration names hold"""


def checkpoints(output_dir: str) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    root = Path(output_dir) / "checkpoints"
    found = [
        p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / PROGRESS).is_file()
    ]
    return sorted(found)


def check_writable(output_dir: str) -> None:
    """Raises CheckpointError if no checkpoint can be written there: before the first step, not after it."""
    root = Path(output_dir) / "checkpoints"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise CheckpointError(f"output_dir: {root} cannot be written: {error.strerror}") from error


def save_checkpoint(output_dir: str, policy: Policy, progress: Progress, keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`. Collective.

    Raises CheckpointError if it cannot be written; the earlier ones stay.
    """
    final = Path(output_dir) / "checkpoints" / f"step_{progress.step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    try:
        _write(partial, policy, progress)
        if dist.get_rank() == 0:
            _publish(partial, final, keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and platform.is_connection_loss(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written: {_reason(error)}; free space and go on by checkpoint.resume=true"
        ) from error
    dist.barrier()
    return final


def read_progress(path: Path) -> Progress:
    """Where the run of a checkpoint stood. Raises CheckpointError if it is damaged."""
    try:
        return Progress(**json.loads((path / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / PROGRESS}: cannot be read: {error}; {_remedy(path)}") from error


def load_checkpoint(path: Path, policy: Policy) -> Progress:
    """Fills the policy and its optimizer, under any layout; returns where the run stood. Collective.

    Raises CheckpointError that names the file that is damaged, and what to go on from.
    """
    try:
        check_manifest(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error
    progress = read_progress(path)
    with platform.megatron():
        state = dist_checkpointing.load(_state(policy, is_loading=True), str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.module.load_state_dict(state[f"model{i}"], strict=False)
        policy.optimizer.load_state_dict(state["optimizer"])
    policy.scheduler.load_state_dict(progress.scheduler)
    return progress


def _write(partial: Path, policy: Policy, progress: Progress) -> None:
    if dist.get_rank() == 0:
        for leftover in partial.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    with platform.megatron():
        dist_checkpointing.save(
            _state(policy, is_loading=False), str(partial), sharded_strategy=_Writer("torch_dist", 1)
        )
    if dist.get_rank() == 0:
        (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    dist.barrier()
    write_manifest(partial)


def _publish(partial: Path, final: Path, keep: int) -> None:
    """Gives a whole checkpoint its name; at every moment the newest one is whole, and `latest` names one."""
    if final.exists():
        _remove(final)
    partial.rename(final)
    link = final.with_name(LATEST + PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.with_name(LATEST))
    for old in checkpoints(str(final.parents[1]))[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Under another name first: half a checkpoint must not look like one."""
    doomed = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _remedy(path: Path) -> str:
    earlier = [p for p in checkpoints(str(path.parents[1])) if p.name < path.name]
    return f"delete {path} to " + (f"go on from {earlier[-1]}" if earlier else "start again")


def _state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    model = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)
    return model | {"optimizer": optimizer}


class _Writer(torch_strategy.TorchDistSaveShardedStrategy):
    """megatron-core's format, by torch's own writer.

    megatron-core's writer starts a process that loads the whole program again, and outlives a killed run.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        main_replicas, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            torch_strategy.mcore_to_pyt_state_dict(main_replicas, False),
            # of two threads torch would lose the second one's error
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=torch_strategy.MCoreSavePlanner(flatten_state_dict=False),
        )


def _reason(error: BaseException) -> str:
    """The first line of what failed, on whichever process."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    hint = "; is the disk full?" if isinstance(error, RuntimeError) else ""
    return str(error).partition("\n")[0] + hint
