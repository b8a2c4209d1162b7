"""Checkpoints by megatron-core's dist_checkpointing: what they hold, and loading one.

OUTPUT_DIR/checkpoints/step_00000050/    weights and optimizer, sharded, progress.json and manifest.json
OUTPUT_DIR/checkpoints/latest            symbolic link to the newest

Writing checkpoints while the run goes on: by a thread, aside, renamed when whole.

A step that saves waits until weights and optimizer are copied to host memory, and no longer. The thread's
collectives have a process group of their own, so that they never mix with the run's.
"""

import gc
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bicc import device, run_lock
from megatron_bicc.checkpoint.megatron_files import (
    cause,
    check_file,
    check_manifest,
    describe_share,
    write_manifest,
)
from megatron_bicc.collective import gathered
from megatron_bicc.errors import NotFiniteError, UserError, first_line
from megatron_bicc.model.policy import Policy

PROGRESS, LATEST, PARTIAL = "progress.json", "latest", ".partial"
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(UserError):
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
    except (OSError, UserError, ValueError, TypeError) as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error


def load_checkpoint(path: Path, policy: Policy, progress: Progress) -> None:
    """Fills the policy, its optimizer and its schedule, under any layout. Collective.

    progress: `read_progress` of the same checkpoint. Raises CheckpointError that names the file that is
    damaged, or the tensor that is not there or not finite, and what to go on from.
    """
    try:
        check_manifest(path)
    except UserError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error
    with device.megatron():
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


T = TypeVar("T")


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Its methods are collective.

    Whenever the processes are killed, the checkpoints that had their names are whole, and `latest` is one.
    A checkpoint that cannot be written is a CheckpointError on every process; the earlier ones stay.
    """

    def __init__(self, output_dir: str, keep: int) -> None:
        """keep: how many of the newest checkpoints stay."""
        self._root, self._keep = Path(output_dir) / "checkpoints", keep
        self._group = dist.new_group(backend="gloo", timeout=device.TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot: tuple[Path, dict[str, Any]] | None = None
        self._writing: Future[None] | None = None
        # megatron-core collects garbage at every save: not among all that was loaded before the first step
        gc.freeze()

    def snapshot(self, policy: Policy, progress: Progress) -> None:
        """Copies what the next checkpoint holds to host memory, once the last one is written.

        Raises CheckpointError for either.
        """
        self.wait()
        final = self._root / f"step_{progress.step:08d}"
        try:
            self._snapshot = final, _take(_aside(final), policy, progress)
        except OSError as error:
            raise _failure(final, error) from error

    def start(self) -> None:
        """Begins to write the snapshot, if there is one."""
        if self._snapshot:
            self._writing = self._thread.submit(self._write, *self._snapshot)
            self._snapshot = None

    def check(self) -> None:
        """Raises CheckpointError for a checkpoint that failed, on all processes at the same call."""
        if self._writing:
            done = torch.tensor(int(self._writing.done()), device=device.device())
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done:
                self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError for a checkpoint that failed."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, final: Path, tensors: dict[str, Any]) -> None:
        """The thread's work."""
        aside = _aside(final)
        try:
            write_tensors(aside, tensors, self._group)
            parts = self._together(lambda: describe_share(aside))
            self._together(lambda: _publish(final, parts, self._keep) if dist.get_rank() == 0 else None)
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, RuntimeError) and device.is_connection_loss(error):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            raise _failure(final, error) from error

    def _together(self, task: Callable[[], T]) -> list[T]:
        """What `task` returns on each process; OSError on all of them if it fails on one."""
        try:
            outcome: tuple[Any, str | None] = (task(), None)
        except OSError as error:
            outcome = (None, str(error))
        outcomes = gathered(outcome, self._group)
        for failure in (failure for _, failure in outcomes if failure):
            raise OSError(failure)
        return [result for result, _ in outcomes]


def _aside(final: Path) -> Path:
    return final.with_name(final.name + PARTIAL)


def _take(aside: Path, policy: Policy, progress: Progress) -> dict[str, Any]:
    """Writes what is small at once; returns the tensors, in host memory, as torch is to write them."""
    if dist.get_rank() == 0:
        run_lock.check()
        for leftover in aside.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    dist.barrier()
    with device.megatron():
        tensors = collect_tensors(aside, host_state(policy))
    if dist.get_rank() == 0:
        (aside / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    return tensors


def collect_tensors(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Writes all but the tensors of a state in megatron-core's format; returns these. Collective."""
    later = _Later("torch_dist", 1)
    dist_checkpointing.save(state, str(directory), sharded_strategy=later)
    return later.tensors


def write_tensors(directory: Path, tensors: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Writes what `collect_tensors` returned, by torch's own writer. Collective over `group`.

    megatron-core's writer starts a process that loads the whole program again, and outlives a killed run.
    """
    dcp.save(
        tensors,
        # of two threads torch would lose the second one's error
        storage_writer=dcp.FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0),
        planner=torch_strategy.MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


class _Later(torch_strategy.TorchDistSaveShardedStrategy):
    """Keeps the tensors that are to be written."""

    tensors: dict[str, Any]

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        main_replicas, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.tensors = torch_strategy.mcore_to_pyt_state_dict(main_replicas, False)


def _publish(final: Path, parts: list[dict[str, Any]], keep: int) -> None:
    """Gives a whole checkpoint its name; at every moment the newest one is whole, and `latest` names one."""
    run_lock.check()
    write_manifest(_aside(final), parts)
    if final.exists():
        _remove(final)
    _aside(final).rename(final)
    link = final.with_name(LATEST + ".new")
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


def _failure(final: Path, error: BaseException) -> CheckpointError:
    """One line, by what failed on whichever process."""
    error = cause(error)
    hint = "; is the disk full?" if isinstance(error, RuntimeError) else ""
    return CheckpointError(
        f"{final}: cannot be written: {first_line(error)}{hint}; "
        "free space and go on by checkpoint.resume=true"
    )
