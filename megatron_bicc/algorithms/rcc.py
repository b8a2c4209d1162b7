"""Reward-Confidence Correction: a group baseline that knows how confident the policy was (arXiv 2603.13134).

For the estimator w (R - b) grad log pi the constant baseline of least variance is b* = E[w^2 R] / E[w^2].
With w = exp(delta) and delta the log-ratio of two policies on the rollout, b* = E[R] + 2 Cov(R, delta) to
first order. E and Cov are over the group; no gradient flows through b*.

Shape suffixes: T tokens of all responses, R rollouts, G groups. Offsets hold one entry more.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bicc.algorithms.segments import (
    check_log_probs,
    check_offsets,
    check_rewards,
    segment_means,
    segment_sums,
    spread,
)

DeltaKind = Literal["token_mean", "sequence_sum"]
RccForm = Literal["first_order", "exact"]


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
    rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_G: np.ndarray, form: RccForm
) -> RccBaseline:
    """The baseline of every group: E[R] + 2 Cov(R, delta) ("first_order") or E[w^2 R] / E[w^2] ("exact").

    The exact form lies within [min r, max r] of its group whatever delta is.
    """
    check_offsets(group_offsets_G, len(rewards_R), "group_offsets_G", "group")
    check_rewards(rewards_R)
    rewards_R = np.asarray(rewards_R, dtype=np.float64)
    mean_G = segment_means(rewards_R, group_offsets_G)
    delta_mean_G = segment_means(delta_R, group_offsets_G)
    deviation_R = rewards_R - spread(mean_G, group_offsets_G)
    delta_deviation_R = delta_R - spread(delta_mean_G, group_offsets_G)
    covariance_G = segment_means(deviation_R * delta_deviation_R, group_offsets_G)
    if form == "first_order":
        return RccBaseline(mean_G + 2.0 * covariance_G, covariance_G)
    return RccBaseline(_self_normalised(rewards_R, delta_R, group_offsets_G), covariance_G)


def _self_normalised(rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_G: np.ndarray) -> np.ndarray:
    starts_G = group_offsets_G[:-1]
    largest_G = np.maximum.reduceat(delta_R, starts_G)
    # Shifted by the group's largest delta no weight overflows, and the largest is exactly 1.
    weight_R = np.exp(2.0 * (delta_R - spread(largest_G, group_offsets_G)))
    baseline_G = segment_sums(weight_R * rewards_R, group_offsets_G) / segment_sums(weight_R, group_offsets_G)
    # A convex combination; only rounding can carry it over an end.
    lowest_G, highest_G = (ufunc.reduceat(rewards_R, starts_G) for ufunc in (np.minimum, np.maximum))
    return np.clip(baseline_G, lowest_G, highest_G)
