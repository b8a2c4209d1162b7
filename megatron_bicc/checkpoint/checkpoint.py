"""Writes what a run keeps: training checkpoints in the background, and exports; loads checkpoints.

OUTPUT_DIR/checkpoints/step_00000050    weights and optimizer, sharded; progress.json; manifest.json
OUTPUT_DIR/checkpoints/latest           symbolic link to the newest
OUTPUT_DIR/exports/step_00000050        the policy as a Hugging Face directory, during training
OUTPUT_DIR/hf                           the same at the end

Checkpoints are in megatron-core's dist_checkpointing format. A step that saves waits only until weights and
optimizer are copied to host memory. A thread writes them to a temporary directory and renames it when it is
complete. The thread's collectives have their own process group, so that they never mix with those of the run.
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
    held_state,
    write_manifest,
)
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError, UserError, first_line
from megatron_bicc.metrics import waiting_for
from megatron_bicc.model.policy import Policy
from megatron_bicc.weights.hf_weights import save_hf, step_export

PROGRESS, LATEST, PARTIAL = "progress.json", "latest", ".partial"
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # The optimizer's state is gathered over gloo, in host memory, by one rank of each data- and context-
    # parallel group. By default NCCL gathers it on every GPU, where colocated rollout servers leave no room
    # for it, and every rank keeps all of it on its host until it is written.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""Texts of the RuntimeErrors by which torch's zip writer replaces the system's error, such as a full disk"""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read: one line that names the file and what to do."""


@dataclass(frozen=True)
class Progress:
    """State of a run besides its weights and optimizer: the contents of progress.json."""

    step: int
    """Finished steps"""
    sampler: dict[str, Any]
    """State of rollout.sampling.Collector: the position in the data, groups left over, prompts in flight"""
    scheduler: dict[str, Any]
    """State of the learning-rate schedule"""
    config: dict[str, Any]
    """The configuration that the run was started with"""
    contents: dict[str, str]
    """startup.Inputs.contents: digests of the files that the configuration names"""


def checkpoints(output_dir: str) -> list[Path]:
    """Returns the finished checkpoints of a run, oldest first.

    A checkpoint gets its name when it is complete; later damage is found when it is read.
    """
    root = Path(output_dir) / "checkpoints"
    return sorted(p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and p.is_dir())


def check_writable(output_dir: str) -> None:
    """Raises CheckpointError if no checkpoint can be written there. To be called before the first step."""
    root = Path(output_dir) / "checkpoints"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise CheckpointError(f"output_dir: {root} cannot be written: {error.strerror}") from error


def read_progress(path: Path) -> Progress:
    """Reads progress.json of a checkpoint. Raises CheckpointError if it is damaged."""
    try:
        check_file(path, PROGRESS)
        return Progress(**json.loads((path / PROGRESS).read_text()))
    except (OSError, UserError, ValueError, TypeError) as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error


def load_checkpoint(path: Path, policy: Policy, progress: Progress) -> None:
    """Loads the policy, its optimizer and its schedule, under any parallel layout. Collective.

    progress: `read_progress` of the same checkpoint. Raises CheckpointError that names the damaged file, or
    the tensor that is missing or not finite, and the checkpoint to resume from instead.
    """
    try:
        check_manifest(path)
    except UserError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error
    with device.megatron():
        model = {f"model{i}": held_state(chunk.module, path) for i, chunk in enumerate(policy.chunks)}
        state = model | {"optimizer": _optimizer_state(policy, model, is_loading=True)}
        _check_tensors(state, path)
        state = dist_checkpointing.load(state, str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.module.load_state_dict(state[f"model{i}"], strict=False)
        settings = [_settings(group) for group in policy.optimizer.param_groups]
        policy.optimizer.load_state_dict(state["optimizer"])
        # load_state_dict also takes Adam's decays and epsilon from the checkpoint: restore this run's
        # settings
        for group, own in zip(policy.optimizer.param_groups, settings, strict=True):
            group |= own
            # torch's AdamW counts in floats; the kernel of Transformer Engine's and apex's takes an int
            if "step" in group:
                group["step"] = int(group["step"])
    try:
        policy.check_weights()
    except NotFiniteError as error:
        raise CheckpointError(f"{path}: {error}; {_remedy(path)}") from error
    policy.scheduler.load_state_dict(progress.scheduler)


def _check_tensors(state: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError if the checkpoint lacks a tensor; megatron-core would report it in many lines.

    Earlier versions kept the optimizer of a policy with experts under other names, and trained the experts
    wrongly under tensor parallel alone.
    """
    held = dist_checkpointing.load_tensors_metadata(str(path))
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor) and entry.key not in held:
            raise CheckpointError(
                f"{path}: tensor {entry.key} is missing: written by another model or an older version; "
                f"{_remedy(path)}"
            )


def host_state(policy: Policy) -> dict[str, Any]:
    """Returns the policy's part of a checkpoint, in host memory that training does not change. Collective.

    The first rank of each data- and context-parallel group has the optimizer's part, 12 bytes a parameter of
    its shard; the others have none of it.
    """
    model = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
    # megatron-core gathers the optimizer's part into new host memory; only the weights are still live tensors
    optimizer = _optimizer_state(policy, model, is_loading=False)
    # a rank that gathers nothing has None there, of which megatron-core warns: the first rank has no such key
    for part in (optimizer, *optimizer.values()):
        if isinstance(part, dict) and part.get("param_state", part) is None:
            del part["param_state"]
    for entry in nested_values(model):
        if isinstance(entry.data, Tensor) and is_main_replica(entry.replica_id):
            entry.data = entry.data.detach().to("cpu", copy=True)
    return model | {"optimizer": optimizer}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter group's settings, without its parameters and its step count."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _optimizer_state(policy: Policy, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    return policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)


def _remedy(path: Path) -> str:
    earlier = [p for p in checkpoints(str(path.parents[1])) if p.name < path.name]
    return f"delete {path} to " + (f"resume from {earlier[-1]}" if earlier else "start again")


T = TypeVar("T")


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Its methods are collective.

    Even if the processes are killed, every checkpoint with a final name is complete, and `latest` is one of
    them. A checkpoint that cannot be written raises CheckpointError on every rank; the earlier ones stay.
    """

    def __init__(self, output_dir: str, keep: int) -> None:
        """keep: number of the newest checkpoints that are not removed."""
        self._root, self._keep = Path(output_dir) / "checkpoints", keep
        self._group = dist.new_group(backend="gloo", timeout=device.TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot: tuple[Path, dict[str, Any]] | None = None
        self._writing: Future[None] | None = None
        # megatron-core runs the garbage collector at every save: exempt all that was loaded before the
        # first step
        gc.freeze()

    def snapshot(self, policy: Policy, progress: Progress) -> None:
        """Waits until the last checkpoint is written, then copies the next one's state to host memory.

        Raises CheckpointError if either fails.
        """
        self.wait()
        final = self._root / f"step_{progress.step:08d}"
        try:
            self._snapshot = final, _take(_aside(final), policy, progress)
        except OSError as error:
            raise _failure(final, error) from error

    def start(self) -> None:
        """Starts writing the snapshot, if there is one. Does not wait."""
        if self._snapshot:
            self._writing = self._thread.submit(self._write, *self._snapshot)
            self._snapshot = None

    def check(self) -> None:
        """Raises CheckpointError if a checkpoint failed, at the same call on every rank. Does not wait."""
        if self._writing:
            # a rank whose thread has failed must not raise before the others can: they would enter the next
            # step's collectives and wait there
            done = torch.tensor(int(self._writing.done()), device=device.device())
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done:
                self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises CheckpointError for a checkpoint that failed."""
        if self._writing:
            writing, self._writing = self._writing, None
            with waiting_for("the checkpoint that is being written"):
                writing.result()

    def _write(self, final: Path, tensors: dict[str, Any]) -> None:
        """Runs in the thread."""
        aside = _aside(final)
        try:
            write_tensors(aside, tensors, self._group)
            parts = gathered(self._together(lambda: describe_share(aside)), self._group)
            self._together(lambda: _publish(final, parts, self._keep) if dist.get_rank() == 0 else None)
        except (OSError, CheckpointException) as error:
            if not _is_of_disk(error):
                raise  # a lost peer or a bug keeps its own message and traceback
            shutil.rmtree(aside, ignore_errors=True)
            raise _failure(final, error) from error

    def _together(self, task: Callable[[], T]) -> T:
        """Returns what `task` returns; an OSError of any rank is raised on every rank."""
        with raised_on_all_ranks(OSError, group=self._group):
            result = task()
        return result


def _aside(final: Path) -> Path:
    return final.with_name(final.name + PARTIAL)


def _take(aside: Path, policy: Policy, progress: Progress) -> dict[str, Any]:
    """Writes the small files; returns the tensors, in host memory and in the form that torch writes.

    Does not use `files.atomic_directory`: the directory is created here, in the main thread, and renamed in
    the writing thread. Removes the leftovers of a killed run.
    """
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
    """Writes a state in megatron-core's format except for its tensors, which it returns. Collective."""
    later = _Later("torch_dist", 1)
    dist_checkpointing.save(state, str(directory), sharded_strategy=later)
    return later.tensors


def write_tensors(directory: Path, tensors: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Writes what `collect_tensors` returned. Collective over `group`.

    Uses torch's writer: megatron-core's starts a process that imports the whole program again and outlives a
    killed run.
    """
    dcp.save(
        tensors,
        # one thread: with two, torch drops the second one's error
        storage_writer=dcp.FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0),
        planner=torch_strategy.MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


class _Later(torch_strategy.TorchDistSaveShardedStrategy):
    """A save strategy that keeps the tensors instead of writing them."""

    tensors: dict[str, Any]

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        main_replicas, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.tensors = torch_strategy.mcore_to_pyt_state_dict(main_replicas, False)


def _publish(final: Path, parts: list[dict[str, Any]], keep: int) -> None:
    """Renames a complete checkpoint to its final name, and lets `latest` point to it; removes old ones."""
    run_lock.check()
    write_manifest(_aside(final), parts)
    if final.exists():
        _remove(final)
    _aside(final).rename(final)
    # as `files.atomic_file` does for a file; a symbolic link cannot be synced
    link = final.with_name(LATEST + ".new")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.with_name(LATEST))
    for old in checkpoints(str(final.parents[1]))[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Renames a checkpoint, then removes it: a half-removed one must not look complete."""
    doomed = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _is_of_disk(error: BaseException) -> bool:
    """Returns whether all failures are failed writes: OSError, or torch's replacement for it."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    return all(
        isinstance(own, OSError) or any(words in str(own) for words in TORCH_WRITER) for own, _ in failures
    )


def _failure(final: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a checkpoint that could not be written, from the failure of any rank."""
    own = cause(error)
    hint = "; is the disk full?" if isinstance(own, RuntimeError) else ""
    return CheckpointError(
        f"{final}: cannot be written: {first_line(own)}{hint}; "
        "free space and resume with checkpoint.resume=true"
    )


def export_step(policy: Policy, config: Config, step: int) -> None:
    """Exports the policy after a step, and removes all but the newest export.keep. Collective.

    Raises CheckpointError if it cannot be written.
    """
    target = step_export(config.output_dir, step)
    root = target.parent
    export(policy, config, target)
    if dist.get_rank() == 0:
        whole = sorted(p for p in root.iterdir() if re.fullmatch(r"step_\d{8}", p.name))
        for old in whole[: -config.export.keep]:
            shutil.rmtree(old)


def forget_exports(output_dir: str, step: int) -> None:
    """Removes the exports after a step, unfinished ones included, before a run resumes from its checkpoint.

    They belong to the discarded part of the run, and would count as the newest. For one rank only. Raises
    CheckpointError if one cannot be removed.
    """
    for path in (Path(output_dir) / "exports").glob("step_*"):
        found = re.match(r"step_(\d{8})(\.|$)", path.name)
        if found and int(found[1]) > step:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from error


def export(policy: Policy, config: Config, target: Path) -> None:
    """Exports the policy as it is. Collective. Raises CheckpointError on every rank if that fails."""
    with raised_on_all_ranks(CheckpointError):
        try:
            save_hf(policy.modules, policy.hf_config, Path(config.model.path), target, dist.get_rank() == 0)
        except UserError as error:
            raise CheckpointError(f"{error}; free space and resume with checkpoint.resume=true") from error
