"""Reads, writes and checks the files of a Hugging Face directory, one tensor at a time.

Training, evaluation, dry run, plan and conversion all use `checked_tensors`, so all of them accept the same
directories, and the rollout engine's model is filled with the same tensors as the policy.
"""

import copy
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron_bicc import device
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.model.families import family_of, head_dim, supported_config

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
IGNORED = re.compile(r"\brotary_emb\.inv_freq$")
"""Rotary frequencies that old versions of transformers stored; every reader computes them from config.json"""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "*token*",
    "merges.txt",
    "vocab.*",
)


class TensorReader(Protocol):
    """Reads single tensors by their Hugging Face names."""

    path: Path
    """For messages"""

    def read(self, name: str) -> Tensor:
        """Returns one tensor on the CPU. Raises UserError if it is missing or its file is damaged."""
        ...


class HfTensors(TensorReader, Protocol):
    """The tensors of a Hugging Face directory."""

    file_of: dict[str, str]
    """Name of the file that holds each tensor"""

    def describe(self) -> dict[str, Tensor]:
        """Returns shape and dtype of every tensor, as meta tensors, without reading any."""
        ...

    def slices(self) -> dict[str, Any]:
        """Returns every tensor, or an object that reads it from its file when it is indexed."""
        ...


class SafetensorsDirectory:
    """Reads single tensors out of a Hugging Face directory's safetensors; each file's header is read once."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the directory contains no readable safetensors."""
        self.path = Path(path)
        index = index_of(self.path)
        self._has_index = index is not None
        self.file_of = weight_map(index) if index else dict.fromkeys(self._headers[SINGLE], SINGLE)

    def describe(self) -> dict[str, Tensor]:
        """Returns shape and dtype of every tensor, as meta tensors.

        Raises UserError that names a file that is missing or truncated, or a tensor on which index and files
        disagree: a reader of the files would then load other tensors than a reader of the index.
        """
        headers = self._headers
        for name, file in self.file_of.items():
            if name not in headers[file]:
                raise UserError(
                    f"{self.path / file}: does not contain tensor {name}, which {INDEX} puts there"
                )
        for file, held in headers.items():
            for name in held:
                if self.file_of.get(name) != file:
                    raise UserError(
                        f"{self.path / file}: contains tensor {name}, which {INDEX} does not put there"
                    )
        return {name: headers[file][name] for name, file in self.file_of.items()}

    def read(self, name: str) -> Tensor:
        """Returns one tensor on the CPU. Raises UserError if it is missing or its file is damaged."""
        if name not in self.file_of:
            raise UserError(f"{self.path}: tensor {name} is missing")
        file_name = self.file_of[name]
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file_name}: cannot be read: {error}") from error

    def slices(self) -> dict[str, Any]:
        """Returns every tensor as a safetensors slice, which reads from its file when it is indexed."""
        files = {name: safe_open(self.path / name, framework="pt") for name in self._headers}
        return {name: files[file].get_slice(name) for name, file in self.file_of.items()}

    @cached_property
    def _headers(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every file, as meta tensors."""
        names = sorted(set(self.file_of.values())) if self._has_index else [SINGLE]
        return {name: self._header(name) for name in names}

    def _header(self, file_name: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                names = [name for name in file.keys() if not IGNORED.search(name)]  # noqa: SIM118
                return {name: _meta(file.get_slice(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file_name}: cannot be read: {error}") from error


class PickleDirectory:
    """Reads single tensors out of pytorch_model.bin files, which are mapped; only tensors are unpickled."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the directory contains no readable pytorch_model.bin."""
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
            raise UserError(
                f"{self.path / named[name]}: does not contain tensor {name}, which the index puts there"
            )

    def describe(self) -> dict[str, Tensor]:
        """Returns shape and dtype of every tensor, as meta tensors."""
        return {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Returns one tensor on the CPU. Raises UserError if it is missing."""
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]

    def slices(self) -> dict[str, Tensor]:
        """Returns every tensor, mapped from its file."""
        return dict(self._tensors)

    def _map(self, file_name: str) -> dict[str, Tensor]:
        try:
            held = torch.load(self.path / file_name, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError as error:  # torch's own text recommends to load it anyway
            raise UserError(
                f"{self.path / file_name}: cannot be read: damaged, or it contains more than tensors"
            ) from error
        except Exception as error:  # torch raises many types for a damaged or hostile pickle
            raise UserError(f"{self.path / file_name}: cannot be read: {first_line(error)}") from error
        if isinstance(held, dict) and all(isinstance(tensor, Tensor) for tensor in held.values()):
            return held
        raise UserError(f"{self.path / file_name}: contains no dictionary of tensors")


def open_tensors(path: str | Path, allow_pickle: bool) -> HfTensors:
    """Opens the directory's safetensors, or its pickled tensors if there are none and `allow_pickle` is set.

    Raises UserError that names what is missing or damaged.
    """
    path = Path(path)
    if has_safetensors(path):
        return SafetensorsDirectory(path)
    pickled = (path / PICKLED).is_file() or (path / PICKLED_INDEX).is_file()
    if pickled and allow_pickle:
        return PickleDirectory(path)
    if pickled:
        raise UserError(
            f"{path}: contains pickled tensors only; if you trust their origin, convert them by "
            "tools/convert_hf_checkpoint.py import --allow-pickle and export"
        )
    raise UserError(f"{path}: there is no {SINGLE} and no {INDEX} in it")


def has_safetensors(path: Path) -> bool:
    """Returns whether the directory holds safetensors under the names that transformers reads."""
    return (path / SINGLE).is_file() or (path / INDEX).is_file()


def index_of(path: Path) -> Path | None:
    """Returns the index of tensors by file; None if one file holds them all.

    As in transformers, an index next to a model.safetensors is not read.
    """
    return path / INDEX if (path / INDEX).is_file() and not (path / SINGLE).is_file() else None


def copy_side_files(source: Path, target: Path) -> None:
    """Copies configuration, generation configuration and tokenizer, byte for byte."""
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)


def side_files(path: Path) -> list[Path]:
    """Returns the directory's configuration, generation configuration and tokenizer files, by name."""
    return sorted({file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()})


def write_index(target: Path, file_of: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Writes model.safetensors.index.json. tensors: shape and dtype of each, such as meta tensors."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    metadata = {"total_parameters": parameters, "total_size": size}
    index = {"metadata": metadata, "weight_map": dict(sorted(file_of.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, described: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes one safetensors file, holding one tensor at a time in memory.

    described: shape and dtype of every tensor, in the order in which `tensors` yields them. The format: a
    uint64 with the header's length, the header in JSON, the tensors' bytes one after another.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in described.items():
        start, end = end, end + tensor.nbytes
        place = {"data_offsets": [start, end]}
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, described, strict=True):
            assert name == expected, f"got {name} where {expected} was described"
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_model(
    target: Path, described: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], largest_file: int
) -> None:
    """Writes one safetensors file, or several with their index, holding one tensor at a time in memory.

    described: shape and dtype of every tensor, in the order of `tensors`. Files have at most `largest_file`
    bytes, unless one tensor is larger.
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
    """Returns the file that holds each tensor, from an index. Raises UserError if it is damaged."""
    try:
        file_of = json.loads(index.read_text())["weight_map"]
        if all(Path(file).name == file for file in file_of.values()):
            return {name: file for name, file in file_of.items() if not IGNORED.search(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of tensors: {error}") from error
    raise UserError(f"{index}: names a file outside of its directory")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _meta(header: "safe_open") -> Tensor:
    dtype = _DTYPES.get(header.get_dtype(), torch.uint8)
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def checked_tensors(path: str | Path, hf_config: PretrainedConfig, allow_pickle: bool = False) -> HfTensors:
    """Opens the directory's tensors after comparing their names, shapes and types with config.json.

    Reads headers only, except where the files hold an output layer that config.json ties to the embedding:
    then it compares the two. Raises UserError, one line, for a damaged file, and for the first tensor that is
    missing, unexpected, misshapen or not of a floating-point type.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}/adapter_config.json: an adapter is not applied; merge it into the model, or remove it"
        )
    tensors = open_tensors(path, allow_pickle)
    found = tensors.describe()
    if problem := mismatch(hf_config, found):
        raise UserError(f"{path}: {problem}")
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: tensor {name} is not of float32, float16 or bfloat16")
    _check_tied_output(tensors, hf_config, found)
    return tensors


def warn_of_index(path: str | Path) -> None:
    """Logs one line, on the first process, if an unused index lies next to model.safetensors."""
    if device.is_first() and all((Path(path) / name).is_file() for name in (SINGLE, INDEX)):
        logger.warning("%s: %s is next to %s and is not read, as in transformers", path, INDEX, SINGLE)


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of a supported model; no output layer if it is tied."""
    family, c = family_of(hf_config), hf_config
    hidden, channels = c.hidden_size, head_dim(c)
    queries, keys = c.num_attention_heads * channels, c.num_key_value_heads * channels
    rows = {"q": queries, "k": keys, "v": keys}
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"self_attn.{x}_proj.weight": (rows[x], hidden) for x in rows}
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    if family.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (rows[x],) for x in rows}
    if family.output_norms:
        layer |= {f"{x}_feedforward_layernorm.weight": (hidden,) for x in ("pre", "post")}
    if family.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (channels,) for x in "qk"}
    inner = c.moe_intermediate_size if family.experts else c.intermediate_size
    for mlp in [f"mlp.experts.{e}." for e in range(c.num_experts)] if family.experts else ["mlp."]:
        layer |= {f"{mlp}{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        layer[f"{mlp}down_proj.weight"] = (hidden, inner)
    if family.experts:
        layer["mlp.gate.weight"] = (c.num_experts, hidden)
    if family.shared_expert:
        inner, mlp = c.shared_expert_intermediate_size, "mlp.shared_expert."
        layer |= {f"{mlp}{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        layer |= {f"{mlp}down_proj.weight": (hidden, inner), "mlp.shared_expert_gate.weight": (1, hidden)}
    shapes = {EMBEDDING: (c.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not c.tie_word_embeddings:
        shapes[OUTPUT] = (c.vocab_size, hidden)
    return shapes | {
        f"model.layers.{i}.{name}": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()
    }


def mismatch(hf_config: PretrainedConfig, found: Mapping[str, Tensor]) -> str | None:
    """Returns what is wrong with the names or shapes of a supported model's tensors; None if nothing is.

    A tied output layer may be present or absent.
    """
    expected = expected_shapes(hf_config)
    if hf_config.tie_word_embeddings and OUTPUT in found:
        expected[OUTPUT] = expected[EMBEDDING]
    for name, shape in expected.items():
        if name not in found:
            return f"tensor {name} is missing"
        if found[name].shape != shape:
            return f"tensor {name} has shape {tuple(found[name].shape)}; config.json requires {shape}"
    for name in sorted(found.keys() - expected.keys()):
        return f"tensor {name} is not part of a {hf_config.architectures[0]}; remove it"
    return None


def load_transformers(
    path: str | Path, dtype: torch.dtype, tensors: HfTensors | None = None
) -> PreTrainedModel:
    """Loads transformers' own model on the CPU, in evaluation mode, with the tensors that the policy reads.

    tensors: those of the directory, if `checked_tensors` has opened them. Raises UserError, one line, for a
    directory that is not supported or damaged.
    """
    hf_config = copy.deepcopy(supported_config(path))
    tensors = tensors or checked_tensors(path, hf_config)
    # It matters to the embedding's gradient only, and transformers fails on one outside of the vocabulary.
    hf_config.pad_token_id = None
    slices = tensors.slices()
    if hf_config.tie_word_embeddings:
        slices.pop(OUTPUT, None)
    try:
        # config.json must not choose the kernels: naming one could download and run it
        return getattr(transformers, hf_config.architectures[0]).from_pretrained(
            None, config=hf_config, state_dict=slices, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its weights cannot be read: {first_line(error)}") from error


def _check_tied_output(tensors: HfTensors, hf_config: PretrainedConfig, found: dict[str, Tensor]) -> None:
    if not hf_config.tie_word_embeddings or OUTPUT not in found:
        return
    if not torch.equal(tensors.read(OUTPUT), tensors.read(EMBEDDING)):
        raise UserError(
            f"{tensors.path}: tensor {OUTPUT} differs from {EMBEDDING}, "
            "but config.json has tie_word_embeddings=true"
        )


SLICES, SLICE_BYTES = 8, 4096


def fingerprint(path: str | Path) -> tuple[str, str]:
    """Returns two SHA-256 by which models can be told apart quickly: (of its files, of its weights).

    The first is of the side files' content and of the safetensors' names and sizes; the second of a few
    slices of each safetensors file, since all of their bytes would take minutes. Neither depends on where the
    directory is and when it was written.
    """
    weights = sorted(Path(path).glob("*.safetensors"))
    files = hashlib.sha256(repr([(file.name, file.stat().st_size) for file in weights]).encode())
    for file in side_files(Path(path)):
        files.update(file.name.encode() + file.read_bytes())
    return files.hexdigest(), hashlib.sha256(b"".join(map(_slices, weights))).hexdigest()


def _slices(path: Path) -> bytes:
    """Returns slices of a file from its first to its last byte, evenly spaced."""
    end = max(path.stat().st_size - SLICE_BYTES, 0)
    with path.open("rb") as file:
        return b"".join(_read_at(file, end * i // (SLICES - 1)) for i in range(SLICES))


def _read_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.read(SLICE_BYTES)
