"""One optimiser step from scored groups: log-probs, advantages, packing, gradients, update.

Every denominator and group statistic is computed over the whole step before it is cut into micro-batches;
they reach the loss as per-token weights and per-rollout advantages. So the gradient does not depend on
packing, micro-batch size or parallel layout.

Shape suffixes: G groups, R rollouts, T tokens of all responses, N response rows of a micro-batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import (
    Advantages,
    TokenLogProbs,
    advantages,
    has_contrast,
    needs_reference,
    regularises,
    token_weights,
)
from megatron_bicc.algorithms.policy_loss import policy_loss
from megatron_bicc.algorithms.statistics import gradient_statistics
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.policy import Policy
from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.plan import StepPlan
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import (
    Piece,
    StepBatch,
    gather_tokens,
    loss_rows,
    packing_settings,
    pieces_of,
    step_batch,
    sum_over_all,
    sum_scalar,
)


@dataclass(frozen=True)
class RatioTokens:
    """Numerator and denominator of the ratio as it was trained; float32 [T], NaN where not trained so."""

    new_T: np.ndarray
    old_T: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, for metrics and the report."""

    batch: StepBatch
    """Its groups with contrast; where KL or entropy is in the loss, all its groups"""
    taken: np.ndarray
    """int64 [G]: place of each of the batch's groups among those that the step was given"""
    log_probs: TokenLogProbs
    advantages: Advantages
    plans: dict[bool, StepPlan]
    """By whether a context stands before the responses: the plans that were trained"""
    ratios: dict[bool, RatioTokens]
    """Likewise"""
    loss: float
    grad_norm: float
    gradient: dict[str, float]
    """Variance over groups of the output layer's gradient (algorithms.gradient_variance)"""


@dataclass(frozen=True)
class PreparedStep:
    """An optimiser step that the old policy has been asked for; the policy may move before it is taken."""

    batch: StepBatch
    taken: np.ndarray
    """Both as in StepResult"""
    num_groups: int
    """That the step was given, with contrast or not"""
    weight_R: np.ndarray
    log_probs: TokenLogProbs
    advantages: Advantages
    plans: dict[bool, StepPlan]
    pieces: list[Piece]
    old: dict[int, Tensor]
    """Denominators float32 [N] of pieces' rows; left out where the policy is to be its own old one"""


class Learner:
    """Turns scored groups into optimiser steps of the policy."""

    def __init__(self, config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """`config` is resolved (algorithms.presets.resolve); the policy as it is now is the reference."""
        self.config = config
        self.policy = policy
        self.reference = policy.host_copy() if needs_reference(config) else None
        self.regularises = regularises(config)
        self.bicc_weight = config.bicc.weight if config.bicc.enabled else 0.0
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.plain, self.bilateral = packing_settings(config, policy.hf_config, tokenizer)

    def step(self, groups: list[Group], clock: Stopwatch) -> StepResult | None:
        """One optimiser step; None if there is nothing to learn, as in `prepare`. Collective."""
        prepared = self.prepare(groups, clock, moves=False)
        return None if prepared is None else self.update(prepared, clock)

    def prepare(self, groups: list[Group], clock: Stopwatch, moves: bool) -> PreparedStep | None:
        """All of an optimiser step that the policy as it is now decides: it is the step's old policy.

        `moves` is whether the policy will be updated before this step is; if not, it is its own old policy
        then, and a pass is saved. None if no group has both right and wrong rollouts, unless KL or entropy is
        in the loss. Collective.
        """
        everything = step_batch(groups)
        weight_R = token_weights(
            everything.lengths_R, self.config.loss.aggregation, self.config.rollout.max_new_tokens
        )
        contrast_G = has_contrast(
            everything.rollouts.rewards_R, everything.rollouts.group_offsets_B, self.config.reward.threshold
        )
        taken_G = np.ones_like(contrast_G) if self.regularises else contrast_G
        if not taken_G.any():
            return None
        taken = np.flatnonzero(taken_G)
        batch = step_batch([groups[i] for i in taken])
        weight_R = weight_R[np.repeat(taken_G, np.diff(everything.rollouts.group_offsets_B))]
        with clock("pack"):
            plain = pack(batch.rollouts, self.plain, self.dp_size)
            plans = self._plans(batch, plain)
            share = {True: self.bicc_weight, False: 1.0 - self.bicc_weight}
            laid_out = {False: plain} | plans
            made = {kind: pieces_of(plan, self.dp_rank, kind, share[kind]) for kind, plan in laid_out.items()}
            pieces = [piece for kind in plans for piece in made[kind]]
        with clock("logprob"):
            log_probs = self._log_probs(batch, made[False])
            old = self._denominators(pieces, log_probs, moves)
        adv = advantages(batch.rollouts, log_probs, self.config)
        return PreparedStep(batch, taken, len(groups), weight_R, log_probs, adv, plans, pieces, old)

    def update(self, step: PreparedStep, clock: Stopwatch) -> StepResult:
        """Takes a prepared optimiser step. Collective.

        Raises NotFiniteError, before the policy is changed, for a loss or gradient that is not finite.
        """
        with clock("train"):
            with self.policy.gradient_sketch(len(step.advantages.mean_G)) as sketch:
                loss, new = self._accumulate(step)
            gradient = gradient_statistics(sum_over_all(sketch.values_BXY), step.num_groups)
            if not math.isfinite(loss):
                raise NotFiniteError(f"the loss is {loss}; weights and optimizer were left as they were")
            grad_norm = self.policy.update()
        tokens = len(step.batch.rollouts.tokens)
        ratios = {kind: _ratios(step.pieces, new, step.old, kind, tokens) for kind in step.plans}
        return StepResult(
            step.batch,
            step.taken,
            step.log_probs,
            step.advantages,
            step.plans,
            ratios,
            loss,
            grad_norm,
            gradient,
        )

    def log_probs(self, groups: list[Group]) -> np.ndarray:
        """float32 [T]: the policy's own log-prob of every response token, given its prompt. Collective."""
        batch = step_batch(groups)
        pieces = pieces_of(pack(batch.rollouts, self.plain, self.dp_size), self.dp_rank)
        passes = self.policy.log_probs([p.packed for p in pieces])
        return gather_tokens([x[0] for x in passes], [p.batch for p in pieces], len(batch.rollouts.tokens))

    def _plans(self, batch: StepBatch, plain: StepPlan) -> dict[bool, StepPlan]:
        """The plans to train on, by whether they are bilateral: one of them, or both.

        Both where bicc.weight mixes them, and where the loss holds KL or entropy, which are of the plain one.
        """
        plans = {}
        if self.bicc_weight > 0:
            bilateral = pack(batch.rollouts, self.bilateral, self.dp_size)
            if bilateral.ranks[0]:  # else no group has contrast
                plans[True] = bilateral
        if self.bicc_weight < 1 or self.regularises:
            plans[False] = plain
        return plans

    def _log_probs(self, batch: StepBatch, pieces: list[Piece]) -> TokenLogProbs:
        """Old and reference policy over the plain shared-prefix layout."""
        packed, batches = [p.packed for p in pieces], [p.batch for p in pieces]
        num_tokens = len(batch.rollouts.tokens)
        passes = self.policy.log_probs(packed)
        old_T, entropy_T = (gather_tokens([x[i] for x in passes], batches, num_tokens) for i in (0, 1))
        ref_T = None
        if self.reference is not None:
            with self.policy.weights(self.reference):
                ref_T = gather_tokens([x[0] for x in self.policy.log_probs(packed)], batches, num_tokens)
        return TokenLogProbs(old_T, ref_T, batch.rollout_logp_T, entropy_T)

    def _denominators(self, pieces: list[Piece], log_probs: TokenLogProbs, moves: bool) -> dict[int, Tensor]:
        """PreparedStep.old.

        On the last pipeline stage; those of conditioned pieces are empty on the others.
        """
        given_context = [i for i, p in enumerate(pieces) if p.conditioned]
        if self.config.bicc.denominator == "plain":
            given_context = []
        old = {
            i: torch.from_numpy(log_probs.old_T[piece.batch.gather]).to(device.device())
            for i, piece in enumerate(pieces)
            if i not in given_context
        }
        if given_context and moves:
            passes = self.policy.log_probs([pieces[i].packed for i in given_context])
            old |= {i: x[0] for i, x in zip(given_context, passes, strict=False)}
        return old

    def _accumulate(self, step: PreparedStep) -> tuple[float, list[Tensor]]:
        """Gradients of the step's loss; (the loss, log-probs of every piece's rows)."""

        def loss(index: int, logp_N: Tensor, entropy_N: Tensor) -> Tensor:
            piece, old_N = step.pieces[index], step.old.get(index, logp_N.detach())
            advantage_R = step.advantages.advantage_R
            rows = loss_rows(piece, old_N, entropy_N, step.log_probs, advantage_R, step.weight_R)
            return policy_loss(logp_N, rows, self.config.loss)

        share, new = self.policy.accumulate_gradients([piece.packed for piece in step.pieces], loss)
        return sum_scalar(share), new


def _ratios(
    pieces: list[Piece], new: list[Tensor], old: dict[int, Tensor], conditioned: bool, num_tokens: int
) -> RatioTokens:
    """Brings the ratios of the pieces with or without a context to every rank. Collective."""
    chosen = [i for i, piece in enumerate(pieces) if piece.conditioned == conditioned]
    batches = [pieces[i].batch for i in chosen]
    new_N = [new[i] for i in chosen] if new else []
    old_N = [old.get(i, new[i]) for i in chosen] if new else []
    return RatioTokens(gather_tokens(new_N, batches, num_tokens), gather_tokens(old_N, batches, num_tokens))
