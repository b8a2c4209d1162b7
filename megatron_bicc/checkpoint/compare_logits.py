"""Compares the logits of a distributed checkpoint with those of transformers.

Shape suffixes: P tokens of a prompt, L rows whose logits are compared, V vocabulary.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron_bicc import device
from megatron_bicc.checkpoint.megatron_files import MegatronCheckpoint, check_if_listed, load_chunks, slots_of
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.build import PolicyModel, transformer_config
from megatron_bicc.model.families import supported_config
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.weights.hf_files import HfTensors, checked_tensors, load_transformers

LONGEST = 4608
"""Tokens of the longest prompt: more than 4096, the longest sliding window in common use"""
ROWS = 64
"""Rows of a prompt whose logits are compared"""


class LogitModel(PolicyModel):
    """A policy that returns float [L, V] logits of the rows `rows_L`; training never materialises logits."""

    rows_L: Tensor

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return (hidden_states[self.rows_L, 0] @ self.output_weight().T)[:, : self.true_vocab_size]


def largest_difference(
    hf_dir: Path, checkpoint: Path, prompts: int, length: int | None = None
) -> tuple[float, float]:
    """Compares both models on random prompts in float32. Collective.

    length: tokens of the longest prompt; None: LONGEST, or max_position_embeddings if that is less. The
    others are half, a quarter and an eighth as long, in turn. Each process takes a share of the prompts, and
    has both models in memory, one after the other. Returns (largest difference of a logit, largest logit).
    Raises UserError if a model cannot be read, or the checkpoint does not match its manifest.
    """
    hf_config = supported_config(hf_dir)
    most = hf_config.max_position_embeddings
    if length is not None and length > most:
        raise UserError(f"{hf_dir}: its max_position_embeddings is {most}; --length {length} is longer")
    tensors = checked_tensors(hf_dir, hf_config)
    check_if_listed(checkpoint)
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, (length or min(LONGEST, most)) >> i % 4) for i in range(prompts)]
    tokens = [torch.randint(0, hf_config.vocab_size, (n,), generator=generator) for n in lengths]
    tokens = tokens[dist.get_rank() :: dist.get_world_size()]
    ours = _megatron_logits(hf_config, checkpoint, tokens)
    theirs = _transformers_logits(hf_dir, tensors, tokens)
    pairs = list(zip(ours, theirs, strict=True))
    found = gathered([(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs])
    # torch's maximum propagates NaN; Python's does not
    difference, largest = torch.tensor(list(itertools.chain(*found))).amax(dim=0).tolist()
    return difference, largest


def compared_rows(length: int) -> Tensor:
    """Returns int64 [L], ascending: rows of a prompt, evenly spaced, with the last one.

    The logits of all rows would take a prompt's length times the vocabulary.
    """
    return torch.linspace(0, length - 1, min(length, ROWS)).round().long()


@torch.no_grad()
def _megatron_logits(hf_config: PretrainedConfig, checkpoint: Path, tokens: list[Tensor]) -> list[Tensor]:
    config = Config()
    config.model.dtype = "float32"
    MegatronCheckpoint(checkpoint).check(slots_of(hf_config)[0])
    with device.megatron():
        model = LogitModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
        model = model.to(device.device(), torch.float32).eval()
    load_chunks([model], checkpoint)
    found = []
    with device.megatron():
        for prompt_P in tokens:
            model.rows_L = compared_rows(len(prompt_P)).to(device.device())
            found.append(model.run(PackedBatch.one_sequence(prompt_P.to(device.device()))).cpu())
    return found


def _transformers_logits(hf_dir: Path, tensors: HfTensors, tokens: list[Tensor]) -> list[Tensor]:
    model = load_transformers(hf_dir, torch.float32, tensors).to(device.device())
    return [cached_logits(model, prompt_P) for prompt_P in tokens]


@torch.no_grad()
def cached_logits(model: PreTrainedModel, prompt_P: Tensor) -> Tensor:
    """Returns transformers' logits float [L, V] of `compared_rows`, from two calls with a key-value cache.

    As in generation: only this shows a model whose cache drops tokens.
    """
    device, rows_L = model.device, compared_rows(len(prompt_P)).to(model.device)
    middle = max(1, len(prompt_P) // 2)
    first_L, second_L = rows_L[rows_L < middle], rows_L[rows_L >= middle] - middle
    row = prompt_P[None].to(device)
    output = model(row[:, :middle], use_cache=True, logits_to_keep=first_L)
    parts = [output.logits[0]]
    if len(second_L):
        cache = output.past_key_values
        parts.append(model(row[:, middle:], past_key_values=cache, logits_to_keep=second_L).logits[0])
    return torch.cat(parts).cpu()
