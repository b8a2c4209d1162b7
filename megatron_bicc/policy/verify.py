"""Logits of a distributed checkpoint against those of transformers.

Shape suffixes: T tokens of a prompt, V vocabulary.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.platform.gather import gathered
from megatron_bicc.policy.architecture import transformer_config
from megatron_bicc.policy.convert import check_tensors, supported_config
from megatron_bicc.policy.hf_files import open_tensors
from megatron_bicc.policy.manifest import check_if_listed
from megatron_bicc.policy.megatron_files import MegatronCheckpoint, load_chunks
from megatron_bicc.policy.megatron_pieces import describe
from megatron_bicc.policy.model import PolicyModel
from megatron_bicc.policy.packed import PackedBatch
from megatron_bicc.policy.segments import Segments


class LogitModel(PolicyModel):
    """The policy that ends in float [T, V] logits of every row, which training never makes."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return (hidden_states[:, 0] @ self.output_weight().T)[:, : self.true_vocab_size]


def largest_difference(hf_dir: Path, checkpoint: Path, prompts: int, length: int) -> tuple[float, float]:
    """(largest difference of a logit, largest logit) over random prompts, both models in float32. Collective.

    Each process takes a share of the prompts, and has both models in memory, one after the other. Raises
    ValueError if one cannot be read, or the checkpoint is not what its manifest says.
    """
    hf_config = supported_config(hf_dir)
    if length > hf_config.max_position_embeddings:
        raise ValueError(
            f"{hf_dir}: its max_position_embeddings is {hf_config.max_position_embeddings}; "
            f"--length {length} is longer"
        )
    check_tensors(hf_dir, hf_config, describe(hf_config)[0], open_tensors(hf_dir, False).describe())
    check_if_listed(checkpoint)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, hf_config.vocab_size, (prompts, length), generator=generator)
    tokens = tokens[dist.get_rank() :: dist.get_world_size()]
    ours = _megatron_logits(hf_dir, checkpoint, tokens)
    theirs = _transformers_logits(hf_dir, tokens)
    pairs = list(zip(ours, theirs, strict=True))
    found = gathered([(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs])
    # a NaN stays one, as it would not in Python's max
    difference, largest = torch.tensor(list(itertools.chain(*found))).amax(dim=0).tolist()
    return difference, largest


@torch.no_grad()
def _megatron_logits(hf_dir: Path, checkpoint: Path, tokens: Tensor) -> list[Tensor]:
    config, hf_config = Config(), supported_config(hf_dir)
    config.model.dtype = "float32"
    MegatronCheckpoint(checkpoint).check(describe(hf_config)[0])
    with platform.megatron():
        model = LogitModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
        model = model.to(platform.device(), torch.float32).eval()
    load_chunks([model], checkpoint)
    with platform.megatron():
        return [model.run(_causal(prompt_T)).cpu() for prompt_T in tokens]


@torch.no_grad()
def _transformers_logits(hf_dir: Path, tokens: Tensor) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    ).eval()
    model = model.to(platform.device())
    return [model(prompt_T[None].to(platform.device())).logits[0].cpu() for prompt_T in tokens]


def _causal(tokens_T: Tensor) -> PackedBatch:
    """One causal sequence without responses."""
    device, length = platform.device(), len(tokens_T)
    whole, nothing = np.array([0, length], np.int32), np.zeros(2, np.int32)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return PackedBatch(
        qkv_format="sbhd",
        tokens_T=tokens_T.to(device),
        positions_T=torch.arange(length, device=device),
        labels_N=none,
        response_N=none,
        response_rows=slice(length, length),
        causal=Segments.of_themselves(whole, device),
        cross=Segments.across(nothing, whole, device),
    )
