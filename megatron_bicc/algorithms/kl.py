"""KL towards the reference policy, estimated from the log-probs of the sampled tokens.

What counts in training is the gradient, not the value (arXiv 2506.09477, 2510.01555). For samples of pi:

    in the loss     k1  E grad = 0: noise
                    k2  E grad = grad KL(pi || pi_ref) of the token, given those before it
                    k3  E grad = grad KL(pi_ref || pi) of the token: the other direction
    in the reward   k1  E grad = -grad KL(pi || pi_ref) of the whole response
                    k2, k3  neither

Shape suffixes: T tokens of all responses, R rollouts.
"""

from typing import Literal

import numpy as np
import torch

from megatron_bicc.algorithms.segments import check_log_probs, segment_sums

Estimator = Literal["k1", "k2", "k3"]


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: Estimator) -> torch.Tensor:
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
    estimator: Estimator,
) -> np.ndarray:
    """float64 [R]: reward minus coefficient times the summed token KL of old against reference.

    Raises ValueError that names rollout and token where a log-prob is not finite.
    """
    check_log_probs(old_logp_T, offsets_R, "log-prob under the old policy")
    check_log_probs(ref_logp_T, offsets_R, "log-prob under the reference policy")
    old, ref = (torch.from_numpy(np.asarray(logp, dtype=np.float64)) for logp in (old_logp_T, ref_logp_T))
    penalty_R = segment_sums(kl_penalty(old, ref, estimator).numpy(), offsets_R)
    return np.asarray(rewards_R, dtype=np.float64) - coefficient * penalty_R
