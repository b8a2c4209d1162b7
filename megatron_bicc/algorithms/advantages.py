"""Reward-Confidence Correction: a group baseline that knows how confident the policy was (arXiv 2603.13134).

For the estimator w (R - b) grad log pi the constant baseline of least variance is b* = E[w^2 R] / E[w^2].
With w = exp(delta) and delta the log-ratio of two policies on the rollout, b* = E[R] + 2 Cov(R, delta) to
first order. E and Cov are over the group; no gradient flows through b*.

Shape suffixes: T tokens of all responses, R rollouts, G groups. Offsets hold one entry more.

Soft overlong punishment (DAPO, arXiv 2503.14476, section "Overlong Reward Shaping").

Shape suffix: R rollouts.

The weight of a token in the step's loss: the one place where denominators are computed.

All denominators are of the whole optimiser step, so the loss of the step is a plain sum over micro-batches
and ranks, however the step was cut. Rollouts of groups without contrast count, though their policy loss is 0.

Shape suffix: R rollouts of the optimiser step.

Group-relative advantages (GRPO, arXiv 2402.03300; without the std: Dr. GRPO, arXiv 2503.20783).

Shape suffixes: R rollouts, G groups. `group_offsets_B` holds G + 1 entries into the rollouts.

What the algorithm makes of each rollout: its advantage and the weight of its tokens.

Shape suffixes: G groups, R rollouts, T tokens of all responses.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.algorithms.policy_loss import kl_in_reward
from megatron_bicc.algorithms.segments import (
    check_log_probs,
    check_offsets,
    check_rewards,
    segment_means,
    segment_sums,
    spread,
)
from megatron_bicc.config import Advantage, Aggregation, Config, DeltaKind, RccForm, RewardConfig
from megatron_bicc.packing.types import RolloutBatch


@dataclass(frozen=True)
class RccBaseline:
    """The corrected baseline and what corrected it."""

    baseline_G: np.ndarray
    """float64 [G]: b*"""
    covariance_G: np.ndarray
    """float64 [G]: population covariance of reward and delta in the group"""


def sequence_delta(
    logp_a_T: np.ndarray, logp_b_T: np.ndarray, offsets_R: np.ndarray, kind: DeltaKind
) -> np.ndarray:
    """float64 [R]: mean ("token_mean") or sum ("sequence_sum") over a rollout's tokens of log a - log b.

    logp_a_T and logp_b_T are the log-probs of the sampled tokens under the old policy and under the one that
    rcc.reference names, responses end to end. Raises ValueError that names rollout and token where one of
    them is not finite.
    """
    check_log_probs(logp_a_T, offsets_R, "log-prob under the old policy")
    check_log_probs(logp_b_T, offsets_R, "log-prob under the policy that rcc.reference names")
    difference_T = np.asarray(logp_a_T, dtype=np.float64) - np.asarray(logp_b_T, dtype=np.float64)
    return (segment_means if kind == "token_mean" else segment_sums)(difference_T, offsets_R)


def rcc_baseline(
    rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_B: np.ndarray, form: RccForm
) -> RccBaseline:
    """The baseline of every group: E[R] + 2 Cov(R, delta) ("first_order") or E[w^2 R] / E[w^2] ("exact").

    The exact form lies within [min r, max r] of its group whatever delta is.
    """
    check_offsets(group_offsets_B, len(rewards_R), "group_offsets_B", "group")
    check_rewards(rewards_R)
    rewards_R = np.asarray(rewards_R, dtype=np.float64)
    mean_G = segment_means(rewards_R, group_offsets_B)
    delta_mean_G = segment_means(delta_R, group_offsets_B)
    deviation_R = rewards_R - spread(mean_G, group_offsets_B)
    delta_deviation_R = delta_R - spread(delta_mean_G, group_offsets_B)
    covariance_G = segment_means(deviation_R * delta_deviation_R, group_offsets_B)
    if form == "first_order":
        return RccBaseline(mean_G + 2.0 * covariance_G, covariance_G)
    return RccBaseline(_self_normalised(rewards_R, delta_R, group_offsets_B), covariance_G)


def _self_normalised(rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    starts_G = group_offsets_B[:-1]
    largest_G = np.maximum.reduceat(delta_R, starts_G)
    # Shifted by the group's largest delta no weight overflows, and the largest is exactly 1.
    weight_R = np.exp(2.0 * (delta_R - spread(largest_G, group_offsets_B)))
    baseline_G = segment_sums(weight_R * rewards_R, group_offsets_B) / segment_sums(weight_R, group_offsets_B)
    # A convex combination; only rounding can carry it over an end.
    lowest_G, highest_G = (ufunc.reduceat(rewards_R, starts_G) for ufunc in (np.minimum, np.maximum))
    return np.clip(baseline_G, lowest_G, highest_G)


def overlong_penalty(lengths_R: np.ndarray, longest: int, reward: RewardConfig) -> np.ndarray:
    """float64 [R]: what is taken off the reward of a response of so many tokens.

    Nothing up to (1 - overlong_buffer) longest tokens, then growing linearly up to overlong_penalty at
    `longest`, where a response is truncated. The paper: longest 20480, a share of 0.2 (its cache of 4096
    tokens), a penalty of 1. `reward` must be resolved (presets.resolve).
    """
    cache = reward.overlong_buffer * longest
    return reward.overlong_penalty * np.clip((np.asarray(lengths_R) - (longest - cache)) / cache, 0.0, 1.0)


def token_weights(lengths_R: np.ndarray, kind: Aggregation, constant_length: int) -> np.ndarray:
    """float64 [R]: the weight of each token of a rollout, over ALL N rollouts of the optimiser step.

    "sequence_mean" 1 / (N |o_r|): mean over tokens, then over sequences (GRPO, arXiv 2402.03300).
    "constant" 1 / (N L) with L = constant_length: sum over tokens by a constant (Dr. GRPO, arXiv 2503.20783).
    "token_mean" 1 / sum |o|: mean over all tokens (DAPO, arXiv 2503.14476).
    Raises ValueError for a length below 1, with the rollout's index, and for "constant" without a length.
    """
    lengths_R = np.asarray(lengths_R)
    bad = np.flatnonzero(lengths_R < 1)
    if len(bad):
        raise ValueError(
            f"response of rollout {bad[0]} has length {lengths_R[bad[0]]}; it must be at least 1 token"
        )
    count = len(lengths_R)
    if kind == "sequence_mean":
        return 1.0 / (count * lengths_R.astype(np.float64))
    if kind == "token_mean":
        return np.full(count, 1.0 / max(int(lengths_R.sum()), 1))
    if constant_length < 1:
        raise ValueError(
            f"aggregation 'constant' divides by the longest response, but constant_length is "
            f"{constant_length}; set rollout.max_new_tokens"
        )
    return np.full(count, 1.0 / (max(count, 1) * constant_length))


ROUNDING = 1e-6
"""Rewards whose std is at most this share of the largest of them, or of the verifier's, are the same but for
rounding: KL penalties come of float32 log-probs, rewards of float32."""


def has_contrast(rewards_R: np.ndarray, group_offsets_B: np.ndarray, threshold: float) -> np.ndarray:
    """bool [G]: whether a group holds both a correct rollout (reward > threshold) and an incorrect one.

    Raises ValueError for offsets that do not cut the rollouts into non-empty groups and for a reward that is
    not finite.
    """
    check_offsets(group_offsets_B, len(rewards_R), "group_offsets_B", "group")
    check_rewards(rewards_R)
    right_G = segment_sums(np.asarray(rewards_R) > threshold, group_offsets_B)
    return (right_G > 0) & (right_G < np.diff(group_offsets_B))


def mean_baseline(rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    """float64 [G]: mean reward of each group, the baseline of GRPO."""
    check_offsets(group_offsets_B, len(rewards_R), "group_offsets_B", "group")
    return segment_means(rewards_R, group_offsets_B)


def group_advantages(
    rewards_R: np.ndarray,
    group_offsets_B: np.ndarray,
    baseline_G: np.ndarray,
    kind: Advantage,
    threshold: float,
    outcomes_R: np.ndarray | None = None,
) -> np.ndarray:
    """float64 [R]: (r - b) / std r of the group ("normalized", population std) or r - b ("centered").

    Groups without contrast get 0, and so do those whose rewards are all the same but for rounding
    (`ROUNDING`): divided by a std of rounding errors these would push hard, either way. outcomes_R are the
    verifier's rewards, which say what has contrast; None: these. Give them when rewards_R hold more (a
    length penalty or a KL, say), which must not move the partition.
    """
    outcomes_R = rewards_R if outcomes_R is None else outcomes_R
    contrast_G = has_contrast(outcomes_R, group_offsets_B, threshold)
    check_offsets(group_offsets_B, len(rewards_R), "group_offsets_B", "group")
    centered_R = np.asarray(rewards_R, dtype=np.float64) - spread(np.asarray(baseline_G), group_offsets_B)
    std_G = _population_std(rewards_R, group_offsets_B)
    sizes_R = np.maximum(np.abs(rewards_R), np.abs(outcomes_R))
    largest_G = np.maximum.reduceat(sizes_R, group_offsets_B[:-1]) if len(std_G) else std_G
    scale_G = (contrast_G & (std_G > ROUNDING * largest_G)).astype(np.float64)
    if kind == "normalized":
        scale_G = np.divide(scale_G, std_G, out=np.zeros_like(std_G), where=scale_G > 0)
    return centered_R * spread(scale_G, group_offsets_B)


def _population_std(rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    means_R = spread(segment_means(rewards_R, group_offsets_B), group_offsets_B)
    return np.sqrt(segment_means((np.asarray(rewards_R, dtype=np.float64) - means_R) ** 2, group_offsets_B))


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs of every response token given its prompt alone, and the old policy's entropy; float32 [T]."""

    old_T: np.ndarray
    ref_T: np.ndarray | None
    """None where neither a KL nor RCC needs the reference policy"""
    rollout_T: np.ndarray
    entropy_T: np.ndarray


@dataclass(frozen=True)
class Advantages:
    """Advantages and the statistics behind them; float64."""

    advantage_R: np.ndarray
    """0 in groups without contrast"""
    contrast_G: np.ndarray
    """bool: whether the group has right and wrong rollouts"""
    mean_G: np.ndarray
    """Mean reward of the group"""
    baseline_G: np.ndarray
    """What was subtracted: the mean, or RCC's b*"""
    covariance_G: np.ndarray
    """Cov(reward, delta); 0 where no reference's log-probs are at hand"""
    delta_R: np.ndarray
    """Confidence of each rollout; likewise"""


def advantages(rollouts: RolloutBatch, log_probs: TokenLogProbs, config: Config) -> Advantages:
    """Advantages by value of the rewards; what is right, and whether a group has contrast, the verifier says.

    Raises NotFiniteError that names rollout and token where a log-prob or an entropy is not finite.
    """
    _check(log_probs, rollouts.offsets_R)
    rewards_R = _rewards(rollouts, log_probs, config)
    groups_G = rollouts.group_offsets_B
    contrast_G = has_contrast(rollouts.rewards_R, groups_G, config.reward.threshold)
    mean_G = baseline_G = mean_baseline(rewards_R, groups_G)
    covariance_G, delta_R = np.zeros_like(mean_G), np.zeros(len(rewards_R))
    other_T = log_probs.ref_T if config.rcc.reference == "ref" else log_probs.rollout_T
    if other_T is not None:
        delta_R = sequence_delta(log_probs.old_T, other_T, rollouts.offsets_R, config.rcc.delta)
        corrected = rcc_baseline(rewards_R, delta_R, groups_G, config.rcc.form)
        covariance_G = corrected.covariance_G
        if config.rcc.enabled:
            baseline_G = corrected.baseline_G
    advantage_R = group_advantages(
        rewards_R,
        groups_G,
        baseline_G,
        config.loss.advantage,
        config.reward.threshold,
        rollouts.rewards_R,
    )
    return Advantages(advantage_R, contrast_G, mean_G, baseline_G, covariance_G, delta_R)


def regularises(config: Config) -> bool:
    """Whether the loss of a resolved configuration holds a KL or an entropy bonus.

    These are of every rollout given its prompt alone: groups without contrast take part, and under BICC the
    plain layout is trained whatever bicc.weight is.
    """
    kl_in_loss = bool(config.loss.kl_coefficient) and config.loss.kl_in == "loss"
    return kl_in_loss or bool(config.loss.entropy_coefficient)


def needs_reference(config: Config) -> bool:
    """Whether a resolved configuration asks for the frozen reference policy's log-probs."""
    by_rcc = config.rcc.enabled and config.rcc.reference == "ref"
    return bool(config.loss.kl_coefficient) or by_rcc or config.monitoring.reference


def _check(log_probs: TokenLogProbs, offsets_R: np.ndarray) -> None:
    check_log_probs(log_probs.old_T, offsets_R, "log-prob under the old policy")
    check_log_probs(log_probs.rollout_T, offsets_R, "log-prob of the rollout engine")
    if log_probs.ref_T is not None:
        check_log_probs(log_probs.ref_T, offsets_R, "log-prob under the reference policy")
    check_log_probs(log_probs.entropy_T, offsets_R, "entropy under the old policy")


def _rewards(rollouts: RolloutBatch, log_probs: TokenLogProbs, config: Config) -> np.ndarray:
    """The verifier's rewards, which alone say what is right, shaped for their values."""
    lengths_R = np.diff(rollouts.offsets_R)
    penalty_R = overlong_penalty(lengths_R, config.rollout.max_new_tokens, config.reward)
    rewards_R = rollouts.rewards_R.astype(np.float64) - penalty_R
    if not (config.loss.kl_coefficient and config.loss.kl_in == "reward"):
        return rewards_R
    return kl_in_reward(
        rewards_R,
        log_probs.old_T,
        log_probs.ref_T,
        rollouts.offsets_R,
        config.loss.kl_coefficient,
        config.loss.kl_estimator,
    )
