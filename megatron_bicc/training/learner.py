"""Turns scored groups into optimizer steps: collate, log-probs, advantages, micro-batches, update.

Every denominator and group statistic is computed over the whole optimizer step before it is cut into
micro-batches; they reach the loss as per-token weights and per-rollout advantages. So the gradient does not
depend on packing, micro-batch size or parallel layout.

Shape suffixes: B groups, R rollouts, T response tokens; A response rows of a micro-batch; X, Y directions of
the gradient sketch, or layers of the model and experts of each.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_bicc.algorithms.advantages import (
    Advantages,
    TokenLogProbs,
    advantages,
    has_contrast,
    load_baseline,
    needs_reference,
    regularises,
    token_weights,
)
from megatron_bicc.algorithms.corrections import CorrectionWeights, correction_weights
from megatron_bicc.algorithms.flat_arrays import check_log_probs, spread
from megatron_bicc.algorithms.policy_loss import load_objective, policy_loss
from megatron_bicc.algorithms.statistics import RatioTokens, expert_statistics, gradient_statistics
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.moe_router import RouterLosses
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.policy import Policy
from megatron_bicc.packing.types import Layout, PackingSettings, StepPlan
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import (
    Packer,
    StepBatch,
    StepValues,
    TrainBatch,
    collate,
    gather_tokens,
    packing_settings,
    sum_over_all,
    sum_scalar,
)
from megatron_bicc.training.routing import with_engine_experts, with_recorded_experts


@dataclass(frozen=True)
class PackedLayout:
    """The rollouts of an optimizer step, packed in one of the two layouts."""

    layout: Layout
    plan: StepPlan
    """The plan of all data-parallel ranks"""
    batches: list[PackedBatch]
    """This rank's micro-batches, on the device"""


@dataclass(frozen=True)
class Update:
    """One optimizer step before it is taken: everything that depends on the old policy is computed."""

    groups: list[Group]
    """All groups of the optimizer step, with contrast or not"""
    taken: np.ndarray
    """int64: indices into `groups` of the trained ones: all if KL or entropy is in the loss, else those with
    contrast"""
    batch: StepBatch
    """Rollouts of the taken groups; the arrays below cover these only"""
    log_probs: TokenLogProbs
    corrections: CorrectionWeights
    advantages: Advantages
    trained: list[PackedLayout]
    """Bilateral first, where both are"""
    batches: list[TrainBatch]
    """This rank's micro-batches of all trained layouts"""
    passes: list[StepPlan]
    """The plan of each pass without gradients: old, reference and conditioned log-probs"""
    load_XY: Tensor
    """float64 [X, Y]: response tokens that the old policy, given the prompt alone, sent to each expert; Y = 0
    without experts"""
    router_losses: RouterLosses | None


@dataclass(frozen=True)
class TrainedLayout:
    """A trained layout, for metrics and the report."""

    layout: Layout
    plan: StepPlan
    ratio: RatioTokens
    """[T] of the result's batch"""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, for metrics and the report."""

    groups: list[Group]
    taken: np.ndarray
    batch: StepBatch
    log_probs: TokenLogProbs
    corrections: CorrectionWeights
    advantages: Advantages
    """All six as in Update"""
    trained: list[TrainedLayout]
    """Bilateral first, where both are"""
    loss: float
    grad_norm: float
    """Before clipping"""
    passes: list[StepPlan]
    """As in Update"""
    gradient: dict[str, float]
    """Variance over groups of the output layer's gradient (statistics.gradient_statistics)"""
    experts: dict[str, float]
    """Load of the experts and the routers' losses (statistics.expert_statistics); empty without experts"""


class Learner:
    """Turns scored groups into optimizer steps of the policy."""

    def __init__(self, config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """config: resolved (algorithms.presets.resolve). The policy's current weights become the reference.

        Raises UserError for a loss.objective or loss.baseline that cannot be loaded.
        """
        load_objective(config.loss)
        load_baseline(config)
        self.config = config
        self.policy = policy
        self.reference = policy.reference_copy(config) if needs_reference(config) else None
        self.regularises = regularises(config)
        self.bicc_weight = config.bicc.weight if config.bicc.enabled else 0.0
        self.plain, self.bilateral = packing_settings(config, policy.hf_config, tokenizer)

    def step(
        self,
        groups: list[Group],
        clock: Stopwatch,
        check: Callable[[list[Update]], None] | None = None,
    ) -> list[StepResult]:
        """Learns from a batch of rollouts: train.updates_per_step optimizer steps, each on a share of groups.

        The policy at the start is the old policy of all of them. A share without a group of mixed outcomes is
        skipped, unless KL or entropy is in the loss. Returns one result per optimizer step taken. Collective.

        check: called with all optimizer steps before the first one is taken; if it raises, the weights are
        unchanged. Raises NotFiniteError, before the policy changes, for a number that is not
        finite.
        """
        everything = collate(groups)  # B groups, R rollouts, T response tokens
        size = max(1, len(groups) // self.config.train.updates_per_step)
        updates: list[Update] = []
        # Prepare all updates before the first is taken: their old policy is the one before this step.
        for first in range(0, len(groups), size):
            share = everything.select(np.arange(first, min(first + size, len(groups))))
            offsets_B = share.rollouts.group_offsets_B
            contrast_B = has_contrast(share.rollouts.rewards_R, offsets_B, self.config.reward.threshold)
            taken_B = np.ones_like(contrast_B) if self.regularises else contrast_B
            if not taken_B.any():
                continue
            # before the selection: groups without contrast count in the denominators
            weight_R = token_weights(
                share.lengths_R, self.config.loss.aggregation, self.config.rollout.max_new_tokens
            )[spread(taken_B, offsets_B)]
            taken = np.flatnonzero(taken_B)
            batch = share.select(taken)  # from here on B, R and T are of the taken groups

            with clock("pack"):
                packer = Packer(batch.rollouts)
                plain = self._pack(packer, self.plain, batch.experts)
                trained = self._trained(packer, plain, batch.experts)
            with clock("logprob"):
                log_probs, load_XY, recorded = self._log_probs(batch, plain)  # float32 [T]
            adv = advantages(batch.rollouts, log_probs, self.config)  # float64 [R]
            corrections = correction_weights(
                log_probs.old_T, log_probs.rollout_T, batch.rollouts.offsets_R, self.config.loss
            )
            values = StepValues.upload(log_probs, corrections.weight_T, adv, weight_R)
            with clock("logprob"):
                # conditioned denominators are not in log_probs. The first update needs none, as the policy is
                # its own old policy; later updates, by which it has moved, need them computed now
                weights = self._router_weights(trained, batch, adv)
                batches = [
                    TrainBatch.make(
                        replace(packed, router_weight=weights[each.layout]),
                        each.layout,
                        self._share(each.layout),
                        old_A,
                        values,
                    )
                    for each in trained
                    for packed, old_A in self._with_old(each, values, plain, recorded, moved=first > 0)
                ]
            given = groups[first : first + size]
            passes = [plain.plan] * (1 if self.reference is None else 2)
            passes += [each.plan for each in trained if self._needs_conditioned(each, moved=first > 0)]
            losses = self._router_losses(load_XY)
            updates.append(
                Update(
                    given,
                    taken,
                    batch,
                    log_probs,
                    corrections,
                    adv,
                    trained,
                    batches,
                    passes,
                    load_XY,
                    losses,
                )
            )
        if updates and check is not None:
            check(updates)
        with clock("train"):
            return [self._update(update) for update in updates]

    def log_probs(self, groups: list[Group]) -> np.ndarray:
        """Returns the policy's log-prob of every response token: float32 [T]. Collective."""
        batch = collate(groups)
        plain = self._pack(Packer(batch.rollouts), self.plain, batch.experts)
        return self._policy_log_probs(batch, plain.batches)[0]

    def _share(self, layout: Layout) -> float:
        """Returns the layout's weight in the policy loss: w or 1 - w of J = w J_bicc + (1 - w) J_grpo."""
        return self.bicc_weight if layout == "bilateral" else 1.0 - self.bicc_weight

    def _pack(self, packer: Packer, settings: PackingSettings, experts: np.ndarray | None) -> PackedLayout:
        """Packs a layout. experts: of StepBatch; its passes replay them if model.routing_replay=engine."""
        plan, batches = packer.pack(settings)
        if self.config.model.routing_replay == "engine" and experts is not None:
            batches = with_engine_experts(plan, batches, experts, self.policy.layers)
        return PackedLayout(settings.layout, plan, batches)

    def _trained(self, packer: Packer, plain: PackedLayout, experts: np.ndarray | None) -> list[PackedLayout]:
        """Returns the layouts to train on, bilateral first.

        Both if bicc.weight mixes them, or if KL or entropy, whose terms the plain layout carries, is in the
        loss. The plain layout has served for the log-probs already, so it is not packed again.
        """
        trained = []
        if self.bicc_weight > 0:
            bilateral = self._pack(packer, self.bilateral, experts)
            if bilateral.plan.ranks[0]:  # empty if no group has contrast
                trained.append(bilateral)
        if self.bicc_weight < 1 or self.regularises:
            trained.append(plain)
        return trained

    def _router_weights(
        self, trained: list[PackedLayout], batch: StepBatch, adv: Advantages
    ) -> dict[Layout, float]:
        """Returns the weight of a layout's rows in the routers' losses.

        The layouts have their shares of the policy loss; the weights of all rows add up to 1.
        """
        contrast_R = spread(adv.contrast_B, batch.rollouts.group_offsets_B)
        tokens = {"plain": batch.lengths_R.sum(), "bilateral": batch.lengths_R[contrast_R].sum()}
        shares = {each.layout: self._share(each.layout) for each in trained}
        total = float(sum(share * tokens[layout] for layout, share in shares.items()))
        # 0 if only KL or entropy trains: BICC alone, and no group has contrast
        return {layout: share / total if total else 0.0 for layout, share in shares.items()}

    def _router_losses(self, load_XY: Tensor) -> RouterLosses | None:
        """Returns the routers' losses for a load of the experts over the whole step; None if they are off."""
        loss = self.config.loss
        if not (loss.load_balancing_coefficient or loss.z_loss_coefficient):
            return None
        share_XY = (load_XY / load_XY.sum(1, keepdim=True)).float()
        values_X2 = load_XY.new_zeros(len(load_XY), 2)
        return RouterLosses(loss.load_balancing_coefficient, loss.z_loss_coefficient, share_XY, values_X2)

    def _log_probs(
        self, batch: StepBatch, plain: PackedLayout
    ) -> tuple[TokenLogProbs, Tensor, list[Tensor] | None]:
        """Computes and checks the log-probs of the old and the reference policy, plain layout. Collective.

        Returns them with what the old policy's pass shows of the experts: their load over the whole step
        (Update), and the experts that it has recorded.
        """
        with self.policy.counted_experts() as load_XY, self._recording() as recorded:
            old_T, entropy_T = self._policy_log_probs(batch, plain.batches)
        if load_XY.numel():
            sum_over_all(load_XY)
        ref_T = None
        if self.reference is not None:
            with self.policy.weights(self.reference):
                ref_T = self._policy_log_probs(batch, plain.batches)[0]
        log_probs = TokenLogProbs(old_T, ref_T, batch.rollout_logp_T, entropy_T)
        log_probs.check(batch.rollouts.offsets_R)
        return log_probs, load_XY, recorded

    def _recording(self) -> AbstractContextManager[list[Tensor] | None]:
        """Returns a context whose pass records its experts, if model.routing_replay=old."""
        return self.policy.recorded_experts() if self.config.model.routing_replay == "old" else nullcontext()

    def _policy_log_probs(self, batch: StepBatch, batches: list[PackedBatch]) -> np.ndarray:
        """Returns log-probs and entropies under the policy's current weights: float32 [2, T]. Collective."""
        found = zip(batches, self._passes(batches), strict=True)
        return gather_tokens(found, 2, len(batch.rollouts.tokens))

    def _passes(self, batches: list[PackedBatch]) -> list[Tensor | None]:
        """Runs a forward pass: float32 [2, A] per micro-batch on the last pipeline stage, None on others."""
        return self.policy.log_probs(batches) or [None] * len(batches)

    def _with_old(
        self,
        trained: PackedLayout,
        values: StepValues,
        plain: PackedLayout,
        recorded: list[Tensor] | None,
        moved: bool,
    ) -> list[tuple[PackedBatch, Tensor | None]]:
        """Returns a layout's micro-batches with the log-probs in their ratios' denominators, float32 [A].

        None: the ratio is 1, or this is not the last pipeline stage. recorded: the experts that the old
        policy's pass over `plain` has recorded; a micro-batch replays those of the pass that its denominator
        is from. moved: whether the policy will have been updated before these micro-batches are trained.
        """
        if trained.layout == "plain" or self.config.bicc.denominator == "plain":
            batches = _replaying(trained, plain, recorded)
            return [(packed, values.old_T[packed.token_A]) for packed in batches]
        if not self._needs_conditioned(trained, moved):
            return [(packed, None) for packed in trained.batches]
        with self._recording() as recorded:
            passes = self._passes(trained.batches)
        found = zip(_replaying(trained, trained, recorded), passes, strict=True)
        return [(packed, None if found_2A is None else found_2A[0]) for packed, found_2A in found]

    def _needs_conditioned(self, trained: PackedLayout, moved: bool) -> bool:
        """Returns whether the log-probs in a layout's denominators take a pass of their own."""
        return moved and trained.layout == "bilateral" and self.config.bicc.denominator == "conditioned"

    def _update(self, update: Update) -> StepResult:
        """Takes an optimizer step. Collective.

        Raises NotFiniteError, before the policy is changed, for a loss, ratio or gradient that is not finite.
        """
        # on the last pipeline stage: each micro-batch with the fields of RatioTokens, float [5, A], kept from
        # the loss, so that metrics need no other forward pass
        found: list[tuple[TrainBatch, Tensor]] = []

        def loss(index: int, logp_A: Tensor, entropy_A: Tensor) -> Tensor:
            batch = update.batches[index]
            result = policy_loss(logp_A, entropy_A, batch.rows, self.config.loss)
            masks = [mask.to(logp_A.dtype) for mask in (result.low, result.high, result.dual)]
            found.append((batch, torch.stack([result.old_logp, logp_A.detach(), *masks])))
            return result.share

        with (
            self.policy.gradient_sketch(update.batch.num_groups) as sketch,
            self.policy.router_losses(update.router_losses),
        ):
            own_loss = self.policy.accumulate_gradients([b.packed for b in update.batches], loss)
        # over all groups of the step, not just the taken ones: the others have a gradient of 0
        gradient = gradient_statistics(sum_over_all(sketch.values_BXY), len(update.groups))
        total, routers = sum_scalar(own_loss), update.router_losses
        if routers is not None:
            sum_over_all(routers.values_X2)
            total += routers.total
        # every check comes before policy.update: after an error the weights are those before the step
        if not math.isfinite(total):
            raise NotFiniteError(f"the loss is {total}; weights and optimizer were left as they were")
        trained = [
            TrainedLayout(each.layout, each.plan, self._ratio(update, each.layout, found))
            for each in update.trained
        ]
        grad_norm = self.policy.update()
        return StepResult(
            groups=update.groups,
            taken=update.taken,
            batch=update.batch,
            log_probs=update.log_probs,
            corrections=update.corrections,
            advantages=update.advantages,
            trained=trained,
            loss=total,
            grad_norm=grad_norm,
            passes=update.passes,
            gradient=gradient,
            experts=expert_statistics(update.load_XY, None if routers is None else routers.values_X2),
        )

    def _ratio(self, update: Update, layout: Layout, found: list[tuple[TrainBatch, Tensor]]) -> RatioTokens:
        """Gathers a layout's ratios on every rank and checks them. Collective."""
        rollouts = update.batch.rollouts
        own = ((batch.packed, ratio_5A) for batch, ratio_5A in found if batch.layout == layout)
        ratio = RatioTokens(*gather_tokens(own, 5, len(rollouts.tokens)))
        contrast_T = spread(
            spread(update.advantages.contrast_B, rollouts.group_offsets_B), rollouts.offsets_R
        )
        for logp_T, policy in ((ratio.old_logp_T, "old policy"), (ratio.new_logp_T, "policy in training")):
            # 0 for a group without contrast: the bilateral layout does not train it, so it is NaN
            check_log_probs(
                np.where(contrast_T, logp_T, 0.0), rollouts.offsets_R, f"log-prob under the {policy}"
            )
        return ratio


def _replaying(
    trained: PackedLayout, passed: PackedLayout, recorded: list[Tensor] | None
) -> list[PackedBatch]:
    """Returns a layout's micro-batches with the experts of the pass over `passed`. Collective."""
    if recorded is None:
        return trained.batches
    if trained is passed:
        return [
            replace(packed, experts=experts)
            for packed, experts in zip(trained.batches, recorded, strict=True)
        ]
    return with_recorded_experts(trained.plan, trained.batches, passed.plan, recorded)
