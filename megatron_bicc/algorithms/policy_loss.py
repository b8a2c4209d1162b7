"""The edges of the clip interval, in the logarithm of the ratio.

KL towards the reference policy, estimated from the log-probs of the sampled tokens.

What counts in training is the gradient, not the value (arXiv 2506.09477, 2510.01555). For samples of pi:

    in the loss     k1  E grad = 0: noise
                    k2  E grad = grad KL(pi || pi_ref) of the token, given those before it
                    k3  E grad = grad KL(pi_ref || pi) of the token: the other direction
    in the reward   k1  E grad = -grad KL(pi || pi_ref) of the whole response
                    k2, k3  neither

Shape suffixes: T tokens of all responses, R rollouts.

The policy loss of a micro-batch: ratio and clip by objective, KL, entropy bonus, engine-mismatch weight.

With x = log pi_theta - log pi_old of a token and A its advantage, the clipped objectives differ only in
where the mean over the response stands:

    token      -A exp(clip(x))          PPO clip per token (GRPO, Dr. GRPO, DAPO)
    sequence   -A exp(clip(mean x))     GSPO, arXiv 2507.18071
    geometric  -A exp(mean clip(x))     GMPO, arXiv 2507.20673

clip is one-sided, as min(rho A, clip(rho) A) is: from above for A > 0, from below for A < 0.

Shape suffix: T response rows of the micro-batch.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

from megatron_bicc.algorithms.segments import check_log_probs, segment_sums
from megatron_bicc.config import KlEstimator, LossConfig


@dataclass(frozen=True)
class ClipBounds:
    """Edges of the log ratio; the ratio at an edge is not clipped."""

    low: float
    """Below it a token of negative advantage is clipped; -inf: never."""
    high: float
    """Above it a token of positive advantage is clipped."""
    dual: float
    """Above it a token of negative advantage is clipped by the dual clip; inf: never."""


def clip_bounds(loss: LossConfig) -> ClipBounds:
    """Edges that a resolved LossConfig means; ValueError if it still holds a None."""
    for name in ("objective", "clip_low", "clip_high", "dual_clip"):
        if getattr(loss, name) is None:
            raise ValueError(f"loss.{name} is not set; fill it in with algorithms.presets.resolve")
    dual = math.log(loss.dual_clip) if loss.dual_clip else math.inf
    if loss.objective == "geometric":
        return ClipBounds(-loss.clip_low, loss.clip_high, dual)
    low = math.log1p(-loss.clip_low) if loss.clip_low < 1.0 else -math.inf
    return ClipBounds(low, math.log1p(loss.clip_high), dual)


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Per-token estimate of KL(pi || pi_ref) from samples of pi, same shape as logp, differentiable in it.

    With d = log pi_ref - log pi: "k1" -d and "k3" exp(d) - 1 - d, whose values are unbiased, and "k2"
    d^2 / 2, whose gradient is. John Schulman, "Approximating KL Divergence", 2020.
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"loss.kl_estimator is {estimator}; fill it in with algorithms.presets.resolve")


def kl_in_reward(
    rewards_R: np.ndarray,
    old_logp_T: np.ndarray,
    ref_logp_T: np.ndarray,
    offsets_R: np.ndarray,
    coefficient: float,
    estimator: KlEstimator,
) -> np.ndarray:
    """float64 [R]: reward minus coefficient times the summed token KL of old against reference.

    Raises ValueError that names rollout and token where a log-prob is not finite.
    """
    check_log_probs(old_logp_T, offsets_R, "log-prob under the old policy")
    check_log_probs(ref_logp_T, offsets_R, "log-prob under the reference policy")
    old, ref = (torch.from_numpy(np.asarray(logp, dtype=np.float64)) for logp in (old_logp_T, ref_logp_T))
    penalty_R = segment_sums(kl_penalty(old, ref, estimator).numpy(), offsets_R)
    return np.asarray(rewards_R, dtype=np.float64) - coefficient * penalty_R


@dataclass(frozen=True)
class LossRows:
    """What the loss needs of each response row; one-dimensional, of one length and device.

    Floating tensors are float32 or float64. A response's rows are all here: it is never split.
    """

    old_logp: torch.Tensor
    """Log-prob of the row's label under the denominator of the ratio."""
    advantage: torch.Tensor
    """Advantage of the row's rollout."""
    weight: torch.Tensor
    """Weight of the row in the step's loss (aggregation.token_weights, times mixing and pair scale)."""
    response: torch.Tensor
    """int64: index of the row's response segment in this micro-batch, from 0, without gaps."""
    regularisation: torch.Tensor | None = None
    """Weight of the row's KL and entropy in the step's loss (aggregation.token_weights); None: the rows take
    no part in these, as rows under a context don't."""
    ref_logp: torch.Tensor | None = None
    """Log-prob under the reference policy, given what old_logp's policy is given; needed for a KL in the
    loss."""
    rollout_logp: torch.Tensor | None = None
    """Log-prob as the rollout engine computed it; needed for TIS, where exp(old_logp - rollout_logp) weighs.
    Where old_logp is given a context that the engine never saw, add to this what the context changed."""
    entropy: torch.Tensor | None = None
    """Entropy of the policy at the row, with its gradient; needed for an entropy bonus."""

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None and tensor.shape != self.old_logp.shape:
                raise ValueError(
                    f"LossRows.{field.name} has shape {tuple(tensor.shape)}, "
                    f"but old_logp has {tuple(self.old_logp.shape)}"
                )
        if self.response.dtype != torch.int64:
            raise ValueError(f"LossRows.response has dtype {self.response.dtype}; it must be torch.int64")


def policy_loss(logp: torch.Tensor, rows: LossRows, loss: LossConfig) -> torch.Tensor:
    """The micro-batch's share of the step's loss, a scalar: a SUM over rows.

    Of each row it takes weight times the loss of its token, and regularisation times KL less entropy.

    logp [T] are the log-probs of the rows' labels under the policy in training. Shares of all micro-batches
    and ranks add up to the step's loss, and their gradients likewise. loss must be resolved
    (presets.resolve). Raises ValueError for a shape that does not fit, a setting left None, or rows without
    what a setting needs.
    """
    if logp.shape != rows.old_logp.shape:
        raise ValueError(
            f"logp has shape {tuple(logp.shape)}, but LossRows.old_logp has {tuple(rows.old_logp.shape)}"
        )
    bounds = clip_bounds(loss)
    loss_T = _OBJECTIVES[loss.objective](logp, rows, bounds)
    if loss.tis_cap:
        rollout_logp_T = _needed(rows, "rollout_logp", "tis_cap")
        loss_T = loss_T * (rows.old_logp - rollout_logp_T).exp().clamp(max=loss.tis_cap).detach()
    total = (rows.weight * loss_T).sum()
    if rows.regularisation is None:
        return total
    if loss.kl_coefficient and loss.kl_in == "loss":
        ref_logp_T = _needed(rows, "ref_logp", "kl_coefficient")
        kl_T = kl_penalty(logp, ref_logp_T, loss.kl_estimator)
        total = total + loss.kl_coefficient * (rows.regularisation * kl_T).sum()
    if loss.entropy_coefficient:
        entropy_T = _needed(rows, "entropy", "entropy_coefficient")
        total = total - loss.entropy_coefficient * (rows.regularisation * entropy_T).sum()
    return total


def _needed(rows: LossRows, name: str, setting: str) -> torch.Tensor:
    tensor = getattr(rows, name)
    if tensor is None:
        raise ValueError(f"loss.{setting} is set, but LossRows.{name} was not given")
    return tensor


def _clip(log_ratio_T: torch.Tensor, advantage_T: torch.Tensor, bounds: ClipBounds) -> torch.Tensor:
    """Bounded from above where A >= 0, from below where A < 0; the gradient stays at an edge, ends beyond."""
    return torch.where(advantage_T < 0, log_ratio_T.clamp(min=bounds.low), log_ratio_T.clamp(max=bounds.high))


def _dual_clip(log_ratio_T: torch.Tensor, advantage_T: torch.Tensor, bounds: ClipBounds) -> torch.Tensor:
    """|loss| <= c |A| where A < 0 (arXiv 1912.09729)."""
    return torch.where(advantage_T < 0, log_ratio_T.clamp(max=bounds.dual), log_ratio_T)


def _response_mean(values_T: torch.Tensor, response_T: torch.Tensor) -> torch.Tensor:
    """[T]: the mean over the row's response, at each of its rows."""
    # As many slots as rows: there are never more responses, and no count has to come back from the device.
    sums = torch.zeros_like(values_T).index_add(0, response_T, values_T)
    counts = torch.zeros_like(values_T).index_add(0, response_T, torch.ones_like(values_T))
    return sums[response_T] / counts[response_T]


def _token(logp_T: torch.Tensor, rows: LossRows, bounds: ClipBounds) -> torch.Tensor:
    return _clipped_loss(logp_T - rows.old_logp, rows.advantage, bounds)


def _sequence(logp_T: torch.Tensor, rows: LossRows, bounds: ClipBounds) -> torch.Tensor:
    return _clipped_loss(_response_mean(logp_T - rows.old_logp, rows.response), rows.advantage, bounds)


def _geometric(logp_T: torch.Tensor, rows: LossRows, bounds: ClipBounds) -> torch.Tensor:
    clipped_T = _clip(logp_T - rows.old_logp, rows.advantage, bounds)
    mean_T = _response_mean(clipped_T, rows.response)
    return -rows.advantage * _dual_clip(mean_T, rows.advantage, bounds).exp()


def _clipped_loss(log_ratio_T: torch.Tensor, advantage_T: torch.Tensor, bounds: ClipBounds) -> torch.Tensor:
    log_ratio_T = _clip(log_ratio_T, advantage_T, bounds)
    return -advantage_T * _dual_clip(log_ratio_T, advantage_T, bounds).exp()


def _aspo(logp_T: torch.Tensor, rows: LossRows, bounds: ClipBounds) -> torch.Tensor:
    """Tokens beyond the clip interval are masked; for A > 0 the ratio is flipped (arXiv 2510.06062).

    The flipped ratio pi_old pi / sg(pi^2) has value pi_old / pi and that times grad log pi for gradient. Its
    dual clip is soft: it bounds the value and keeps the gradient. For A < 0 ratio and dual clip are PPO's.
    """
    log_ratio_T = logp_T - rows.old_logp
    negative_T = rows.advantage < 0
    flipped_T = (-log_ratio_T.detach()).clamp(max=bounds.dual) + (logp_T - logp_T.detach())
    log_weight_T = torch.where(negative_T, _dual_clip(log_ratio_T, rows.advantage, bounds), flipped_T)
    masked_T = torch.where(negative_T, log_ratio_T < bounds.low, log_ratio_T > bounds.high)
    return -rows.advantage * log_weight_T.exp().masked_fill(masked_T, 0.0)


def _cispo(logp_T: torch.Tensor, rows: LossRows, bounds: ClipBounds) -> torch.Tensor:
    """-A sg(clip(rho)) log pi (arXiv 2506.13585); the dual clip bounds the weight where A < 0."""
    log_weight_T = (logp_T - rows.old_logp).detach().clamp(bounds.low, bounds.high)
    return -rows.advantage * _dual_clip(log_weight_T, rows.advantage, bounds).exp() * logp_T


_OBJECTIVES = {
    "token": _token,
    "sequence": _sequence,
    "geometric": _geometric,
    "aspo": _aspo,
    "cispo": _cispo,
}
