"""Packed micro-batches with what the loss needs of their rows.

Shape suffixes: R rollouts, S response segments, N response rows of a micro-batch, T tokens of all responses.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc import platform
from megatron_bicc.algorithms.policy_loss import LossRows
from megatron_bicc.config import Config
from megatron_bicc.packing import StepPlan
from megatron_bicc.packing.types import MicroBatch, PackingSettings
from megatron_bicc.policy.end_tokens import end_token_ids
from megatron_bicc.policy.packed import PackedBatch
from megatron_bicc.training.weighing import TokenLogProbs


@dataclass(frozen=True)
class Piece:
    """A micro-batch of this rank."""

    batch: MicroBatch
    packed: PackedBatch
    conditioned: bool
    """Whether a context stands before its responses"""
    share: float
    """Its layout's share of the policy's loss: bicc.weight, or 1 - bicc.weight"""


def pieces_of(plan: StepPlan, dp_rank: int, conditioned: bool = False, share: float = 1.0) -> list[Piece]:
    """This rank's micro-batches of a plan, on the device."""
    device = platform.device()
    return [Piece(b, PackedBatch.make(b, device), conditioned, share) for b in plan.ranks[dp_rank]]


def packing_settings(
    config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackingSettings, PackingSettings]:
    """(plain layout, bilateral layout) of a resolved configuration."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    common = {
        "max_sequence_tokens": config.train.max_sequence_tokens,
        "max_tokens_per_microbatch": config.train.max_tokens_per_microbatch,
        "vocab_size": hf_config.vocab_size,
        "reward_threshold": config.reward.threshold,
        "context_ratio": config.bicc.context_ratio,
        "context_source": config.bicc.context_source,
        "truncation": config.bicc.truncation,
        "keep": config.bicc.keep,
        "wrong_header": encode(config.bicc.wrong_header),
        "right_header": encode(config.bicc.right_header),
        "answer_header": encode(config.bicc.answer_header),
        "end_token_ids": end_token_ids(hf_config, tokenizer, config.model.path),
        "alignment": config.parallel.tensor,
        "token_cost": 6 * hf_config.hidden_size,
    }
    return PackingSettings(layout="plain", **common), PackingSettings(layout="bilateral", **common)


def loss_rows(
    piece: Piece,
    old_N: Tensor,
    entropy_N: Tensor,
    log_probs: TokenLogProbs,
    advantage_R: np.ndarray,
    token_weight_R: np.ndarray,
) -> LossRows:
    """What the loss needs of a micro-batch's rows, from flat arrays; `old_N` is the ratio's denominator."""
    rollout_S, index_N = piece.batch.rollout_S, piece.batch.gather
    weight_S = token_weight_R[rollout_S] * piece.batch.scale_S
    response_N = piece.packed.response_N

    def of_segments(values_S: np.ndarray) -> Tensor:
        return torch.from_numpy(values_S.astype(np.float32)).to(old_N.device)[response_N]

    def of_tokens(values_T: np.ndarray) -> Tensor:
        return torch.from_numpy(values_T[index_N]).to(old_N.device)

    return LossRows(
        old_logp=old_N,
        advantage=of_segments(advantage_R[rollout_S]),
        weight=of_segments(weight_S * piece.share),
        response=response_N,
        # the reference's log-probs are given the prompt alone, and so is the policy that samples
        regularisation=None if piece.conditioned else of_segments(weight_S),
        ref_logp=None if log_probs.ref_T is None else of_tokens(log_probs.ref_T),
        # pi_old / mu is the mismatch of the engine, not of the context that it never saw
        rollout_logp=old_N - of_tokens(log_probs.old_T - log_probs.rollout_T),
        entropy=entropy_N,
    )
