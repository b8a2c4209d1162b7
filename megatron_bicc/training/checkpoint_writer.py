"""Writing checkpoints while the run goes on: by a thread, aside, renamed when whole.

A step that saves waits until weights and optimizer are copied to host memory, and no longer. The thread's
collectives have a process group of their own, so that they never mix with the run's.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bicc import platform, run_lock
from megatron_bicc.errors import first_line
from megatron_bicc.platform.gather import gathered
from megatron_bicc.policy.manifest import describe_share, write_manifest
from megatron_bicc.policy.megatron_files import cause
from megatron_bicc.policy.policy import Policy
from megatron_bicc.training.checkpoint import (
    LATEST,
    PARTIAL,
    PROGRESS,
    CheckpointError,
    Progress,
    checkpoints,
    host_state,
)

T = TypeVar("T")


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Its methods are collective.

    Whenever the processes are killed, the checkpoints that had their names are whole, and `latest` is one.
    A checkpoint that cannot be written is a CheckpointError on every process; the earlier ones stay.
    """

    def __init__(self, output_dir: str, keep: int) -> None:
        """keep: how many of the newest checkpoints stay."""
        self._root, self._keep = Path(output_dir) / "checkpoints", keep
        self._group = dist.new_group(backend="gloo", timeout=platform.TIMEOUT)
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
            done = torch.tensor(int(self._writing.done()), device=platform.device())
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
            if isinstance(error, RuntimeError) and platform.is_connection_loss(error):
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
    with platform.megatron():
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
