"""Tests the expected gradient of each KL estimator, exactly: all responses of a small policy are enumerated.

The policy gives responses of two tokens out of three; its parameters are the logits of the first token and of
the second after each first one. Shape suffixes: O responses, T their tokens, one after another, P parameters.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bicc.algorithms.policy_loss import kl_in_reward, kl_penalty

RESPONSES = list(product(range(3), range(3)))
OFFSETS_O = np.arange(len(RESPONSES) + 1) * 2
RANDOM = torch.Generator().manual_seed(0)
LOGITS, REFERENCE = (torch.randn(4, 3, generator=RANDOM, dtype=torch.float64) for _ in range(2))


def token_log_probs(logits: Tensor) -> Tensor:
    """[T]: of every response's tokens."""
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[place] for a, b in RESPONSES for place in ((0, a), (1 + a, b))])


def probabilities(logits: Tensor) -> Tensor:
    """[O]"""
    return token_log_probs(logits).reshape(-1, 2).sum(1).exp()


def gradient(of: Callable[[Tensor], Tensor]) -> Tensor:
    """[P] at the policy."""
    logits = LOGITS.clone().requires_grad_()
    of(logits).backward()
    return logits.grad.flatten()


def response_kl(logits: Tensor) -> Tensor:
    """KL(policy || reference) of whole responses."""
    p = probabilities(logits)
    return (p * (p / probabilities(REFERENCE)).log()).sum()


def tokens_kl(logits: Tensor, backwards: bool = False) -> Tensor:
    """Sum over a response's places of the next token's KL, at the places that the policy at hand visits."""
    p, q = logits.softmax(-1), REFERENCE.softmax(-1)
    p, q = (q, p) if backwards else (p, q)
    visits = torch.cat([torch.ones(1), LOGITS[0].softmax(-1)])
    return (visits * (p * (p / q).log()).sum(-1)).sum()


def in_the_loss(estimator: str) -> Tensor:
    """Expected gradient of the penalty as a term of each token's loss."""

    def loss(logits: Tensor) -> Tensor:
        penalty_T = kl_penalty(token_log_probs(logits), token_log_probs(REFERENCE), estimator)
        return (probabilities(LOGITS) * penalty_T.reshape(-1, 2).sum(1)).sum()

    return gradient(loss)


def in_the_reward(estimator: str) -> Tensor:
    """Expected policy gradient of the penalised reward, the reward itself being 0."""
    old_T, ref_T = (token_log_probs(x).numpy() for x in (LOGITS, REFERENCE))
    rewards = torch.from_numpy(kl_in_reward(np.zeros(9), old_T, ref_T, OFFSETS_O, 1.0, estimator))
    weight = probabilities(LOGITS) * rewards
    return gradient(lambda logits: (weight * token_log_probs(logits).reshape(-1, 2).sum(1)).sum())


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def test_in_the_loss_k2_has_the_gradient_of_each_tokens_kl() -> None:
    assert relative_error(in_the_loss("k2"), gradient(tokens_kl)) < 1e-12


def test_in_the_loss_k1_has_none() -> None:
    assert in_the_loss("k1").abs().max() < 1e-15


def test_in_the_loss_k3_has_that_of_the_other_direction() -> None:
    other = gradient(lambda logits: tokens_kl(logits, backwards=True))
    assert relative_error(in_the_loss("k3"), other) < 1e-12
    assert relative_error(in_the_loss("k3"), gradient(tokens_kl)) > 0.3


def test_in_the_reward_k1_has_the_gradient_of_the_responses_kl() -> None:
    """With the sign of a reward; the earlier tokens' part in where the later ones are drawn included."""
    assert relative_error(-in_the_reward("k1"), gradient(response_kl)) < 1e-12
    assert relative_error(-in_the_reward("k1"), gradient(tokens_kl)) > 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_reward_the_others_have_that_of_no_kl(estimator: str) -> None:
    for truth in (gradient(response_kl), gradient(tokens_kl)):
        assert relative_error(-in_the_reward(estimator), truth) > 0.3
