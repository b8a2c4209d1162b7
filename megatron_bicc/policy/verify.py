"""Logits of a distributed checkpoint against those of transformers.

Shape suffixes: T tokens of a prompt, K rows that are compared, V vocabulary.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.platform.gather import gathered
from megatron_bicc.policy.architecture import transformer_config
from megatron_bicc.policy.hf_model import checked_tensors, load_transformers, supported_config
from megatron_bicc.policy.manifest import check_if_listed
from megatron_bicc.policy.megatron_files import MegatronCheckpoint, load_chunks
from megatron_bicc.policy.megatron_pieces import describe
from megatron_bicc.policy.model import PolicyModel
from megatron_bicc.policy.packed import PackedBatch
from megatron_bicc.policy.segments import Segments

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
    has both models in memory, one after the other. Raises ValueError if one cannot be read, or the
    checkpoint is not what its manifest says.
    """
    hf_config = supported_config(hf_dir)
    most = hf_config.max_position_embeddings
    if length is not None and length > most:
        raise ValueError(f"{hf_dir}: its max_position_embeddings is {most}; --length {length} is longer")
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
    with platform.megatron():
        model = LogitModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
        model = model.to(platform.device(), torch.float32).eval()
    load_chunks([model], checkpoint)
    found = []
    with platform.megatron():
        for prompt_T in tokens:
            model.rows_K = compared_rows(len(prompt_T)).to(platform.device())
            found.append(model.run(_causal(prompt_T)).cpu())
    return found


def _transformers_logits(hf_dir: Path, tokens: list[Tensor]) -> list[Tensor]:
    model = load_transformers(hf_dir, torch.float32).to(platform.device())
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


def _causal(tokens_T: Tensor) -> PackedBatch:
    """One causal sequence without responses."""
    where, length = platform.device(), len(tokens_T)
    whole, nothing = np.array([0, length], np.int32), np.zeros(2, np.int32)
    none = torch.zeros(0, dtype=torch.int64, device=where)
    return PackedBatch(
        qkv_format="sbhd",
        tokens_T=tokens_T.to(where),
        positions_T=torch.arange(length, device=where),
        labels_N=none,
        response_N=none,
        response_rows=slice(length, length),
        causal=Segments.of_themselves(whole, where),
        cross=Segments.across(nothing, whole, where),
    )
