"""Converts between a Hugging Face directory and megatron-core's distributed checkpoint.

CHECKPOINT/hf/ keeps what the checkpoint's format cannot hold: configuration, tokenizer, and the index of
tensors by file. With it an import followed by an export restores every tensor, and these files byte for byte.
"""

import json
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.checkpoint.megatron_files import (
    MegatronCheckpoint,
    Slot,
    check_if_listed,
    describe_share,
    slots_of,
    write_checkpoint,
    write_manifest,
)
from megatron_bicc.collective import gathered, shared_atomic_directory
from megatron_bicc.errors import UserError
from megatron_bicc.files import check_disk, check_target
from megatron_bicc.model.families import supported_config
from megatron_bicc.model.policy import is_finite
from megatron_bicc.weights.hf_files import (
    EMBEDDING,
    INDEX,
    OUTPUT,
    SINGLE,
    HfTensors,
    checked_tensors,
    copy_side_files,
    index_of,
    warn_of_index,
    weight_map,
    write_file,
    write_index,
)

HF = "hf"


def import_hf(source: Path, target: Path, allow_pickle: bool) -> None:
    """Converts a Hugging Face directory to a distributed checkpoint for every layout. Collective.

    Holds about three parameters in memory, however large the model. Raises UserError, one line, for an
    architecture that is not supported, tensors that do not fit config.json or are not finite, a damaged file
    or a full disk.
    """
    check_target(target)
    hf_config = supported_config(source)
    tensors = checked_tensors(source, hf_config, allow_pickle)
    found = tensors.describe()
    warn_of_index(source)
    slots, objects = slots_of(hf_config)
    _check_types(source, slots, found)
    check_disk(target, sum(tensor.nbytes for tensor in found.values()))
    own = slots[dist.get_rank() :: dist.get_world_size()]
    with shared_atomic_directory(target) as partial, _bar(f"import {source}", own, found) as bar:

        def read(slot: Slot) -> Tensor:
            parts = {name: tensors.read(name) for name in slot.hf_names}
            _check_finite(source, parts)
            parameter = slot.to_megatron(list(parts.values()), hf_config)
            bar.update(parameter.nbytes)
            return parameter

        if dist.get_rank() == 0:
            (partial / HF).mkdir()
            copy_side_files(source, partial / HF)
            _keep_index(source, partial / HF, _safetensors_names(tensors), found)
        write_checkpoint(partial, [(p, found[p.hf_names[0]].dtype) for p in own], objects, read)
        _list_files(partial)


def export_hf(source: Path, target: Path, side_files: Path | None) -> None:
    """Converts a distributed checkpoint to a Hugging Face directory. Collective: processes share the files.

    side_files: directory of configuration and tokenizer; None: the checkpoint's own hf/. Holds one of the
    written files in memory, and the largest tensor. Raises UserError, one line, for a checkpoint that does
    not fit its configuration or its manifest, values that are not finite, a damaged file or a full disk.
    """
    check_target(target)
    if side_files is None and source.is_dir() and not (source / HF).is_dir():
        raise UserError(
            f"{source}: there is no {HF}/ in it with configuration and tokenizer; "
            "for a run's checkpoint give the model's directory by --hf"
        )
    beside = side_files or source / HF
    hf_config = supported_config(beside)
    check_if_listed(source)
    slots, _ = slots_of(hf_config)
    checkpoint = MegatronCheckpoint(source)
    checkpoint.check(slots)
    # larger types first keep every tensor of a file aligned
    slots.sort(key=lambda slot: -checkpoint.dtype(slot).itemsize)
    tensors = _exported(checkpoint, slots, hf_config)
    file_of = weight_map(index) if (index := index_of(beside)) else _split(tensors, hf_config)
    if OUTPUT not in file_of:
        tensors.pop(OUTPUT, None)
    _check_index(beside, file_of, tensors)
    check_disk(target, sum(tensor.nbytes for tensor in tensors.values()))
    files = sorted(set(file_of.values()))
    with shared_atomic_directory(target) as partial:
        own = files[dist.get_rank() :: dist.get_world_size()]
        for file in tqdm(own, f"export {source}", unit="file", disable=device.quiet()):
            names = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
            write_file(partial / file, names, _read_file(checkpoint, slots, names, hf_config))
        if dist.get_rank() == 0:
            copy_side_files(beside, partial)
            if files != [SINGLE]:
                _keep_index(beside, partial, file_of, tensors)


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError for NaN or infinite values, which a policy could not be loaded with."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{path}: tensor {name} contains NaN or infinite values; take an intact copy")


def _list_files(directory: Path) -> None:
    """Writes the manifest. Collective."""
    dist.barrier()  # until all processes have written their files
    parts = gathered(describe_share(directory))
    if dist.get_rank() == 0:
        write_manifest(directory, parts)


def _check_types(source: Path, slots: list[Slot], found: dict[str, Tensor]) -> None:
    """Raises UserError for tensors of several types that a checkpoint keeps in one tensor."""
    first: dict[str, str] = {}
    for slot in slots:
        for name in slot.hf_names:
            other = first.setdefault(slot.key, name)
            if found[name].dtype != found[other].dtype:
                raise UserError(
                    f"{source}: tensor {name} is {found[name].dtype} and {other} is {found[other].dtype}; "
                    "megatron-core keeps both in one tensor, convert one of them"
                )


def _hf_places(slot: Slot, hf_config: PretrainedConfig) -> list[tuple[int, str]]:
    """Returns (position in `slot.to_hf`, tensor name); a tied embedding may be stored as output layer too."""
    places = list(enumerate(slot.hf_names))
    tied = hf_config.tie_word_embeddings and slot.hf_names == (EMBEDDING,)
    return [*places, (0, OUTPUT)] if tied else places


def _exported(
    checkpoint: MegatronCheckpoint, slots: list[Slot], hf_config: PretrainedConfig
) -> dict[str, Tensor]:
    """Returns every Hugging Face tensor of the policy, as meta tensors of the checkpoint's types."""
    return {
        name: torch.empty(slot.hf_shapes(hf_config)[i], dtype=checkpoint.dtype(slot), device="meta")
        for slot in slots
        for i, name in _hf_places(slot, hf_config)
    }


def _split(tensors: dict[str, Tensor], hf_config: PretrainedConfig) -> dict[str, str]:
    """Returns the file of each tensor, as transformers would split them."""
    tensors = {n: x for n, x in tensors.items() if n != OUTPUT or not hf_config.tie_word_embeddings}
    return dict(split_torch_state_dict_into_shards(tensors, max_shard_size="5GB").tensor_to_filename)


def _check_index(beside: Path, file_of: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name in sorted(file_of.keys() ^ tensors.keys()):
        raise UserError(f"{beside / INDEX}: tensor {name} is not in both the index and the policy")


def _read_file(
    checkpoint: MegatronCheckpoint, slots: list[Slot], names: Container[str], hf_config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of one file, in the order of `slots`."""
    for slot in slots:
        places = [(i, name) for i, name in _hf_places(slot, hf_config) if name in names]
        if places:
            tensors = slot.to_hf(checkpoint.read(slot), hf_config)
            found = {name: tensors[i] for i, name in places}
            _check_finite(checkpoint.path, found)
            yield from found.items()


def _keep_index(source: Path, target: Path, file_of: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Copies the source's own index if it is complete and agrees; else writes a new one."""
    index = index_of(source)
    written = json.loads(index.read_text()) if index else {}
    # transformers fails on an index without metadata
    if written.get("weight_map") == file_of and isinstance(written.get("metadata"), dict):
        shutil.copyfile(index, target / INDEX)
    else:
        write_index(target, file_of, tensors)


def _safetensors_names(tensors: HfTensors) -> dict[str, str]:
    """Returns file_of with the names that an export gives to the files, which are safetensors."""
    return {
        name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        for name, file in tensors.file_of.items()
    }


def _bar(title: str, slots: list[Slot], found: dict[str, Tensor]) -> tqdm:
    total = sum(found[name].nbytes for slot in slots for name in slot.hf_names)
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=device.quiet())
