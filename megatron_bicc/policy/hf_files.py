"""The files of a Hugging Face directory: its tensors one at a time, in and out, and what lies beside them."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron_bicc.errors import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
IGNORED = re.compile(r"\brotary_emb\.inv_freq$")
"""Rotary frequencies that old versions of transformers stored: every reader makes them from config.json"""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "*token*",
    "merges.txt",
    "vocab.*",
)


class HfTensors(Protocol):
    """The tensors of a Hugging Face directory."""

    path: Path
    file_of: dict[str, str]
    """Which file holds a tensor"""

    def describe(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor, as meta tensors, without reading any."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises ValueError if it is missing or its file is damaged."""
        ...


class SafetensorsDirectory:
    """Reads single tensors out of a Hugging Face directory, sharded or in one file."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError if the directory holds no readable safetensors."""
        self.path = Path(path)
        index = index_of(self.path)
        self.file_of = weight_map(index) if index else dict.fromkeys(self._headers(SINGLE), SINGLE)

    def describe(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor of the files' headers, as meta tensors.

        Raises ValueError that names a file that is missing or truncated, or where index and files differ: a
        reader that goes by the files would then take other tensors than one that goes by the index.
        """
        headers = {file: self._headers(file) for file in self._files()}
        for name, file in self.file_of.items():
            if name not in headers[file]:
                raise ValueError(f"{self.path / file}: does not hold tensor {name}, which {INDEX} puts there")
        for file, held in headers.items():
            for name in held:
                if self.file_of.get(name) != file:
                    raise ValueError(
                        f"{self.path / file}: holds tensor {name}, which {INDEX} does not put there"
                    )
        return {name: headers[file][name] for name, file in self.file_of.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises ValueError if it is missing or its file is damaged."""
        if name not in self.file_of:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        file_name = self.file_of[name]
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file_name}: cannot be read: {error}") from error

    def slices(self) -> dict[str, Any]:
        """Every tensor as safetensors' own slice, which reads from its file when it is indexed."""
        files = {name: safe_open(self.path / name, framework="pt") for name in self._files()}
        return {name: files[file].get_slice(name) for name, file in self.file_of.items()}

    def _files(self) -> list[str]:
        return sorted(set(self.file_of.values()))

    def _headers(self, file_name: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                names = [name for name in file.keys() if not IGNORED.search(name)]  # noqa: SIM118
                return {name: _meta(file.get_slice(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file_name}: cannot be read: {error}") from error


class PickleDirectory:
    """Reads single tensors out of pytorch_model.bin files: tensors only, and mapped, not loaded."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError if the directory holds no readable pytorch_model.bin."""
        self.path = Path(path)
        index = self.path / PICKLED_INDEX
        named = weight_map(index) if index.is_file() else {}
        self._tensors: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        for file in sorted(set(named.values())) or [PICKLED]:
            tensors = self._map(file)
            self._tensors |= tensors
            self.file_of |= dict.fromkeys(tensors, file)
        for name in named.keys() - self._tensors.keys():
            raise ValueError(
                f"{self.path / named[name]}: does not hold tensor {name}, which the index puts there"
            )

    def describe(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor, as meta tensors."""
        return {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises ValueError if it is missing."""
        if name not in self._tensors:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]

    def _map(self, file_name: str) -> dict[str, Tensor]:
        try:
            held = torch.load(self.path / file_name, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError as error:  # torch's own text recommends to load it all the same
            raise ValueError(
                f"{self.path / file_name}: cannot be read: damaged, or it holds more than tensors"
            ) from error
        except Exception as error:  # torch raises many kinds for a damaged or hostile pickle
            raise ValueError(f"{self.path / file_name}: cannot be read: {first_line(error)}") from error
        if isinstance(held, dict) and all(isinstance(tensor, Tensor) for tensor in held.values()):
            return held
        raise ValueError(f"{self.path / file_name}: holds no dictionary of tensors")


def open_tensors(path: str | Path, allow_pickle: bool) -> HfTensors:
    """The directory's safetensors; its pickled tensors only where there are none and `allow_pickle` says so.

    Raises ValueError that names what is missing or damaged.
    """
    path = Path(path)
    if has_safetensors(path):
        return SafetensorsDirectory(path)
    pickled = (path / PICKLED).is_file() or (path / PICKLED_INDEX).is_file()
    if pickled and allow_pickle:
        return PickleDirectory(path)
    if pickled:
        raise ValueError(
            f"{path}: holds pickled tensors only; if you trust their origin, convert them by "
            "tools/convert_hf_checkpoint.py import --allow-pickle and export"
        )
    raise ValueError(f"{path}: there is no {SINGLE} and no {INDEX} in it")


def has_safetensors(path: Path) -> bool:
    """Whether the directory holds safetensors under the names that transformers reads."""
    return (path / SINGLE).is_file() or (path / INDEX).is_file()


def index_of(path: Path) -> Path | None:
    """The index that says which file holds which tensor, or None where one file holds them all.

    transformers' rule: beside a model.safetensors no index is read.
    """
    return path / INDEX if (path / INDEX).is_file() and not (path / SINGLE).is_file() else None


def read_config(path: str | Path) -> PretrainedConfig:
    """The directory's config.json. Remote code is never run, and no other directory is looked in.

    Raises ValueError if it is missing or transformers does not know its architecture.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: there is no Hugging Face config.json in it")
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged or unknown configuration
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}/config.json: cannot be used: {reason}") from error
    if vars(hf_config).get("head_dim", 0) is None:
        # hidden size / heads to some of transformers' classes, as no head_dim is to all; others fail on it
        del hf_config.head_dim
    return hf_config


def copy_side_files(source: Path, target: Path) -> None:
    """Copies configuration, generation configuration and tokenizer, byte for byte."""
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)


def side_files(path: Path) -> list[Path]:
    """The directory's configuration, generation configuration and tokenizer, by name."""
    return sorted({file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()})


def write_index(target: Path, file_of: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """model.safetensors.index.json; tensors: shape and dtype of each, meta tensors will do."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    metadata = {"total_parameters": parameters, "total_size": size}
    index = {"metadata": metadata, "weight_map": dict(sorted(file_of.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, described: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One safetensors file, holding one tensor at a time in memory.

    described: shape and dtype of every tensor, in the order in which `tensors` gives them. The format: a
    uint64 with the header's length, the header in JSON, the tensors' bytes one after another.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in described.items():
        start, end = end, end + tensor.nbytes
        names = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = names
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, described, strict=True):
            assert name == expected, f"{name} comes where {expected} was described"
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_model(
    target: Path, described: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], largest_file: int
) -> None:
    """One safetensors file, or several with their index, in the order of `tensors`, one of which is held.

    described: shape and dtype of every tensor, in the same order. Files are of at most `largest_file` bytes,
    unless one tensor is larger.
    """
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in described.items():
        if files[-1] and sum(x.nbytes for x in files[-1].values()) + tensor.nbytes > largest_file:
            files.append({})
        files[-1][name] = tensor
    total = len(files)
    names = (
        [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else [SINGLE]
    )
    for file, held in zip(names, files, strict=True):
        write_file(target / file, held, itertools.islice(tensors, len(held)))
    if total > 1:
        file_of = {name: file for file, held in zip(names, files, strict=True) for name in held}
        write_index(target, file_of, described)


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, without those that are ignored. Raises ValueError if it is damaged."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(Path(file).name == file for file in weight_map.values()):
            return {name: file for name, file in weight_map.items() if not IGNORED.search(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of tensors: {error}") from error
    raise ValueError(f"{index}: names a file outside of its directory")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _meta(header: "safe_open") -> Tensor:
    dtype = _DTYPES.get(header.get_dtype(), torch.uint8)
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")
