"""Scored groups as the flat arrays that algorithms and packing work on.

Shape suffixes: G groups, R rollouts, T tokens of all responses.

Packed micro-batches with what the loss needs of their rows.

Shape suffixes: R rollouts, S response segments, N response rows of a micro-batch, T tokens of all responses.

Per-token results of packed micro-batches, brought back to flat arrays that every rank holds.

Shape suffixes: N response rows of a micro-batch, T tokens of all responses.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import TokenLogProbs
from megatron_bicc.algorithms.policy_loss import LossRows
from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.packing.plan import StepPlan
from megatron_bicc.packing.types import MicroBatch, PackingSettings, RolloutBatch
from megatron_bicc.rollout.types import Group


@dataclass(frozen=True)
class StepBatch:
    """The rollouts of one optimiser step."""

    rollouts: RolloutBatch
    rollout_logp_T: np.ndarray
    """float32 [T]: log-probs as the rollout engine computed them"""

    @property
    def lengths_R(self) -> np.ndarray:
        """int64 [R]: tokens of each response."""
        return np.diff(self.rollouts.offsets_R)


def step_batch(groups: list[Group]) -> StepBatch:
    """Flat arrays of groups, in their order."""
    samples = [sample for group in groups for sample in group.samples]
    prompts = [group.prompt.token_ids for group in groups]
    rollouts = RolloutBatch(
        prompt_tokens=_concatenate(prompts, np.int32),
        prompt_offsets_B=_offsets([len(p) for p in prompts]),
        tokens=_concatenate([s.token_ids for s in samples], np.int32),
        offsets_R=_offsets([len(s.token_ids) for s in samples]),
        group_offsets_B=_offsets([len(group.samples) for group in groups]),
        rewards_R=_concatenate([group.rewards for group in groups], np.float32),
    )
    return StepBatch(rollouts, _concatenate([s.log_probs for s in samples], np.float32))


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


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
    return [Piece(b, PackedBatch.make(b, device.device()), conditioned, share) for b in plan.ranks[dp_rank]]


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


def gather_tokens(values: list[Tensor], batches: list[MicroBatch], num_tokens: int) -> np.ndarray:
    """float32 [T]: each token's value, or the mean of its values where several segments hold it. Collective.

    `values` are float [N] of this rank's micro-batches on the last pipeline stage, and empty elsewhere.
    Tokens that no micro-batch holds are NaN.
    """
    sums = torch.zeros(2, num_tokens, dtype=torch.float64)
    for value_N, batch in zip(values, batches, strict=False):
        index = torch.from_numpy(batch.gather)
        sums[0].index_add_(0, index, value_N.double().cpu())
        sums[1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    sums = _sum_over_ranks(sums.to(device.device()))
    return (sums[0] / sums[1]).float().cpu().numpy()


def sum_scalar(value: float) -> float:
    """The sum over data-parallel ranks of a number that the last pipeline stage holds (0 on the others)."""
    return float(_sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=device.device())))


def sum_over_all(values: Tensor) -> Tensor:
    """The sum over all ranks of parts that no two of them share, in place. Collective."""
    dist.all_reduce(values)
    return values


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
