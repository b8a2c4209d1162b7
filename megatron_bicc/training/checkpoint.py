"""Checkpoints by megatron-core's dist_checkpointing: what they hold, and loading one.

OUTPUT_DIR/checkpoints/step_00000050/    weights and optimizer, sharded, progress.json and manifest.json
OUTPUT_DIR/checkpoints/latest            symbolic link to the newest
"""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from megatron_bicc import platform
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.policy.manifest import check_file, check_manifest
from megatron_bicc.policy.policy import Policy

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
    """Finished checkpoints of a run, oldest first.

    One has its name only when it is whole: what it may have lost since is damage, found where it is read.
    """
    root = Path(output_dir) / "checkpoints"
    return sorted(p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and p.is_dir())


def check_writable(output_dir: str) -> None:
    """Raises CheckpointError if no checkpoint can be written there: before the first step, not after it."""
    root = Path(output_dir) / "checkpoints"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise CheckpointError(f"output_dir: {root} cannot be written: {error.strerror}") from error


def read_progress(path: Path) -> Progress:
    """Where the run of a checkpoint stood. Raises CheckpointError if it is damaged."""
    try:
        check_file(path, PROGRESS)
        return Progress(**json.loads((path / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error


def load_checkpoint(path: Path, policy: Policy, progress: Progress) -> None:
    """Fills the policy, its optimizer and its schedule, under any layout. Collective.

    progress: `read_progress` of the same checkpoint. Raises CheckpointError that names the file that is
    damaged, or the tensor that is not there or not finite, and what to go on from.
    """
    try:
        check_manifest(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error
    with platform.megatron():
        model = _model_state(policy)
        state = model | {"optimizer": _optimizer_state(policy, model, is_loading=True)}
        _check_tensors(state, path)
        state = dist_checkpointing.load(state, str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.module.load_state_dict(state[f"model{i}"], strict=False)
        settings = [_settings(group) for group in policy.optimizer.param_groups]
        policy.optimizer.load_state_dict(state["optimizer"])
        # it took Adam's decays and epsilon from the checkpoint, too: this run's settings count
        for group, own in zip(policy.optimizer.param_groups, settings, strict=True):
            group |= own
    try:
        policy.check_weights()
    except NotFiniteError as error:
        raise CheckpointError(f"{path}: {error}; {_remedy(path)}") from error
    policy.scheduler.load_state_dict(progress.scheduler)


def _check_tensors(state: dict[str, Any], path: Path) -> None:
    """Earlier versions kept the optimizer of a policy with experts under other names, and trained the experts
    wrongly under tensor parallel alone."""
    held = dist_checkpointing.load_tensors_metadata(str(path))
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor) and entry.key not in held:
            raise CheckpointError(
                f"{path}: holds no tensor {entry.key}: it is of another model or of an earlier version; "
                f"{_remedy(path)}"
            )


def host_state(policy: Policy) -> dict[str, Any]:
    """What a checkpoint holds of the policy, in memory that training does not touch. Collective."""
    model = _model_state(policy)
    # megatron-core has gathered the optimizer's part in host memory of its own
    optimizer = _optimizer_state(policy, model, is_loading=False)
    for entry in nested_values(model):
        if isinstance(entry.data, Tensor) and is_main_replica(entry.replica_id):
            entry.data = entry.data.detach().to("cpu", copy=True)
    return model | {"optimizer": optimizer}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group of an optimizer holds beside its parameters and the count of its steps."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _model_state(policy: Policy) -> dict[str, Any]:
    return {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}


def _optimizer_state(policy: Policy, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    return policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)


def _remedy(path: Path) -> str:
    earlier = [p for p in checkpoints(str(path.parents[1])) if p.name < path.name]
    return f"delete {path} to " + (f"go on from {earlier[-1]}" if earlier else "start again")
