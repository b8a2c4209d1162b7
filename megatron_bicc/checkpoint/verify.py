"""Logits of a distributed checkpoint against those of transformers.

Shape suffixes: T tokens of a prompt, K rows that are compared, V vocabulary.

manifest.json: size and SHA-256 of every file below a directory, so that a flipped bit is found.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from megatron_bicc import device
from megatron_bicc.checkpoint.megatron_files import MegatronCheckpoint, describe, load_chunks
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.model.build import PolicyModel
from megatron_bicc.model.families import transformer_config
from megatron_bicc.weights.hf_files import checked_tensors, load_transformers, supported_config

LONGEST = 4608
"""Tokens: more than the windows in use, of which 4096 is the longest common one"""
ROWS = 64
"""Logits of a prompt that are compared"""


class LogitModel(PolicyModel):
    """The policy that ends in float [K, V] logits of the rows `rows_K`, which training never makes."""

    rows_K: Tensor

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return (hidden_states[self.rows_K, 0] @ self.output_weight().T)[:, : self.true_vocab_size]


def largest_difference(
    hf_dir: Path, checkpoint: Path, prompts: int, length: int | None = None
) -> tuple[float, float]:
    """(largest difference of a logit, largest logit) over random prompts, both models in float32. Collective.

    length: of the longest prompt; None: LONGEST tokens, or max_position_embeddings where that is less. The
    others are half, a quarter and an eighth as long, in turn. Each process takes a share of the prompts, and
    has both models in memory, one after the other. Raises UserError if one cannot be read, or the
    checkpoint is not what its manifest says.
    """
    hf_config = supported_config(hf_dir)
    most = hf_config.max_position_embeddings
    if length is not None and length > most:
        raise UserError(f"{hf_dir}: its max_position_embeddings is {most}; --length {length} is longer")
    checked_tensors(hf_dir, hf_config)
    check_if_listed(checkpoint)
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, (length or min(LONGEST, most)) >> i % 4) for i in range(prompts)]
    tokens = [torch.randint(0, hf_config.vocab_size, (n,), generator=generator) for n in lengths]
    tokens = tokens[dist.get_rank() :: dist.get_world_size()]
    ours = _megatron_logits(hf_dir, checkpoint, tokens)
    theirs = _transformers_logits(hf_dir, tokens)
    pairs = list(zip(ours, theirs, strict=True))
    found = gathered([(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs])
    # a NaN stays one, as it would not in Python's max
    difference, largest = torch.tensor(list(itertools.chain(*found))).amax(dim=0).tolist()
    return difference, largest


def compared_rows(length: int) -> Tensor:
    """int64 [K], ascending: the rows of a prompt whose logits are compared, evenly spread, the last included.

    All would take a prompt's length times the vocabulary.
    """
    return torch.linspace(0, length - 1, min(length, ROWS)).round().long()


@torch.no_grad()
def _megatron_logits(hf_dir: Path, checkpoint: Path, tokens: list[Tensor]) -> list[Tensor]:
    config, hf_config = Config(), supported_config(hf_dir)
    config.model.dtype = "float32"
    MegatronCheckpoint(checkpoint).check(describe(hf_config)[0])
    with device.megatron():
        model = LogitModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
        model = model.to(device.device(), torch.float32).eval()
    load_chunks([model], checkpoint)
    found = []
    with device.megatron():
        for prompt_T in tokens:
            model.rows_K = compared_rows(len(prompt_T)).to(device.device())
            found.append(model.run(PackedBatch.one_sequence(prompt_T.to(device.device()))).cpu())
    return found


def _transformers_logits(hf_dir: Path, tokens: list[Tensor]) -> list[Tensor]:
    model = load_transformers(hf_dir, torch.float32).to(device.device())
    return [cached_logits(model, prompt_T) for prompt_T in tokens]


@torch.no_grad()
def cached_logits(model: PreTrainedModel, prompt_T: Tensor) -> Tensor:
    """transformers' logits float [K, V] of `compared_rows`, in two calls with a key-value cache between them.

    As in generation: a model whose cache drops tokens shows it here alone.
    """
    device, rows_K = model.device, compared_rows(len(prompt_T)).to(model.device)
    middle = max(1, len(prompt_T) // 2)
    first_K, second_K = rows_K[rows_K < middle], rows_K[rows_K >= middle] - middle
    row = prompt_T[None].to(device)
    output = model(row[:, :middle], use_cache=True, logits_to_keep=first_K)
    parts = [output.logits[0]]
    if len(second_K):
        cache = output.past_key_values
        parts.append(model(row[:, middle:], past_key_values=cache, logits_to_keep=second_K).logits[0])
    return torch.cat(parts).cpu()


MANIFEST = "manifest.json"


def describe_share(directory: Path) -> dict[str, Any]:
    """This process's share of the manifest: size and SHA-256 of every so-many-th file there."""
    return {name: _describe(directory / name) for name in _share(_names(directory))}


def write_manifest(directory: Path, parts: list[dict[str, Any]]) -> None:
    """Writes the manifest from every process's share."""
    files = {name: found for part in parts for name, found in part.items()}
    (directory / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True))


def check_file(directory: Path, name: str) -> None:
    """Raises UserError if a file is missing or was changed."""
    if damage := _damage(directory, [name]):
        raise UserError(damage)


def check_manifest(directory: Path) -> None:
    """Raises UserError, on every process, that names a file that is missing or was changed. Collective."""
    for damage in filter(None, gathered(_damage(directory))):
        raise UserError(damage)


def check_if_listed(directory: Path) -> None:
    """`check_manifest` where there is a manifest: what older versions imported has none. Collective."""
    if (directory / MANIFEST).exists():
        try:
            check_manifest(directory)
        except UserError as error:
            raise UserError(f"{error}; take an intact copy or another checkpoint") from error


def _damage(directory: Path, names: list[str] | None = None) -> str | None:
    """The first file that is damaged, in words; of all files this process looks at its share."""
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
