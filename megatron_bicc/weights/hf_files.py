"""The files of a Hugging Face directory: its tensors one at a time, in and out, and what lies beside them.

A Hugging Face directory as a policy: what every command checks before it uses one, and reads it by.

Training, evaluation, dry run, plan and conversion all come by here, so they give one verdict; and the rollout
engine's model is filled with the same tensors as the policy.
"""

import copy
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from megatron_bicc import device
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.model.families import family_of, head_dim

logger = logging.getLogger(__name__)

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
        """One tensor on the CPU. Raises UserError if it is missing or its file is damaged."""
        ...


class SafetensorsDirectory:
    """Reads single tensors out of a Hugging Face directory, sharded or in one file."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the directory holds no readable safetensors."""
        self.path = Path(path)
        index = index_of(self.path)
        self.file_of = weight_map(index) if index else dict.fromkeys(self._headers(SINGLE), SINGLE)

    def describe(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor of the files' headers, as meta tensors.

        Raises UserError that names a file that is missing or truncated, or where index and files differ: a
        reader that goes by the files would then take other tensors than one that goes by the index.
        """
        headers = {file: self._headers(file) for file in self._files()}
        for name, file in self.file_of.items():
            if name not in headers[file]:
                raise UserError(f"{self.path / file}: does not hold tensor {name}, which {INDEX} puts there")
        for file, held in headers.items():
            for name in held:
                if self.file_of.get(name) != file:
                    raise UserError(
                        f"{self.path / file}: holds tensor {name}, which {INDEX} does not put there"
                    )
        return {name: headers[file][name] for name, file in self.file_of.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises UserError if it is missing or its file is damaged."""
        if name not in self.file_of:
            raise UserError(f"{self.path}: tensor {name} is missing")
        file_name = self.file_of[name]
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file_name}: cannot be read: {error}") from error

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
            raise UserError(f"{self.path / file_name}: cannot be read: {error}") from error


class PickleDirectory:
    """Reads single tensors out of pytorch_model.bin files: tensors only, and mapped, not loaded."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the directory holds no readable pytorch_model.bin."""
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
                f"{self.path / named[name]}: does not hold tensor {name}, which the index puts there"
            )

    def describe(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor, as meta tensors."""
        return {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises UserError if it is missing."""
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]

    def _map(self, file_name: str) -> dict[str, Tensor]:
        try:
            held = torch.load(self.path / file_name, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError as error:  # torch's own text recommends to load it all the same
            raise UserError(
                f"{self.path / file_name}: cannot be read: damaged, or it holds more than tensors"
            ) from error
        except Exception as error:  # torch raises many kinds for a damaged or hostile pickle
            raise UserError(f"{self.path / file_name}: cannot be read: {first_line(error)}") from error
        if isinstance(held, dict) and all(isinstance(tensor, Tensor) for tensor in held.values()):
            return held
        raise UserError(f"{self.path / file_name}: holds no dictionary of tensors")


def open_tensors(path: str | Path, allow_pickle: bool) -> HfTensors:
    """The directory's safetensors; its pickled tensors only where there are none and `allow_pickle` says so.

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
            f"{path}: holds pickled tensors only; if you trust their origin, convert them by "
            "tools/convert_hf_checkpoint.py import --allow-pickle and export"
        )
    raise UserError(f"{path}: there is no {SINGLE} and no {INDEX} in it")


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

    Raises UserError if it is missing or transformers does not know its architecture.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: there is no Hugging Face config.json in it")
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged or unknown configuration
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}/config.json: cannot be used: {reason}") from error
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
    """Which file holds which tensor, without those that are ignored. Raises UserError if it is damaged."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(Path(file).name == file for file in weight_map.values()):
            return {name: file for name, file in weight_map.items() if not IGNORED.search(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of tensors: {error}") from error
    raise UserError(f"{index}: names a file outside of its directory")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _meta(header: "safe_open") -> Tensor:
    dtype = _DTYPES.get(header.get_dtype(), torch.uint8)
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def supported_config(path: str | Path) -> PretrainedConfig:
    """The directory's configuration. Raises UserError if the policy does not compute what it says."""
    hf_config = read_config(path)
    try:
        family_of(hf_config)
    except UserError as error:
        raise UserError(f"{path}/config.json: {error}") from None
    return hf_config


def checked_tensors(
    path: str | Path, hf_config: PretrainedConfig, allow_pickle: bool = False
) -> tuple[HfTensors, dict[str, Tensor]]:
    """The directory's tensors, and their shapes and dtypes as meta tensors.

    Reads headers only, and the output layer where config.json ties it and the files hold it, too. Raises
    ValueError, one line, for a damaged file, and for the first tensor that is missing, unexpected, misshapen
    or of a type that is no float.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}/adapter_config.json: an adapter is not applied; merge it into the model, or remove it"
        )
    tensors = open_tensors(path, allow_pickle)
    found = tensors.describe()
    _check_names(path, hf_config, found)
    _check_tied_output(tensors, hf_config, found)
    return tensors, found


def warn_of_index(path: str | Path) -> None:
    """One line, on the first process, where an index of other files is left beside model.safetensors."""
    if device.is_first() and all((Path(path) / name).is_file() for name in (SINGLE, INDEX)):
        logger.warning("%s: %s lies beside %s and is not read, as transformers has it", path, INDEX, SINGLE)


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a supported model; no output layer where it is tied."""
    family, c = family_of(hf_config), hf_config
    hidden, size = c.hidden_size, head_dim(c)
    queries, keys = c.num_attention_heads * size, c.num_key_value_heads * size
    attention = {"q": queries, "k": keys, "v": keys}
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"self_attn.{x}_proj.weight": (rows, hidden) for x, rows in attention.items()}
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    if family.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (rows,) for x, rows in attention.items()}
    if family.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (size,) for x in "qk"}
    inner = c.moe_intermediate_size if family.experts else c.intermediate_size
    for mlp in [f"mlp.experts.{e}." for e in range(c.num_experts)] if family.experts else ["mlp."]:
        layer |= {f"{mlp}{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        layer[f"{mlp}down_proj.weight"] = (hidden, inner)
    if family.experts:
        layer["mlp.gate.weight"] = (c.num_experts, hidden)
    shapes = {EMBEDDING: (c.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not c.tie_word_embeddings:
        shapes[OUTPUT] = (c.vocab_size, hidden)
    return shapes | {
        f"model.layers.{i}.{name}": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()
    }


def load_transformers(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model on the CPU, in evaluation mode, with the tensors that the policy reads.

    Raises UserError, one line, for a directory that is not supported or damaged.
    """
    hf_config = copy.deepcopy(supported_config(path))
    checked_tensors(path, hf_config)
    # only an embedding's gradient knows it, and one outside of the vocabulary ends transformers
    hf_config.pad_token_id = None
    slices = SafetensorsDirectory(path).slices()
    if hf_config.tie_word_embeddings:
        slices.pop(OUTPUT, None)
    try:
        # config.json has no say in the kernels: naming one could fetch it, and run it
        return getattr(transformers, hf_config.architectures[0]).from_pretrained(
            None, config=hf_config, state_dict=slices, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its weights cannot be read: {first_line(error)}") from error


def _check_names(path: Path, hf_config: PretrainedConfig, found: dict[str, Tensor]) -> None:
    expected = expected_shapes(hf_config)
    if hf_config.tie_word_embeddings and OUTPUT in found:
        expected[OUTPUT] = expected[EMBEDDING]
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing")
        if found[name].shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(found[name].shape)}; config.json asks for {shape}"
            )
        if not found[name].is_floating_point():
            raise UserError(f"{path}: tensor {name} is not of float32, float16 or bfloat16")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{path}: tensor {name} is not part of a {hf_config.architectures[0]}; remove it")


def _check_tied_output(tensors: HfTensors, hf_config: PretrainedConfig, found: dict[str, Tensor]) -> None:
    if not hf_config.tie_word_embeddings or OUTPUT not in found:
        return
    if not torch.equal(tensors.read(OUTPUT), tensors.read(EMBEDDING)):
        raise UserError(
            f"{tensors.path}: tensor {OUTPUT} differs from {EMBEDDING}, "
            "but config.json has tie_word_embeddings=true"
        )
