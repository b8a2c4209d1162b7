"""Group-relative advantages (GRPO, arXiv 2402.03300; without the std: Dr. GRPO, arXiv 2503.20783).

Shape suffixes: R rollouts, G groups. `group_offsets_G` holds G + 1 entries into the rollouts.
"""

from typing import Literal

import numpy as np

from megatron_bicc.algorithms.segments import (
    check_offsets,
    check_rewards,
    segment_means,
    segment_sums,
    spread,
)

Advantage = Literal["normalized", "centered"]

ROUNDING = 1e-6
"""Rewards whose std is at most this share of the largest of them, or of the verifier's, are the same but for
rounding: KL penalties come of float32 log-probs, rewards of float32."""


def has_contrast(rewards_R: np.ndarray, group_offsets_G: np.ndarray, threshold: float) -> np.ndarray:
    """bool [G]: whether a group holds both a correct rollout (reward > threshold) and an incorrect one.

    Raises ValueError for offsets that do not cut the rollouts into non-empty groups and for a reward that is
    not finite.
    """
    check_offsets(group_offsets_G, len(rewards_R), "group_offsets_G", "group")
    check_rewards(rewards_R)
    right_G = segment_sums(np.asarray(rewards_R) > threshold, group_offsets_G)
    return (right_G > 0) & (right_G < np.diff(group_offsets_G))


def mean_baseline(rewards_R: np.ndarray, group_offsets_G: np.ndarray) -> np.ndarray:
    """float64 [G]: mean reward of each group, the baseline of GRPO."""
    check_offsets(group_offsets_G, len(rewards_R), "group_offsets_G", "group")
    return segment_means(rewards_R, group_offsets_G)


def group_advantages(
    rewards_R: np.ndarray,
    group_offsets_G: np.ndarray,
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
    contrast_G = has_contrast(outcomes_R, group_offsets_G, threshold)
    check_offsets(group_offsets_G, len(rewards_R), "group_offsets_G", "group")
    centered_R = np.asarray(rewards_R, dtype=np.float64) - spread(np.asarray(baseline_G), group_offsets_G)
    std_G = _population_std(rewards_R, group_offsets_G)
    sizes_R = np.maximum(np.abs(rewards_R), np.abs(outcomes_R))
    largest_G = np.maximum.reduceat(sizes_R, group_offsets_G[:-1]) if len(std_G) else std_G
    scale_G = (contrast_G & (std_G > ROUNDING * largest_G)).astype(np.float64)
    if kind == "normalized":
        scale_G = np.divide(scale_G, std_G, out=np.zeros_like(std_G), where=scale_G > 0)
    return centered_R * spread(scale_G, group_offsets_G)


def _population_std(rewards_R: np.ndarray, group_offsets_G: np.ndarray) -> np.ndarray:
    means_R = spread(segment_means(rewards_R, group_offsets_G), group_offsets_G)
    return np.sqrt(segment_means((np.asarray(rewards_R, dtype=np.float64) - means_R) ** 2, group_offsets_G))
