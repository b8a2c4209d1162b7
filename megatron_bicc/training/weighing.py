"""What the algorithm makes of each rollout: its advantage and the weight of its tokens.

Shape suffixes: G groups, R rollouts, T tokens of all responses.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.algorithms.advantages import group_advantages, has_contrast, mean_baseline
from megatron_bicc.algorithms.kl import kl_in_reward
from megatron_bicc.algorithms.rcc import rcc_baseline, sequence_delta
from megatron_bicc.algorithms.segments import check_log_probs
from megatron_bicc.algorithms.shaping import overlong_penalty
from megatron_bicc.config import Config
from megatron_bicc.packing.types import RolloutBatch


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
    groups_G = rollouts.group_offsets_G
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
