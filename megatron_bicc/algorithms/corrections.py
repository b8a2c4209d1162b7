"""Weights of tokens in the policy loss that correct for the distribution which sampled them.

mu of a token is the rollout engine's probability of it as it was sampled: by the engine's kernels and number
format, and by the weights that the engine had then. pi_old is the policy at the start of the step. Both are
given the prompt alone. The weight is a function of a ratio of the two within bounds [low, high]:

                      ratio                               within      outside
    token_tis         pi_old / mu of the token            ratio       the nearer bound
    sequence_tis      its product over the response       ratio       the nearer bound
    token_mask        pi_old / mu of the token            ratio       0
    sequence_mask     its product over the response       ratio       0
    geometric_mask    its geometric mean                  1           0

Sources and defaults: docs/algorithms.md.

Shape suffixes: R rollouts, T response tokens. Offsets hold one entry more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from megatron_bicc.algorithms.flat_arrays import segment_means, segment_sums, spread
from megatron_bicc.config import LossConfig


@dataclass(frozen=True)
class Correction:
    """A way to compute the weights, which `loss.correction` names."""

    log_ratio: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Turns log pi_old - log mu of the tokens, float64 [T], and offsets_R into the logarithms of the ratio"""
    truncates: bool
    """Outside of the bounds the weight is the nearer one; else it is 0"""
    low: float
    """Default of loss.correction_low; 0: none"""
    high: float
    """Default of loss.correction_high"""
    weighs: bool = True
    """Within the bounds the weight is the ratio; else it is 1"""


def _of_token(log_ratio_T: np.ndarray, offsets_R: np.ndarray) -> np.ndarray:
    return log_ratio_T


def _product(log_ratio_T: np.ndarray, offsets_R: np.ndarray) -> np.ndarray:
    return spread(segment_sums(log_ratio_T, offsets_R), offsets_R)


def _geometric_mean(log_ratio_T: np.ndarray, offsets_R: np.ndarray) -> np.ndarray:
    return spread(segment_means(log_ratio_T, offsets_R), offsets_R)


CORRECTIONS = MappingProxyType(
    {
        "token_tis": Correction(_of_token, truncates=True, low=0.0, high=2.0),
        "sequence_tis": Correction(_product, truncates=True, low=0.0, high=2.0),
        "token_mask": Correction(_of_token, truncates=False, low=0.5, high=5.0),
        "sequence_mask": Correction(_product, truncates=False, low=0.0, high=2.0),
        "geometric_mask": Correction(_geometric_mean, truncates=False, low=0.999, high=1.001, weighs=False),
    }
)
"""The corrections by the name that loss.correction takes; "none" is not among them."""


@dataclass(frozen=True)
class CorrectionWeights:
    """The weights of a step's tokens, and the tokens that bounds or veto changed; [T] each."""

    weight_T: np.ndarray
    """float32, finite: multiplies the token's weight in the policy loss, not in KL and entropy"""
    truncated_T: np.ndarray
    """bool: the ratio is outside of the bounds, and the weight is a bound"""
    masked_T: np.ndarray
    """bool: the ratio is outside of the bounds, and the weight is 0"""
    vetoed_T: np.ndarray
    """bool: the weight is 0 as a token of the response is below loss.correction_veto; neither of the above"""


def correction_weights(
    old_logp_T: np.ndarray, rollout_logp_T: np.ndarray, offsets_R: np.ndarray, loss: LossConfig
) -> CorrectionWeights:
    """Computes the weights of loss.correction; 1 with "none". A response's weights depend on no other.

    old_logp_T, rollout_logp_T: finite log-probs of the sampled tokens under the old policy and the rollout
    engine, given the prompt alone. loss: resolved (presets.resolve).
    """
    # double precision and logarithms: neither a long response's product nor a tiny mu overflows
    log_ratio_T = np.asarray(old_logp_T, dtype=np.float64) - np.asarray(rollout_logp_T, dtype=np.float64)
    weight_T = np.ones(len(log_ratio_T))
    truncated_T, masked_T, vetoed_T = (np.zeros(len(log_ratio_T), dtype=bool) for _ in range(3))
    if loss.correction_veto:
        below_R = segment_sums(log_ratio_T < _log(loss.correction_veto), offsets_R)
        vetoed_T = spread(below_R > 0, offsets_R)
    if loss.correction != "none":
        correction = CORRECTIONS[loss.correction]
        x_T = correction.log_ratio(log_ratio_T, offsets_R)
        low, high = _log(loss.correction_low), _log(loss.correction_high)
        outside_T = ((x_T < low) | (x_T > high)) & ~vetoed_T
        if correction.weighs:
            weight_T = np.exp(np.clip(x_T, low, high))
        if correction.truncates:
            truncated_T = outside_T
        else:
            masked_T = outside_T
    weight_T[masked_T | vetoed_T] = 0.0
    return CorrectionWeights(weight_T.astype(np.float32), truncated_T, masked_T, vetoed_T)


def _log(bound: float) -> float:
    return math.log(bound) if bound else -math.inf
