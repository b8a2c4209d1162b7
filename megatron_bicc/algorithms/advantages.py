"""Computes each rollout's advantage, and the weight of its tokens in the step's loss.

Group-relative advantages (GRPO, arXiv 2402.03300; without the std: Dr. GRPO, arXiv 2503.20783); the
Reward-Confidence Correction of their baseline (arXiv 2603.13134); the soft overlong punishment (DAPO, arXiv
2503.14476).

The arrays are checked where they are built (training.batch.collate, TokenLogProbs.check), not here.

Shape suffixes: B groups, R rollouts, T response tokens of the step. Offsets hold one entry more:
`group_offsets_B` are offsets into the rollouts, `offsets_R` into the tokens.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from megatron_bicc import plugins
from megatron_bicc.algorithms.flat_arrays import check_log_probs, segment_means, segment_sums, spread
from megatron_bicc.algorithms.policy_loss import kl_in_reward
from megatron_bicc.config import Advantage, Aggregation, Config, DeltaKind, RccForm, RewardConfig
from megatron_bicc.errors import UserError
from megatron_bicc.packing.types import RolloutBatch

ROUNDING = 1e-6
"""A group's rewards count as equal if their std is at most this fraction of the largest of them, or of the
verifier's: KL penalties come from float32 log-probs, and rewards are float32."""


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs of every response token given its prompt alone, and the old policy's entropy; float32 [T]."""

    old_T: np.ndarray
    ref_T: np.ndarray | None
    """None if the reference policy is not computed (needs_reference)"""
    rollout_T: np.ndarray
    """Computed by the rollout engine"""
    entropy_T: np.ndarray

    def check(self, offsets_R: np.ndarray) -> None:
        """Raises NotFiniteError, with rollout and token, for a number that is not finite."""
        check_log_probs(self.old_T, offsets_R, "log-prob under the old policy")
        if self.ref_T is not None:
            check_log_probs(self.ref_T, offsets_R, "log-prob under the reference policy")
        check_log_probs(self.entropy_T, offsets_R, "entropy under the old policy")


@dataclass(frozen=True)
class Advantages:
    """Advantages and the statistics behind them; float64."""

    advantage_R: np.ndarray
    """0 in groups without contrast"""
    contrast_B: np.ndarray
    """bool: the group has right and wrong rollouts"""
    mean_B: np.ndarray
    """Mean shaped reward of the group"""
    baseline_R: np.ndarray
    """The baseline that was subtracted: the mean, RCC's b*, or the result of loss.baseline"""
    covariance_B: np.ndarray
    """Cov(reward, delta); 0 where the log-probs that rcc.reference names were not computed"""
    delta_R: np.ndarray
    """Confidence of each rollout; 0 likewise"""


def advantages(rollouts: RolloutBatch, log_probs: TokenLogProbs, config: Config) -> Advantages:
    """Computes every rollout's advantage from the shaped rewards.

    The verifier's rewards alone decide which rollouts are right and which groups have contrast. Raises
    UserError if a user's loss.baseline returns something unusable.
    """
    group_offsets_B = rollouts.group_offsets_B
    rewards_R = _shaped_rewards(rollouts, log_probs, config)
    contrast_B = has_contrast(rollouts.rewards_R, group_offsets_B, config.reward.threshold)
    mean_B = segment_means(rewards_R, group_offsets_B)
    covariance_B, delta_R = np.zeros_like(mean_B), np.zeros(len(rewards_R))
    baseline_R = load_baseline(config)(rewards_R, group_offsets_B)
    other_T = log_probs.ref_T if config.rcc.reference == "ref" else log_probs.rollout_T
    if other_T is not None:  # also without RCC, as its covariance is a metric
        delta_R = sequence_delta(log_probs.old_T, other_T, rollouts.offsets_R, config.rcc.delta)
        corrected = rcc_baseline(rewards_R, delta_R, group_offsets_B, config.rcc.form)
        covariance_B = corrected.covariance_B
        if config.rcc.enabled:
            baseline_R = spread(corrected.baseline_B, group_offsets_B)
    advantage_R = group_advantages(
        rewards_R,
        group_offsets_B,
        baseline_R,
        config.loss.advantage,
        config.reward.threshold,
        rollouts.rewards_R,
    )
    return Advantages(advantage_R, contrast_B, mean_B, baseline_R, covariance_B, delta_R)


def _shaped_rewards(rollouts: RolloutBatch, log_probs: TokenLogProbs, config: Config) -> np.ndarray:
    """Returns the verifier's rewards less the overlong penalty and a KL in the reward: float64 [R]."""
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


def has_contrast(rewards_R: np.ndarray, group_offsets_B: np.ndarray, threshold: float) -> np.ndarray:
    """Returns which groups have a correct rollout (reward > threshold) and an incorrect one: bool [B]."""
    right_B = segment_sums(np.asarray(rewards_R) > threshold, group_offsets_B)
    return (right_B > 0) & (right_B < np.diff(group_offsets_B))


def group_advantages(
    rewards_R: np.ndarray,
    group_offsets_B: np.ndarray,
    baseline_R: np.ndarray,
    kind: Advantage,
    threshold: float,
    outcomes_R: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (r - b) / std r of the group ("normalized", population std) or r - b ("centered"): float64 [R].

    0 in groups without contrast, and in those whose rewards are equal except for rounding (`ROUNDING`):
    divided by a std of rounding errors they would get large advantages of random sign. outcomes_R: the
    verifier's rewards, which decide the contrast; None: rewards_R. Pass them when rewards_R are shaped (by a
    length penalty or a KL, say): shaping must not move the partition.
    """
    outcomes_R = rewards_R if outcomes_R is None else outcomes_R
    contrast_B = has_contrast(outcomes_R, group_offsets_B, threshold)
    centered_R = np.asarray(rewards_R, dtype=np.float64) - baseline_R
    std_B = _population_std(rewards_R, group_offsets_B)
    sizes_R = np.maximum(np.abs(rewards_R), np.abs(outcomes_R))
    largest_B = np.maximum.reduceat(sizes_R, group_offsets_B[:-1]) if len(std_B) else std_B
    scale_B = (contrast_B & (std_B > ROUNDING * largest_B)).astype(np.float64)
    if kind == "normalized":
        scale_B = np.divide(scale_B, std_B, out=np.zeros_like(std_B), where=scale_B > 0)
    return centered_R * spread(scale_B, group_offsets_B)


def _population_std(rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    means_R = spread(segment_means(rewards_R, group_offsets_B), group_offsets_B)
    return np.sqrt(segment_means((np.asarray(rewards_R, dtype=np.float64) - means_R) ** 2, group_offsets_B))


class Baseline(Protocol):
    """Computes the baseline that is subtracted from each reward; `loss.baseline` names one."""

    def __call__(self, rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
        """Returns the baseline of every rollout: float [R], finite.

        Args:
            rewards_R: float64 [R], read-only; the verifier's rewards less penalties (overlong, KL in the
                reward). The rollouts of a group are adjacent.
            group_offsets_B: int64 [B + 1]; group b is rewards_R[group_offsets_B[b] : group_offsets_B[b + 1]],
                of at least two rollouts.

        Called on every process with the same arrays; it must return the same everywhere. Groups without
        contrast get an advantage of 0 whatever it returns for them.
        """


def mean_baseline(rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    """Returns the mean reward of each rollout's group, the baseline of GRPO: float64 [R]."""
    return spread(segment_means(rewards_R, group_offsets_B), group_offsets_B)


BASELINES: MappingProxyType[str, Baseline] = MappingProxyType({"mean": mean_baseline})
"""The built-in baselines by the name that loss.baseline takes."""


def load_baseline(config: Config) -> Baseline:
    """Returns the baseline that loss.baseline names: a built-in, or a user's by import path.

    A user's is checked at every call. Raises UserError for an unknown name, for a path that cannot be
    imported, and for a baseline other than the mean with rcc.enabled.
    """
    name = config.loss.baseline
    if config.rcc.enabled and name != "mean":
        raise UserError(
            f"loss.baseline is {name!r} with rcc.enabled=true; RCC corrects the mean: set rcc.enabled=false "
            "or loss.baseline=mean"
        )
    if not plugins.is_import_path(name):
        if name not in BASELINES:
            raise UserError(
                f"loss.baseline is {name!r}; it must be {', '.join(BASELINES)}, or an import path "
                "package.module:name or path/to/file.py:name"
            )
        return BASELINES[name]
    baseline = plugins.load("loss.baseline", name)

    def checked(rewards_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
        given_R = rewards_R.view()
        given_R.flags.writeable = False
        return _checked_baseline(name, baseline(given_R, group_offsets_B), len(rewards_R))

    return checked


def _checked_baseline(name: str, found: object, rollouts: int) -> np.ndarray:
    """Returns a user's baseline as float64 [R]. Raises UserError unless it is a finite number per rollout."""
    returned = f"loss.baseline is {name!r}; it returned"
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise UserError(f"{returned} a {type(found).__name__}; return a NumPy array of numbers")
    if found.shape != (rollouts,):
        raise UserError(f"{returned} shape {list(found.shape)}; return one value per rollout, [{rollouts}]")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise UserError(f"{returned} {found[bad[0]]} for rollout {bad[0]}; return finite values")
    return found.astype(np.float64)


@dataclass(frozen=True)
class RccBaseline:
    """The corrected baseline and its correction."""

    baseline_B: np.ndarray
    """float64 [B]: b*"""
    covariance_B: np.ndarray
    """float64 [B]: population covariance of reward and delta in the group"""


def rcc_baseline(
    rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_B: np.ndarray, form: RccForm
) -> RccBaseline:
    """Computes the Reward-Confidence Correction, a group baseline that depends on the policy's confidence.

    For the estimator w (R - b) grad log pi the constant baseline of least variance is b* = E[w^2 R] / E[w^2].
    With w = exp(delta) and delta the log-ratio of two policies on the rollout, b* = E[R] + 2 Cov(R, delta) to
    first order. E and Cov are over the group; no gradient flows through b*. (arXiv 2603.13134)

    form: E[R] + 2 Cov(R, delta) ("first_order") or E[w^2 R] / E[w^2] ("exact"). The exact form is
    always within [min r, max r] of its group.
    """
    rewards_R = np.asarray(rewards_R, dtype=np.float64)
    mean_B = segment_means(rewards_R, group_offsets_B)
    delta_mean_B = segment_means(delta_R, group_offsets_B)
    deviation_R = rewards_R - spread(mean_B, group_offsets_B)
    delta_deviation_R = delta_R - spread(delta_mean_B, group_offsets_B)
    covariance_B = segment_means(deviation_R * delta_deviation_R, group_offsets_B)
    if form == "first_order":
        return RccBaseline(mean_B + 2.0 * covariance_B, covariance_B)
    return RccBaseline(_self_normalised(rewards_R, delta_R, group_offsets_B), covariance_B)


def _self_normalised(rewards_R: np.ndarray, delta_R: np.ndarray, group_offsets_B: np.ndarray) -> np.ndarray:
    starts_B = group_offsets_B[:-1]
    largest_B = np.maximum.reduceat(delta_R, starts_B)
    # Shifted by the group's largest delta no weight overflows, and the largest is exactly 1.
    weight_R = np.exp(2.0 * (delta_R - spread(largest_B, group_offsets_B)))
    baseline_B = segment_sums(weight_R * rewards_R, group_offsets_B) / segment_sums(weight_R, group_offsets_B)
    # A convex combination: only rounding can push it outside the range of the rewards.
    lowest_B, highest_B = (ufunc.reduceat(rewards_R, starts_B) for ufunc in (np.minimum, np.maximum))
    return np.clip(baseline_B, lowest_B, highest_B)


def sequence_delta(
    logp_a_T: np.ndarray, logp_b_T: np.ndarray, offsets_R: np.ndarray, kind: DeltaKind
) -> np.ndarray:
    """Returns per rollout the mean ("token_mean") or sum ("sequence_sum") of log a - log b: float64 [R].

    logp_a_T, logp_b_T: log-probs of the sampled tokens under the old policy and under the one that
    rcc.reference names.
    """
    difference_T = np.asarray(logp_a_T, dtype=np.float64) - np.asarray(logp_b_T, dtype=np.float64)
    return (segment_means if kind == "token_mean" else segment_sums)(difference_T, offsets_R)


def overlong_penalty(lengths_R: np.ndarray, longest: int, reward: RewardConfig) -> np.ndarray:
    """Returns the penalty that is subtracted from the reward of a response of each length: float64 [R].

    0 up to (1 - overlong_buffer) * longest tokens, then linear up to overlong_penalty at `longest`, where a
    response is truncated. DAPO (arXiv 2503.14476, equation 13): longest 20480, a buffer of 0.2 (its cache of
    4096 tokens), a penalty of 1. `reward` must be resolved (presets.resolve).
    """
    cache = reward.overlong_buffer * longest
    return reward.overlong_penalty * np.clip((np.asarray(lengths_R) - (longest - cache)) / cache, 0.0, 1.0)


def token_weights(lengths_R: np.ndarray, kind: Aggregation, constant_length: int) -> np.ndarray:
    """Returns the weight of each token of a rollout in the loss: float64 [R]. All denominators are here.

    They cover ALL R rollouts of the optimizer step, so its loss is a plain sum over micro-batches and ranks,
    however the step is cut. Rollouts of groups without contrast count, although their policy loss is 0.

    "sequence_mean" 1 / (R |o_r|): mean over tokens, then over sequences (GRPO, arXiv 2402.03300).
    "constant" 1 / (R L) with L = constant_length: sum over tokens / constant (Dr. GRPO, arXiv 2503.20783).
    "token_mean" 1 / sum |o|: mean over all tokens (DAPO, arXiv 2503.14476).
    Raises ValueError for "constant" without a length.
    """
    lengths_R = np.asarray(lengths_R)
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


def regularises(config: Config) -> bool:
    """Returns whether the loss of a resolved configuration has a KL or entropy term.

    These terms cover every rollout given its prompt alone: groups without contrast are trained too, and under
    BICC the plain layout is trained whatever bicc.weight is.
    """
    kl_in_loss = bool(config.loss.kl_coefficient) and config.loss.kl_in == "loss"
    return kl_in_loss or bool(config.loss.entropy_coefficient)


def needs_reference(config: Config) -> bool:
    """Returns whether a resolved configuration needs the frozen reference policy's log-probs."""
    by_rcc = config.rcc.enabled and config.rcc.reference == "ref"
    return bool(config.loss.kl_coefficient) or by_rcc or config.monitoring.reference
