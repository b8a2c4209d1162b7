"""How much a step's gradient would change with other prompts and rollouts, from its groups' parts.

What a step's ratios, confidences and groups looked like: numbers for the metrics, from flat arrays.

A number over nothing (a side without tokens, say) is left out of the dictionary, so no value is ever NaN.

Shape suffixes: T tokens of all responses, R rollouts, G groups. Offsets hold one entry more.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_bicc.algorithms.policy_loss import clip_bounds
from megatron_bicc.algorithms.segments import (
    check_log_probs,
    check_offsets,
    segment_means,
    segment_sums,
    spread,
)
from megatron_bicc.config import LossConfig


def gradient_statistics(sketches: Tensor, num_groups: int) -> dict[str, float]:
    """Variance over groups of a gradient that is the sum of its groups' parts. Keys:

    train/gradient_variance   M / (M - 1) sum_g |g - mean g|^2 with M = num_groups: an unbiased estimate of
                              the trace of the covariance of the summed gradient, groups being independent
    train/gradient_noise      that over the squared norm of the summed gradient; free of any scale

    `sketches` are the parts g [G, ...], or what keeps their inner products; M - G groups have a part of 0.
    Nothing of fewer than two groups; no noise where the gradient is 0.
    """
    if num_groups < 2:
        return {}
    parts = sketches.flatten(1).double()
    norm2 = float(parts.sum(0).square().sum())
    # of equal parts it is 0, and rounding can carry the difference below that
    variance = max((num_groups * float(parts.square().sum()) - norm2) / (num_groups - 1), 0.0)
    result = {"train/gradient_variance": variance}
    return result | {"train/gradient_noise": variance / norm2} if norm2 > 0 else result


QUANTILES = (("q01", 0.01), ("q50", 0.5), ("q99", 0.99))


@dataclass(frozen=True)
class StepTokens:
    """The trained responses of a step, end to end; any NumPy floating dtype."""

    old_logp_T: np.ndarray
    """Log-probs under the denominator of the ratio."""
    new_logp_T: np.ndarray
    """Log-probs under the policy in training, before the update that is looked at."""
    offsets_R: np.ndarray
    """int64 [R + 1]"""
    advantage_R: np.ndarray
    correct_R: np.ndarray
    """bool [R]: the side of each rollout, right or wrong"""
    ref_logp_T: np.ndarray | None = None
    """Log-probs under the reference policy."""
    rollout_logp_T: np.ndarray | None = None
    """Log-probs as the rollout engine computed them."""
    plain_logp_T: np.ndarray | None = None
    """pi_old given the prompt alone, where old_logp_T is given a context too; None: the two are the same."""
    contrast_R: np.ndarray | None = None
    """bool [R]: rollouts of groups with contrast, which alone have a ratio that is trained, an advantage and
    sides to compare; None: all. What the ratio of the others is does not matter, NaN included."""

    def __post_init__(self) -> None:
        rollouts = len(self.offsets_R) - 1
        for name in ("advantage_R", "correct_R", *(("contrast_R",) if self.contrast_R is not None else ())):
            entries = len(getattr(self, name))
            if entries != rollouts:
                raise ValueError(f"StepTokens.{name} has {entries} entries for {rollouts} rollouts")
        if self.correct_R.dtype != np.bool_:
            raise ValueError(f"StepTokens.correct_R has dtype {self.correct_R.dtype}; it must be bool")


def ratio_statistics(tokens: StepTokens, loss: LossConfig) -> dict[str, float]:
    """Statistics of the importance ratio and of the policies' distances. Keys, SIDE being right or wrong:

    ratio/SIDE/mean, /q01, /q50, /q99, /max   token ratios new / old
    clip/SIDE/low, /high, /dual               share of the side's tokens that this edge clips in the loss
    kl/old_new                                k3 estimate of KL(old || new) a token, by those ratios
    kl/old_ref                                k3 estimate of KL(old || ref) a token; needs ref_logp_T
    kl/rollout_old                            k3 estimate of KL(engine || old) a token: the engine mismatch
    kl/old_rollout                            that of KL(old || engine), by the weights old / engine
    tis/mean, /q01, /q50, /q99, /max          weights old / engine a token before any cap
    delta/right, delta/wrong, delta/gap       mean over the side's rollouts of the token mean of log old / ref
                                              and right minus wrong; needs ref_logp_T

    ratio/, clip/, delta/ and kl/old_new are of groups with contrast, the others of all tokens.
    The loss is a resolved LossConfig. Raises ValueError that names the rollout and token of a log-prob that
    is not finite.
    """
    trained_T = spread(_contrast(tokens), tokens.offsets_R)
    old_T, new_T = (np.where(trained_T, x, 0.0) for x in (tokens.old_logp_T, tokens.new_logp_T))
    check_log_probs(old_T, tokens.offsets_R, "log-prob under the old policy")
    check_log_probs(new_T, tokens.offsets_R, "log-prob under the policy in training")
    log_ratio_T = _difference(new_T, old_T)
    right_T = spread(tokens.correct_R, tokens.offsets_R)
    clipped = clip_masks(log_ratio_T, tokens.advantage_R, tokens.offsets_R, loss)
    result = _mean("kl/old_new", _k3(log_ratio_T[trained_T]))
    for side, mask_T in (("right", right_T & trained_T), ("wrong", ~right_T & trained_T)):
        result |= _distribution(f"ratio/{side}", np.exp(log_ratio_T[mask_T]))
        for edge, clipped_T in clipped.items():
            result |= _mean(f"clip/{side}/{edge}", clipped_T[mask_T])
    return result | _reference_statistics(tokens) | _engine_statistics(tokens)


def clip_masks(
    log_ratio_T: np.ndarray, advantage_R: np.ndarray, offsets_R: np.ndarray, loss: LossConfig
) -> dict[str, np.ndarray]:
    """bool [T] each for "low", "high" and "dual": the tokens whose loss that edge clips or masks.

    Follows the objective: under "sequence" whole responses are clipped; under "cispo" both edges hold for
    either sign of the advantage, and what is clipped is the weight; under "aspo" the dual clip holds for
    both signs, for A > 0 on the flipped ratio.
    """
    bounds = clip_bounds(loss)
    negative_T, positive_T = (spread(mask_R, offsets_R) for mask_R in (advantage_R < 0, advantage_R > 0))
    if loss.objective == "sequence":
        log_ratio_T = spread(segment_means(log_ratio_T, offsets_R), offsets_R)
    low_T, high_T = log_ratio_T < bounds.low, log_ratio_T > bounds.high
    if loss.objective != "cispo":
        low_T, high_T = low_T & negative_T, high_T & positive_T
    if loss.objective == "geometric":
        clipped_T = np.where(low_T, bounds.low, np.where(high_T, bounds.high, log_ratio_T))
        log_ratio_T = spread(segment_means(clipped_T, offsets_R), offsets_R)
    elif loss.objective == "cispo":
        log_ratio_T = np.clip(log_ratio_T, bounds.low, bounds.high)
    dual_T = negative_T & (log_ratio_T > bounds.dual)
    if loss.objective == "aspo":
        dual_T |= positive_T & (-log_ratio_T > bounds.dual)
    return {"low": low_T, "high": high_T, "dual": dual_T}


def contrast_statistics(correct_R: np.ndarray, group_offsets_B: np.ndarray) -> dict[str, float]:
    """How the groups split into right and wrong. Keys:

    contrast/share                  share of groups with both right and wrong rollouts
    contrast/right_N_wrong_M        share of groups with N right and M wrong rollouts, for every split of
                                    every group size that occurs: a fixed group size has fixed keys
    """
    check_offsets(group_offsets_B, len(correct_R), "group_offsets_B", "group")
    sizes_G = np.diff(group_offsets_B)
    right_G = segment_sums(correct_R, group_offsets_B).astype(np.int64)
    result = _mean("contrast/share", (right_G > 0) & (right_G < sizes_G))
    for size in np.unique(sizes_G):
        for right in range(size + 1):
            name = f"contrast/right_{right}_wrong_{size - right}"
            result |= _mean(name, (sizes_G == size) & (right_G == right))
    return result


def _reference_statistics(tokens: StepTokens) -> dict[str, float]:
    if tokens.ref_logp_T is None:
        return {}
    check_log_probs(tokens.ref_logp_T, tokens.offsets_R, "log-prob under the reference policy")
    log_ratio_T = _difference(tokens.ref_logp_T, _plain_logp(tokens))
    delta_R = -segment_means(log_ratio_T, tokens.offsets_R)
    result = _mean("kl/old_ref", _k3(log_ratio_T))
    contrast_R = _contrast(tokens)
    for side, side_R in (("right", tokens.correct_R), ("wrong", ~tokens.correct_R)):
        result |= _mean(f"delta/{side}", delta_R[side_R & contrast_R])
    if "delta/right" in result and "delta/wrong" in result:
        result["delta/gap"] = result["delta/right"] - result["delta/wrong"]
    return result


def _engine_statistics(tokens: StepTokens) -> dict[str, float]:
    if tokens.rollout_logp_T is None:
        return {}
    check_log_probs(tokens.rollout_logp_T, tokens.offsets_R, "log-prob of the rollout engine")
    return engine_statistics(_plain_logp(tokens), tokens.rollout_logp_T)


def engine_statistics(old_logp_T: np.ndarray, rollout_logp_T: np.ndarray) -> dict[str, float]:
    """kl/rollout_old, kl/old_rollout and tis/* of `ratio_statistics`.

    old_logp_T: of the policy given the prompt alone. rollout_logp_T: as the rollout engine computed them.
    """
    log_ratio_T = _difference(old_logp_T, rollout_logp_T)
    # the tokens are the engine's: under the other policy they count by their weight
    reverse_T = np.exp(log_ratio_T) * log_ratio_T - np.expm1(log_ratio_T)
    kl = _mean("kl/rollout_old", _k3(log_ratio_T)) | _mean("kl/old_rollout", reverse_T)
    return kl | _distribution("tis", np.exp(log_ratio_T))


def _contrast(tokens: StepTokens) -> np.ndarray:
    return np.ones(len(tokens.offsets_R) - 1, bool) if tokens.contrast_R is None else tokens.contrast_R


def _plain_logp(tokens: StepTokens) -> np.ndarray:
    return tokens.old_logp_T if tokens.plain_logp_T is None else tokens.plain_logp_T


def _difference(logp_a_T: np.ndarray, logp_b_T: np.ndarray) -> np.ndarray:
    return np.asarray(logp_a_T, dtype=np.float64) - np.asarray(logp_b_T, dtype=np.float64)


def _k3(log_ratio_T: np.ndarray) -> np.ndarray:
    """KL(p || q) from samples of p, given log q / p."""
    return np.expm1(log_ratio_T) - log_ratio_T


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(np.mean(values))} if len(values) else {}


def _distribution(name: str, values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = {f"{name}/{key}": float(np.quantile(values, q)) for key, q in QUANTILES}
    return _mean(f"{name}/mean", values) | quantiles | {f"{name}/max": float(values.max())}
