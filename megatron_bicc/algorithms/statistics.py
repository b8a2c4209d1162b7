"""Metrics from flat arrays: a step's ratios, confidences, groups and gradient variance.

Statistics over empty sets (a side without tokens, say) are omitted, so no value is ever NaN. The arrays
are checked where they are built, not here.

Shape suffixes: B groups, R rollouts, T response tokens. Offsets hold one entry more.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bicc.algorithms.corrections import CorrectionWeights
from megatron_bicc.algorithms.flat_arrays import segment_means, segment_sums, spread
from megatron_bicc.algorithms.policy_loss import kl_penalty


def gradient_statistics(sketches: Tensor, num_groups: int) -> dict[str, float]:
    """Estimates the variance, over groups, of a gradient that is the sum of one part per group. Keys:

    train/gradient_variance   n / (n - 1) sum_g |g - mean g|^2 with n = num_groups: an unbiased estimate of
                              the trace of the covariance of the summed gradient, for independent groups
    train/gradient_noise      that over the squared norm of the summed gradient; independent of scale

    sketches: the parts g [B, ...], or projections that keep their inner products; the other n - B groups
    have a part of 0. Empty for fewer than two groups; without the noise if the gradient is 0.
    """
    if num_groups < 2:
        return {}
    parts = sketches.flatten(1).double()
    norm2 = float(parts.sum(0).square().sum())
    # 0 for equal parts, where rounding can make the difference negative
    variance = max((num_groups * float(parts.square().sum()) - norm2) / (num_groups - 1), 0.0)
    result = {"train/gradient_variance": variance}
    return result | {"train/gradient_noise": variance / norm2} if norm2 > 0 else result


QUANTILES = (("q01", 0.01), ("q50", 0.5), ("q99", 0.99))


@dataclass(frozen=True)
class RatioTokens:
    """The ratio that the loss used, and what it clipped; [T], NaN where the layout trains no token."""

    old_logp_T: np.ndarray
    """Log-probs in the ratio's denominator"""
    new_logp_T: np.ndarray
    """Log-probs under the policy in training, before the update"""
    low_T: np.ndarray
    """1 where the token's loss was clipped at the lower edge, else 0; the mean if several segments train the
    token. The objective defines what is clipped (policy_loss.TokenLoss)."""
    high_T: np.ndarray
    """1 where the token's loss was clipped at the upper edge, else 0; averaged in the same way"""
    dual_T: np.ndarray
    """1 where the token's loss was clipped by the dual clip, else 0; averaged in the same way"""


@dataclass(frozen=True)
class StepTokens:
    """The trained responses of a step, end to end; any NumPy floating dtype."""

    ratio: RatioTokens
    offsets_R: np.ndarray
    """int64 [R + 1]"""
    correct_R: np.ndarray
    """bool [R]: the side of each rollout, right or wrong"""
    contrast_R: np.ndarray
    """bool [R]: rollouts of groups with contrast; only these have a trained ratio and sides to compare"""
    plain_logp_T: np.ndarray
    """Log-probs of the old policy given the prompt alone"""
    rollout_logp_T: np.ndarray
    """Log-probs computed by the rollout engine"""
    ref_logp_T: np.ndarray | None
    """Log-probs under the reference policy; None where it is not computed"""


def ratio_statistics(tokens: StepTokens) -> dict[str, float]:
    """Computes statistics of the importance ratio and distances of the policies. SIDE is right or wrong:

    ratio/SIDE/mean, /q01, /q50, /q99, /max   token ratios new / old
    clip/SIDE/low, /high, /dual               share of the side's tokens that this edge clips in the loss
    kl/old_new                                k3 estimate of KL(old || new) per token, by those ratios
    kl/old_ref                                k3 estimate of KL(old || ref) per token; needs ref_logp_T
    kl/rollout_old                            k3 estimate of KL(engine || old) per token: the engine mismatch
    kl/old_rollout                            estimate of KL(old || engine), tokens weighted by old / engine
    correction/ratio/mean, /q01, ... /max     token ratios old / engine, before any correction
    delta/right, delta/wrong, delta/gap       mean over the side's rollouts of the token mean of log old / ref
                                              and right minus wrong; needs ref_logp_T

    ratio/, clip/, delta/ and kl/old_new cover the groups with contrast, the others all tokens.
    """
    trained_T = spread(tokens.contrast_R, tokens.offsets_R)
    old_T, new_T = (x[trained_T] for x in (tokens.ratio.old_logp_T, tokens.ratio.new_logp_T))
    ratio_T = np.exp(_difference(new_T, old_T))
    right_T = spread(tokens.correct_R, tokens.offsets_R)[trained_T]
    result = _mean("kl/old_new", _kl(old_T, new_T))
    for side, side_T in (("right", right_T), ("wrong", ~right_T)):
        result |= _distribution(f"ratio/{side}", ratio_T[side_T])
        for edge in ("low", "high", "dual"):
            result |= _mean(f"clip/{side}/{edge}", getattr(tokens.ratio, f"{edge}_T")[trained_T][side_T])
    engine = engine_statistics(tokens.plain_logp_T, tokens.rollout_logp_T)
    return result | _reference_statistics(tokens) | engine


def _reference_statistics(tokens: StepTokens) -> dict[str, float]:
    if tokens.ref_logp_T is None:
        return {}
    delta_R = segment_means(_difference(tokens.plain_logp_T, tokens.ref_logp_T), tokens.offsets_R)
    result = _mean("kl/old_ref", _kl(tokens.plain_logp_T, tokens.ref_logp_T))
    for side, side_R in (("right", tokens.correct_R), ("wrong", ~tokens.correct_R)):
        result |= _mean(f"delta/{side}", delta_R[side_R & tokens.contrast_R])
    if "delta/right" in result and "delta/wrong" in result:
        result["delta/gap"] = result["delta/right"] - result["delta/wrong"]
    return result


def engine_statistics(old_logp_T: np.ndarray, rollout_logp_T: np.ndarray) -> dict[str, float]:
    """Returns kl/rollout_old, kl/old_rollout and correction/ratio/* of `ratio_statistics`.

    old_logp_T: under the policy, given the prompt alone. rollout_logp_T: computed by the rollout
    engine.
    """
    log_ratio_T = _difference(old_logp_T, rollout_logp_T)
    # the tokens are samples of the engine: an expectation under the policy weights them by old / engine
    reverse_T = np.exp(log_ratio_T) * log_ratio_T - np.expm1(log_ratio_T)
    kl = _mean("kl/rollout_old", _kl(rollout_logp_T, old_logp_T)) | _mean("kl/old_rollout", reverse_T)
    return kl | _distribution("correction/ratio", np.exp(log_ratio_T))


def correction_statistics(
    old_logp_T: np.ndarray,
    rollout_logp_T: np.ndarray,
    staleness_T: np.ndarray,
    weights: CorrectionWeights | None,
) -> dict[str, float]:
    """Computes statistics of the correction's weights, over all tokens and, as KEY/staleness_N, by staleness:

    correction/mean, /max                      the weights
    correction/truncated, /masked, /vetoed     shares of tokens, as in CorrectionWeights
    correction/ess                             effective sample size, (sum w)^2 / sum w^2, over the number of
                                               tokens; 0 if all weights are 0
    tokens/staleness_N                         number of tokens of this staleness
    kl/rollout_old/staleness_N                 as in `ratio_statistics`

    old_logp_T, rollout_logp_T: as in `engine_statistics`. staleness_T: integers, version of the old policy
    less that of the weights that sampled the token. weights: None without a correction; then only the last
    two.
    """
    found = {} if weights is None else _weight_statistics(weights, np.ones(len(staleness_T), dtype=bool))
    for staleness in np.unique(staleness_T):
        at_T = staleness_T == staleness
        by = {"tokens": float(at_T.sum())} | _mean(
            "kl/rollout_old", _kl(rollout_logp_T[at_T], old_logp_T[at_T])
        )
        if weights is not None:
            by |= _weight_statistics(weights, at_T)
        found |= {f"{name}/staleness_{staleness}": value for name, value in by.items()}
    return found


def _weight_statistics(weights: CorrectionWeights, at_T: np.ndarray) -> dict[str, float]:
    """Returns the statistics of `correction_statistics` of some tokens, bool [T]; there is at least one."""
    weight = weights.weight_T[at_T].astype(np.float64)
    squares = float(np.square(weight).sum())
    return {
        "correction/mean": float(weight.mean()),
        "correction/max": float(weight.max()),
        "correction/truncated": float(weights.truncated_T[at_T].mean()),
        "correction/masked": float(weights.masked_T[at_T].mean()),
        "correction/vetoed": float(weights.vetoed_T[at_T].mean()),
        "correction/ess": float(weight.sum()) ** 2 / (len(weight) * squares) if squares else 0.0,
    }


def contrast_statistics(correct_R: np.ndarray, group_offsets_B: np.ndarray) -> dict[str, float]:
    """Computes how the groups split into right and wrong. Keys:

    contrast/share                  share of groups with both right and wrong rollouts
    contrast/right_N_wrong_M        share of groups with N right and M wrong rollouts, for every split of
                                    every group size that occurs: a fixed group size has fixed keys
    """
    sizes_B = np.diff(group_offsets_B)
    right_B = segment_sums(correct_R, group_offsets_B).astype(np.int64)
    result = _mean("contrast/share", (right_B > 0) & (right_B < sizes_B))
    for size in np.unique(sizes_B):
        for right in range(size + 1):
            name = f"contrast/right_{right}_wrong_{size - right}"
            result |= _mean(name, (sizes_B == size) & (right_B == right))
    return result


def expert_statistics(load_XY: Tensor, losses_X2: Tensor | None) -> dict[str, float]:
    """Computes how evenly the routers spread the response tokens; returns nothing without experts.

    moe/load/layer_N                 largest load of an expert over the mean, in layer N of the model, from 0
    moe/load/mean, moe/load/max      its mean and maximum over layers; 1: all experts have the same load
    moe/load/unused                  share of all layers' experts that no token reached
    moe/load_balancing_loss          mean over layers, without its coefficient; 1: even
    moe/z_loss                       mean over layers, without its coefficient

    load_XY: float64 [X layers, Y experts], tokens sent to each expert; Y is 0 without experts.
    losses_X2: float64, both losses of each layer, if they are on.
    """
    if not load_XY.numel():
        return {}
    parts = [load_XY] if losses_X2 is None else [load_XY, losses_X2]
    on_host = torch.cat(parts, dim=1).cpu().numpy()  # one copy
    tokens_XY, values_X2 = np.split(on_host, [load_XY.shape[1]], axis=1)
    load_X = tokens_XY.max(1) / tokens_XY.mean(1)
    found = {f"moe/load/layer_{layer}": float(load) for layer, load in enumerate(load_X)}
    found |= _mean("moe/load/mean", load_X) | {"moe/load/max": float(load_X.max())}
    found |= _mean("moe/load/unused", (tokens_XY == 0).ravel())
    if losses_X2 is not None:
        balance, z = values_X2.mean(0).tolist()
        found |= {"moe/load_balancing_loss": balance, "moe/z_loss": z}
    return found


def _difference(logp_a_T: np.ndarray, logp_b_T: np.ndarray) -> np.ndarray:
    return np.asarray(logp_a_T, dtype=np.float64) - np.asarray(logp_b_T, dtype=np.float64)


def _kl(p_T: np.ndarray, q_T: np.ndarray) -> np.ndarray:
    """Returns the k3 estimate of KL(p || q) per token, from log-probs of samples of p: float64 [T]."""
    p, q = (torch.from_numpy(np.asarray(logp_T, dtype=np.float64)) for logp_T in (p_T, q_T))
    return kl_penalty(p, q, "k3").numpy()


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(np.mean(values, dtype=np.float64))} if len(values) else {}


def _distribution(name: str, values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = {f"{name}/{key}": float(np.quantile(values, q)) for key, q in QUANTILES}
    return _mean(f"{name}/mean", values) | quantiles | {f"{name}/max": float(values.max())}
