"""Reads and writes the files of a distributed checkpoint: the place of each parameter, and the manifest.

megatron-core's format is independent of the layout: its tensors are whole, and each rank loads its own part.
Its contents for a policy are derived from megatron-core itself, by building the policy on the meta device.
Parameters are read and written one at a time. manifest.json has the size and SHA-256 of every file, so that a
flipped bit is found.
"""

import errno
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.device_cpu import CudaOnCpu
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.model.build import PolicyModel, transformer_config
from megatron_bicc.weights.hf_mapping import TensorRule, cut, from_whole, join, rule_for, to_whole


@dataclass(frozen=True)
class Slot:
    """A parameter of the whole policy, and its place in a tensor of the checkpoint."""

    rule: TensorRule
    key: str
    """Name of the checkpoint's tensor, which stacks this parameter of all layers"""
    offset: tuple[int, ...]
    """Where the parameter starts in that tensor"""
    global_shape: tuple[int, ...]
    shape: torch.Size
    """The parameter's own shape; the tensor has further leading dimensions, of which it takes 1"""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.rule.hf_names(0)

    def to_megatron(self, tensors: list[Tensor], hf_config: PretrainedConfig) -> Tensor:
        """Converts Hugging Face tensors to the parameter."""
        return cut(self.rule.kind, to_whole(self.rule.kind, tensors, hf_config, 1), 0, 1, self.shape)

    def to_hf(self, parameter: Tensor, hf_config: PretrainedConfig) -> list[Tensor]:
        """Converts the parameter to Hugging Face tensors, in the order of `hf_names`."""
        return from_whole(self.rule.kind, join(self.rule.kind, [parameter], hf_config), hf_config)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parameter's shape with all of the checkpoint's dimensions."""
        return (1,) * (len(self.global_shape) - len(self.shape)) + tuple(self.shape)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the checkpoint's tensor, as torch describes it."""
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.sizes))

    def hf_shapes(self, hf_config: PretrainedConfig) -> list[torch.Size]:
        """Returns the shapes of the Hugging Face tensors."""
        return [x.shape for x in self.to_hf(torch.empty(self.shape, device="meta"), hf_config)]


def slots_of(hf_config: PretrainedConfig) -> tuple[list[Slot], list[ShardedObject]]:
    """Returns what a checkpoint of this policy holds: its parameters, and megatron-core's own objects.

    megatron-core's process groups must exist, without model parallel. Raises UserError for an architecture
    that is not supported.
    """
    with CudaOnCpu("meta"):
        with torch.device("meta"):
            model = PolicyModel(transformer_config(hf_config, Config()), hf_config, temperature=1.0)
        state = model.sharded_state_dict()  # the objects of Transformer Engine's layers are tensors with data
    parameters = dict(model.named_parameters())
    slots = [
        _slot(rule_for(name, 0, model.output_norms), state[name], parameters[name].shape)
        for name in parameters
        if name in state
    ]
    return slots, [entry for entry in state.values() if isinstance(entry, ShardedObject)]


def _slot(rule: TensorRule, entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size) -> Slot:
    # a gated linear is two entries, gate and up; the parameter is both, one after the other
    first = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
    return Slot(rule, first.key, tuple(first.global_offset), tuple(first.global_shape), shape)


FORMAT = CheckpointingConfig("torch_dist", 1)


def write_checkpoint(
    directory: Path,
    slots: Iterable[tuple[Slot, torch.dtype]],
    objects: list[ShardedObject],
    read: Callable[[Slot], Tensor],
) -> None:
    """Writes a checkpoint, holding one parameter at a time in memory. Collective.

    slots: those that this process writes, with their types. read: returns the parameter of a slot, which is
    freed when the next one is read. An exception that `read` raises is passed on.
    """
    writer = dcp.FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0, overwrite=True)
    try:
        dcp.save({}, storage_writer=writer, planner=_StreamPlanner(list(slots), objects, read))
    except CheckpointException as error:
        if isinstance(cause(error), RuntimeError):
            # torch's writer drops the errno of the system's error
            raise OSError(errno.EIO, f"{first_line(cause(error))}; is the disk full?") from error
        raise cause(error) from error
    if dist.get_rank() == 0:
        get_default_save_common_strategy().save_common({}, str(directory))
        save_config(FORMAT, str(directory))


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Plans a save from shapes and types; reads each tensor when it is written."""

    def __init__(
        self,
        slots: list[tuple[Slot, torch.dtype]],
        objects: list[ShardedObject],
        read: Callable[[Slot], Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._slots = {MetadataIndex(p.key, p.offset): (p, dtype) for p, dtype in slots}
        self._objects = {MetadataIndex(o.unique_key): o for o in objects if dist.get_rank() == 0}
        self._read = read
        self._written: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index, WriteItemType.BYTE_IO) for index in self._objects]
        items += [_write_item(index, *entry) for index, entry in self._slots.items()]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[write_item.index].data], stream)
            return stream
        if self._written is not None:
            # torch's writer keeps a reference until it closes the file: free the memory underneath
            self._written.untyped_storage().resize_(0)
        slot, _ = self._slots[write_item.index]
        self._written = _own(self._read(slot))
        return self._written.view(slot.sizes)


def _own(tensor: Tensor) -> Tensor:
    """Returns the tensor with its own storage, which can be freed: it may be a view of a mapped file."""
    storage = tensor.untyped_storage()
    owned = storage.resizable() and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if owned else tensor.clone(memory_format=torch.contiguous_format)


def _write_item(index: MetadataIndex, slot: Slot, dtype: torch.dtype) -> WriteItem:
    data = TensorWriteData(slot.chunk, TensorProperties(dtype=dtype), torch.Size(slot.global_shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class MegatronCheckpoint:
    """Reads parameters of a distributed checkpoint, imported or written by a training run."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if it is not a readable distributed checkpoint."""
        self.path, self._reader = path, CachedMetadataFileSystemReader(str(path))
        try:
            self._tensors = dist_checkpointing.load_tensors_metadata(str(path))
        except Exception as error:  # megatron-core raises many types
            raise UserError(f"{path}: not a distributed checkpoint: {first_line(cause(error))}") from error

    def check(self, slots: list[Slot]) -> None:
        """Raises UserError that names the first tensor that is missing or misshapen."""
        for slot in slots:
            if slot.key not in self._tensors:
                raise UserError(f"{self.path}: tensor {slot.key} is missing")
            found, wanted = self._tensors[slot.key].global_shape, slot.global_shape
            # tensor parallel pads the rows of the vocabulary
            padded = slot.rule.kind == "vocab" and found[0] >= wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not padded:
                raise UserError(
                    f"{self.path}: tensor {slot.key} has shape {found}; config.json requires {wanted}"
                )

    def dtype(self, slot: Slot) -> torch.dtype:
        """Returns the type of the parameter."""
        return self._tensors[slot.key].dtype

    def read(self, slot: Slot) -> Tensor:
        """Returns a whole parameter on the CPU. Raises UserError if the checkpoint is damaged."""
        parameter = torch.empty(slot.shape, dtype=self.dtype(slot))
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns that no_dist assumes one process
                dcp.load({}, storage_reader=self._reader, planner=_SlotPlanner(slot, parameter), no_dist=True)
        except (Exception, CheckpointException) as error:  # torch raises many types
            reason = first_line(cause(error))
            raise UserError(f"{self.path}: {slot.key} cannot be read: {reason}") from error
        return parameter


class _SlotPlanner(dcp.DefaultLoadPlanner):
    """Plans a load of one parameter from the shards that a checkpoint cut it into."""

    def __init__(self, slot: Slot, parameter: Tensor) -> None:
        super().__init__(flatten_state_dict=False)
        self._slot, self._target = slot, parameter.view(slot.sizes)

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata[self._slot.key]
        return LoadPlan(create_read_items_for_chunk_list(self._slot.key, stored, [self._slot.chunk]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        bounds = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in bounds)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Does nothing: the reader has written into the parameter."""


def held_state(chunk: PolicyModel, path: Path) -> dict[str, Any]:
    """Returns a chunk's sharded state, to be loaded, without quantisation state that the checkpoint lacks.

    Of Transformer Engine's layers more have an `_extra_state` than of megatron-core's own. It is empty unless
    a layer multiplies in fp8, so a checkpoint written with either is complete for the other.
    """
    try:
        held = CachedMetadataFileSystemReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # torch raises many types
        raise UserError(f"{path}: cannot be loaded: {first_line(cause(error))}") from error
    return {
        name: entry
        for name, entry in chunk.sharded_state_dict().items()
        if "_extra_state" not in name or entry.unique_key in held
    }


def load_chunks(chunks: list[PolicyModel], path: Path) -> None:
    """Fills this rank's parameters, under any layout. Collective.

    Raises UserError if the checkpoint does not fit or is damaged.
    """
    with device.megatron():
        state = {f"model{i}": held_state(chunk, path) for i, chunk in enumerate(chunks)}
        try:
            loaded = dist_checkpointing.load(state, str(path))
        except (Exception, CheckpointException) as error:  # megatron-core and torch raise many types
            raise UserError(f"{path}: cannot be loaded: {first_line(cause(error))}") from error
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def cause(error: BaseException) -> BaseException:
    """Returns the error of the process that failed, if torch has wrapped it."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


MANIFEST = "manifest.json"


def describe_share(directory: Path) -> dict[str, Any]:
    """Returns this process's share of the manifest: size and SHA-256 of files assigned round-robin."""
    return {name: _describe(directory / name) for name in _share(_names(directory))}


def write_manifest(directory: Path, parts: list[dict[str, Any]]) -> None:
    """Writes the manifest from the shares of all processes."""
    files = {name: found for part in parts for name, found in part.items()}
    (directory / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True))


def check_file(directory: Path, name: str) -> None:
    """Raises UserError if the file is missing or does not match the manifest."""
    if damage := _damage(directory, [name]):
        raise UserError(damage)


def check_manifest(directory: Path) -> None:
    """Raises UserError on every process, naming a file that is missing or does not match. Collective."""
    for damage in filter(None, gathered(_damage(directory))):
        raise UserError(damage)


def check_if_listed(directory: Path) -> None:
    """Runs `check_manifest` if there is a manifest: checkpoints of older versions have none. Collective."""
    if (directory / MANIFEST).exists():
        try:
            check_manifest(directory)
        except UserError as error:
            raise UserError(f"{error}; take an intact copy or another checkpoint") from error


def _damage(directory: Path, names: list[str] | None = None) -> str | None:
    """Returns the first damaged file, in words; None: `names`, or this process's share of all, are intact."""
    try:
        files = json.loads((directory / MANIFEST).read_text())
        for name in names or _share(sorted(files)):
            if _describe(directory / name) != files[name]:
                return f"{directory / name} is damaged: it is not what {MANIFEST} says"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{getattr(error, 'filename', None) or directory / MANIFEST} cannot be read: {error}"
    return None


def _names(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
