"""Tests objectives and baselines by import path: the built-in's result, or one clear line."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_bicc.algorithms.advantages import TokenLogProbs, advantages, load_baseline
from megatron_bicc.algorithms.policy_loss import LossRows, PolicyLoss, load_objective, policy_loss
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError

OBJECTIVES = '''
import torch
from megatron_bicc.algorithms.policy_loss import TokenLoss, clip_bounds

def clipped(logp, old_logp, rows, loss):
    """The token objective, written again."""
    edges, x, a = clip_bounds(loss), logp - old_logp, rows.advantage
    kept = torch.where(a < 0, x.clamp(min=edges.low), x.clamp(max=edges.high))
    kept = torch.where(a < 0, kept.clamp(max=edges.dual), kept)
    return TokenLoss(
        -a * kept.exp(),
        low=(x < edges.low) & (a < 0),
        high=(x > edges.high) & (a > 0),
        dual=(x > edges.dual) & (a < 0),
    )

def changed(**what):
    def objective(logp, old_logp, rows, loss):
        found = vars(clipped(logp, old_logp, rows, loss))
        return TokenLoss(**found | {name: change(found[name]) for name, change in what.items()})
    return objective

too_short = changed(loss=lambda x: x[1:])
scalar = changed(loss=lambda x: x.sum())
broken = changed(loss=lambda x: x / 0.0)
detached = changed(loss=lambda x: x.detach())
float_mask = changed(high=lambda x: x.float())
no_mask = changed(low=lambda x: None)

def raising(logp, old_logp, rows, loss):
    raise RuntimeError("shapes do not fit")

def not_a_token_loss(logp, old_logp, rows, loss):
    return -rows.advantage * (logp - old_logp).exp()
'''

BASELINES = '''
import numpy as np

def leave_one_out(rewards_R, group_offsets_B):
    """Mean reward of the other rollouts of the group (RLOO)."""
    baseline_R = np.empty_like(rewards_R)
    for start, stop in zip(group_offsets_B[:-1], group_offsets_B[1:]):
        own = rewards_R[start:stop]
        baseline_R[start:stop] = (own.sum() - own) / (len(own) - 1)
    return baseline_R

def per_group(rewards_R, group_offsets_B):
    return np.zeros(len(group_offsets_B) - 1)

def broken(rewards_R, group_offsets_B):
    return np.where(np.arange(len(rewards_R)) == 2, np.nan, 0.0)

def text(rewards_R, group_offsets_B):
    return "0.5"

def writes(rewards_R, group_offsets_B):
    rewards_R[:] = 0.0
    return rewards_R
'''


@pytest.fixture
def in_file(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a user's file; returns the import path of a name in it."""

    def write(source: str, name: str) -> str:
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def loss_of(objective: str | None) -> tuple[PolicyLoss, torch.Tensor]:
    """The loss and the gradient of 400 rows on both sides of every edge."""
    generator = torch.Generator().manual_seed(0)
    old, noise, advantage = (torch.randn(400, generator=generator) for _ in range(3))
    logp = (old + noise).requires_grad_()
    weight = torch.rand(400, generator=generator)
    rows = LossRows(advantage, weight, torch.arange(400) // 7, old_logp=old)
    config = Config(algorithm="grpo")
    config.loss.objective, config.loss.dual_clip = objective, 1.5
    found = policy_loss(logp, None, rows, resolve(config).loss)
    found.share.backward()
    return found, logp.grad


def test_a_users_objective_equals_the_built_in_to_the_bit(in_file: Callable[[str, str], str]) -> None:
    (own, own_gradient), (built_in, gradient) = loss_of(in_file(OBJECTIVES, "clipped")), loss_of("token")
    assert torch.equal(own_gradient, gradient) and own.share == built_in.share
    for edge in ("low", "high", "dual"):
        mask = getattr(own, edge)
        assert mask.any() and torch.equal(mask, getattr(built_in, edge))
    assert not torch.equal(gradient, loss_of("sequence")[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_short", r"it returned loss of shape \[399\]; return one value per response row, \[400\]"),
        ("scalar", r"it returned loss of shape \[\]"),
        ("broken", "it returned the loss -?inf for a finite log-prob"),
        ("detached", "it returned a loss without a gradient"),
        ("float_mask", "it returned high of dtype torch.float32; return torch.bool"),
        ("no_mask", "it returned a NoneType for low"),
        ("raising", "it raised RuntimeError: shapes do not fit"),
        ("not_a_token_loss", "it returned a Tensor; return algorithms.policy_loss.TokenLoss"),
    ],
)
def test_an_unusable_objective_is_named(name: str, message: str, in_file: Callable[[str, str], str]) -> None:
    with pytest.raises(UserError, match=rf"^loss.objective is '.*mine.py:{name}'; {message}") as raised:
        loss_of(in_file(OBJECTIVES, name))
    assert "\n" not in str(raised.value)


def test_a_broken_policy_is_not_blamed_on_the_objective(in_file: Callable[[str, str], str]) -> None:
    logp = torch.tensor([-1.0, torch.nan], requires_grad=True)
    rows = LossRows(torch.ones(2), torch.ones(2), torch.tensor([0, 0]), old_logp=torch.tensor([-1.0, -1.0]))
    config = Config(algorithm="grpo")
    config.loss.objective = in_file(OBJECTIVES, "clipped")
    assert policy_loss(logp, None, rows, resolve(config).loss).share.isnan()


def test_an_unknown_objective_is_refused_with_the_names() -> None:
    config = Config(algorithm="grpo")
    config.loss.objective = "tokens"
    with pytest.raises(UserError, match="loss.objective is 'tokens'; it must be one of token, sequence, "):
        load_objective(config.loss)


ROLLOUTS = SimpleNamespace(
    rewards_R=np.array([1, 0, 0, 1, 1, 0], np.float32),
    offsets_R=np.arange(7),
    group_offsets_B=np.array([0, 3, 6]),
)
LOG_PROBS = TokenLogProbs(*[np.full(6, -1.0, np.float32)] * 4)


def configured(baseline: str, rcc: bool = False) -> Config:
    config = Config(algorithm="dr_grpo+rcc" if rcc else "dr_grpo")
    config.loss.baseline = baseline
    return resolve(config)


def test_leave_one_out_by_hand(in_file: Callable[[str, str], str]) -> None:
    found = advantages(ROLLOUTS, LOG_PROBS, configured(in_file(BASELINES, "leave_one_out")))
    np.testing.assert_array_equal(found.baseline_R, [0, 0.5, 0.5, 0.5, 0.5, 1])
    np.testing.assert_array_equal(found.advantage_R, [1, -0.5, -0.5, 0.5, 0.5, -1])
    mean = advantages(ROLLOUTS, LOG_PROBS, configured("mean"))
    np.testing.assert_allclose(mean.advantage_R, [2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("per_group", r"it returned shape \[2\]; return one value per rollout, \[6\]"),
        ("broken", "it returned nan for rollout 2; return finite values"),
        ("text", "it returned a str; return a NumPy array of numbers"),
    ],
)
def test_an_unusable_baseline_is_named(name: str, message: str, in_file: Callable[[str, str], str]) -> None:
    with pytest.raises(UserError, match=rf"^loss.baseline is '.*mine.py:{name}'; {message}") as raised:
        advantages(ROLLOUTS, LOG_PROBS, configured(in_file(BASELINES, name)))
    assert "\n" not in str(raised.value)


def test_a_baseline_cannot_change_the_rewards(in_file: Callable[[str, str], str]) -> None:
    with pytest.raises(ValueError, match="read-only"):
        advantages(ROLLOUTS, LOG_PROBS, configured(in_file(BASELINES, "writes")))


def test_only_the_mean_is_corrected(in_file: Callable[[str, str], str]) -> None:
    with pytest.raises(UserError, match=r"loss.baseline is '.*' with rcc.enabled=true; .*rcc.enabled=false"):
        load_baseline(configured(in_file(BASELINES, "leave_one_out"), rcc=True))
    with pytest.raises(UserError, match="loss.baseline is 'median'; it must be mean, or an import path"):
        load_baseline(configured("median"))
