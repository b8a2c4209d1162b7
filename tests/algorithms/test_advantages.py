"""Tests advantages, RCC baselines, token weights, KL in the reward, and malformed arrays."""

import math

import numpy as np
import pytest
import torch
from algorithms import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bicc.algorithms.advantages import (
    TokenLogProbs,
    group_advantages,
    has_contrast,
    mean_baseline,
    rcc_baseline,
    sequence_delta,
    token_weights,
)
from megatron_bicc.algorithms.flat_arrays import check_offsets, check_rewards, spread
from megatron_bicc.algorithms.policy_loss import LossRows, kl_in_reward, policy_loss
from megatron_bicc.config import LossConfig
from megatron_bicc.errors import UserError

RNG = np.random.default_rng(0)
OFFSETS_B = np.array([0, 4, 7, 23, 26, 28, 33])
SPLIT = zip(reference.SIZES, reference.RIGHT, strict=True)
REWARDS_R = np.concatenate([np.arange(size) < right for size, right in SPLIT]) * 1.0


def slices(offsets: np.ndarray) -> list[slice]:
    return [slice(a, b) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


# ---- advantages


@pytest.mark.parametrize("kind", ["normalized", "centered"])
def test_advantages_of_ragged_groups(kind: str) -> None:
    baseline_R = mean_baseline(REWARDS_R, OFFSETS_B)
    advantage_R = group_advantages(REWARDS_R, OFFSETS_B, baseline_R, kind, 0.5)
    expected = []
    for part in slices(OFFSETS_B):
        group = [reference.Rollout([], [], r, []) for r in REWARDS_R[part]]
        expected += reference.advantages(group, kind == "normalized")
    np.testing.assert_allclose(advantage_R, expected, rtol=1e-13)
    assert advantage_R.dtype == np.float64


def test_contrast_needs_both_sides_and_the_threshold_itself_is_wrong() -> None:
    np.testing.assert_array_equal(has_contrast(REWARDS_R, OFFSETS_B, 0.5), [1, 1, 1, 0, 0, 1])
    assert not has_contrast(np.array([0.5, 0.2]), np.array([0, 2]), 0.5)[0]


def test_rewards_that_are_not_binary_are_split_by_threshold_and_weighed_by_value() -> None:
    rewards_R = np.array([0.9, 0.6, 0.1, 0.3, 0.2, 0.4])
    offsets_B = np.array([0, 3, 6])
    baseline_R = mean_baseline(rewards_R, offsets_B)
    advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, "normalized", 0.5)
    group = np.array([0.9, 0.6, 0.1])
    np.testing.assert_allclose(advantage_R[:3], (group - group.mean()) / group.std(), rtol=1e-13)
    np.testing.assert_array_equal(advantage_R[3:], 0.0)  # values differ, but all are wrong


def test_given_outcomes_say_what_has_contrast() -> None:
    rewards_R, offsets_B = np.array([0.4, 0.1, 0.7, 0.2, 0.3, 0.3]), np.array([0, 2, 4, 6])
    baseline_R, outcomes_R = mean_baseline(rewards_R, offsets_B), np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, "normalized", 0.5, outcomes_R)
    np.testing.assert_allclose(advantage_R, [1, -1, 0, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("kind", ["normalized", "centered"])
@pytest.mark.parametrize("error", [0.0, 1e-16, 1e-9])
@pytest.mark.parametrize("level", [0.0, 0.3, -7.0])
def test_shaped_rewards_that_tie_up_to_rounding_teach_nothing(level: float, error: float, kind: str) -> None:
    """Whichever side rounding happens to favour: with its own tiny std it would be worth 1 or more."""
    outcomes_R, offsets_B = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 4])
    rewards_R = level + error * np.array([-1.0, 1.0, 0.0, -1.0])
    for baseline_R in (mean_baseline(rewards_R, offsets_B), mean_baseline(rewards_R, offsets_B) + error):
        advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, kind, 0.5, outcomes_R)
        np.testing.assert_array_equal(advantage_R, 0.0)


def test_rcc_leaves_tied_rewards_alone() -> None:
    outcomes_R, offsets_B = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 4])
    rewards_R = 0.3 + 1e-12 * np.array([-1.0, 1.0, 0.0, -1.0])
    delta_R = np.array([5.0, -4.0, 3.0, 30.0])
    for form in ("first_order", "exact"):
        baseline_R = spread(rcc_baseline(rewards_R, delta_R, offsets_B, form).baseline_B, offsets_B)
        advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, "normalized", 0.5, outcomes_R)
        np.testing.assert_array_equal(advantage_R, 0.0)


def test_a_small_difference_that_is_no_rounding_weighs_in_full() -> None:
    rewards_R, offsets_B = np.array([0.501, 0.499]), np.array([0, 2])
    baseline_R = mean_baseline(rewards_R, offsets_B)
    advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, "normalized", 0.5)
    np.testing.assert_allclose(advantage_R, [1, -1], rtol=1e-12)
    for size in (2, 8, 1024):  # one right in many: exactly sqrt(n- / n+), nothing added to the std
        rewards_R = (np.arange(size) < 1) * 1.0
        advantage_R = group_advantages(
            rewards_R, np.array([0, size]), np.full(size, 1 / size), "normalized", 0.5
        )
        np.testing.assert_allclose(advantage_R[0], math.sqrt(size - 1), rtol=1e-12)


# ---- the contrastive identity (GRPO is contrastive: arXiv 2603.13134)


def contrastive_gap(right: int, wrong: int, seed: int, shift_right=0.0, shift_wrong=0.0) -> float:
    """|J of the real loss - sqrt(p (1 - p)) (mean rho of right - mean rho of wrong)|, the sides shifted."""
    rng, size = np.random.default_rng(seed), right + wrong
    rewards_R, offsets_B = (np.arange(size) < right) * 1.0, np.array([0, size])
    lengths_R = rng.integers(1, 6, size)
    log_ratio = [rng.normal(0, 0.4, n) for n in lengths_R]
    baseline_R = mean_baseline(rewards_R, offsets_B)
    advantage_R = group_advantages(rewards_R, offsets_B, baseline_R, "normalized", 0.5)
    rows = LossRows(
        old_logp=torch.zeros(lengths_R.sum(), dtype=torch.float64),
        advantage=torch.from_numpy(np.repeat(advantage_R, lengths_R)),
        weight=torch.from_numpy(np.repeat(token_weights(lengths_R, "sequence_mean", 0), lengths_R)),
        response=torch.from_numpy(np.repeat(np.arange(size), lengths_R)),
    )
    unclipped = LossConfig(objective="token", clip_low=1.0, clip_high=1e9, dual_clip=0.0)
    logp = torch.from_numpy(np.concatenate(log_ratio))
    objective = -policy_loss(logp, None, rows, unclipped).share.item()
    rho_R = np.array([np.exp(x).mean() for x in log_ratio])
    rho_R += np.where(rewards_R > 0.5, shift_right, shift_wrong)
    p = right / size
    contrast = rho_R[:right].mean() - rho_R[right:].mean()
    return abs(objective - math.sqrt(p * (1 - p)) * contrast)


SPLITS = {"right": st.integers(1, 8), "wrong": st.integers(1, 8), "seed": st.integers(0, 10**6)}


@settings(deadline=None)
@given(**SPLITS)
def test_the_unclipped_objective_is_a_contrast_of_right_and_wrong(right: int, wrong: int, seed: int) -> None:
    assert contrastive_gap(right, wrong, seed) < 1e-12


@settings(deadline=None)
@given(**SPLITS)
def test_the_identity_fails_when_either_side_is_perturbed(right: int, wrong: int, seed: int) -> None:
    assert contrastive_gap(right, wrong, seed, shift_right=1e-3) > 1e-4
    assert contrastive_gap(right, wrong, seed, shift_wrong=1e-3) > 1e-4


# ---- RCC


def test_both_forms_of_the_baseline_follow_their_formula() -> None:
    delta_R = 0.5 * RNG.standard_normal(33)
    first = rcc_baseline(REWARDS_R, delta_R, OFFSETS_B, "first_order")
    exact = rcc_baseline(REWARDS_R, delta_R, OFFSETS_B, "exact")
    for g, part in enumerate(slices(OFFSETS_B)):
        r, d = REWARDS_R[part].tolist(), delta_R[part].tolist()
        baselines = reference.first_order_baseline(r, d), reference.exact_baseline(r, d)
        assert (first.baseline_B[g], exact.baseline_B[g]) == pytest.approx(baselines, rel=1e-12, abs=1e-15)
        covariance = np.cov(r, d, bias=True)[0, 1]
        assert first.covariance_B[g] == pytest.approx(covariance, rel=1e-10, abs=1e-15)
        assert exact.covariance_B[g] == first.covariance_B[g]


def test_confidence_in_right_rollouts_raises_the_baseline() -> None:
    rewards_R, offsets_B = np.array([1.0, 0.0]), np.array([0, 2])
    for form in ("first_order", "exact"):
        assert rcc_baseline(rewards_R, np.array([0.1, -0.1]), offsets_B, form).baseline_B[0] > 0.5
        assert rcc_baseline(rewards_R, np.array([-0.1, 0.1]), offsets_B, form).baseline_B[0] < 0.5
        assert rcc_baseline(rewards_R, np.array([3.0, 3.0]), offsets_B, form).baseline_B[0] == 0.5


GROUP = st.lists(st.tuples(st.floats(-2, 2), st.floats(-1e6, 1e6)), min_size=1, max_size=16)


@settings(deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=4))
def test_the_exact_baseline_stays_within_the_rewards(groups: list) -> None:
    rewards_R, delta_R = np.array([pair for group in groups for pair in group]).T
    offsets_B = np.cumsum([0] + [len(group) for group in groups])
    baseline_B = rcc_baseline(rewards_R, delta_R, offsets_B, "exact").baseline_B
    for g, part in enumerate(slices(offsets_B)):
        assert rewards_R[part].min() <= baseline_B[g] <= rewards_R[part].max()


def test_rounding_does_not_carry_the_exact_baseline_out_of_the_rewards() -> None:
    for seed in range(50):
        delta_R = np.random.default_rng(seed).standard_normal(7)
        assert rcc_baseline(np.full(7, 0.1), delta_R, np.array([0, 7]), "exact").baseline_B[0] == 0.1


@pytest.mark.parametrize("seed", range(5))
def test_first_order_tends_to_exact_with_the_square_of_delta(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards_R, delta_R = rng.random(8), rng.standard_normal(8)
    scales = 2.0 ** -np.arange(4, 14)
    errors = [
        abs(
            rcc_baseline(rewards_R, scale * delta_R, np.array([0, 8]), "first_order").baseline_B[0]
            - rcc_baseline(rewards_R, scale * delta_R, np.array([0, 8]), "exact").baseline_B[0]
        )
        for scale in scales
    ]
    rates = np.diff(np.log(errors)) / np.diff(np.log(scales))
    assert rates[-1] == pytest.approx(2.0, abs=0.02)
    assert errors[-1] < 1e-6


def test_delta_is_the_mean_or_the_sum_over_each_response() -> None:
    old, ref = -RNG.random(6), -RNG.random(6)
    offsets_R = np.array([0, 1, 6])
    expected = [old[0] - ref[0], (old[1:] - ref[1:]).sum()]
    np.testing.assert_allclose(sequence_delta(old, ref, offsets_R, "sequence_sum"), expected)
    expected[1] /= 5
    np.testing.assert_allclose(sequence_delta(old, ref, offsets_R, "token_mean"), expected)


# ---- token weights


def test_token_weights_are_over_the_whole_step() -> None:
    lengths_R = np.array([1, 4, 5])
    np.testing.assert_allclose(token_weights(lengths_R, "sequence_mean", 7), [1 / 3, 1 / 12, 1 / 15])
    np.testing.assert_allclose(token_weights(lengths_R, "constant", 7), [1 / 21] * 3)
    np.testing.assert_allclose(token_weights(lengths_R, "token_mean", 7), [1 / 10] * 3)


# ---- KL in the reward


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_summed_over_the_response(estimator: str) -> None:
    old, ref, offsets_R = -RNG.random(6), -RNG.random(6), np.array([0, 2, 6])
    x = old - ref
    token = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}[estimator]
    expected = [1.0 - 0.1 * token[:2].sum(), 0.0 - 0.1 * token[2:].sum()]
    actual = kl_in_reward(np.array([1.0, 0.0]), old, ref, offsets_R, 0.1, estimator)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


# ---- refusals


@pytest.mark.parametrize("bad", [-np.inf, np.nan, np.inf])
def test_a_log_prob_that_is_not_finite_is_named_by_rollout_and_token(bad: float) -> None:
    logp, offsets_R = -np.ones(9), np.array([0, 3, 4, 9])
    broken = logp.copy()
    broken[6] = bad
    names = (
        "log-prob under the old policy",
        "log-prob under the reference policy",
        "entropy under the old policy",
    )
    for place, name in enumerate(names):
        arrays = [broken if i == place else logp for i in range(3)]
        log_probs = TokenLogProbs(arrays[0], arrays[1], logp, arrays[2])
        with pytest.raises(UserError, match=f"{name} of rollout 2, token 2 is {bad}"):
            log_probs.check(offsets_R)
    broken[4] = bad
    with pytest.raises(UserError, match=f"old policy of rollout 2, token 0 is {bad}"):
        TokenLogProbs(broken, None, logp, logp).check(offsets_R)


@pytest.mark.parametrize(
    ("offsets_B", "message"),
    [
        ([0, 2, 2, 4], "group_offsets_B: group 1 has length 0"),
        ([0, 3, 2, 4], "group_offsets_B: group 1 has length -1"),
        ([1, 2, 4], "must run from 0 to 4, but it runs from 1 to 4"),
        ([0, 2, 5], "must run from 0 to 4, but it runs from 0 to 5"),
        ([0.0, 4.0], "group_offsets_B must be one integer array"),
        ([[0, 4]], "group_offsets_B must be one integer array"),
    ],
)
def test_offsets_that_do_not_cut_the_rollouts_are_refused(offsets_B: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_offsets(np.array(offsets_B), 4, "group_offsets_B", "group")


def test_other_malformed_numbers_are_named() -> None:
    with pytest.raises(UserError, match="reward of rollout 1 is nan"):
        check_rewards(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="constant_length is 0"):
        token_weights(np.array([3, 1]), "constant", 0)


def test_an_empty_step_is_no_error() -> None:
    assert has_contrast(np.zeros(0), np.array([0]), 0.5).shape == (0,)
    assert token_weights(np.zeros(0, dtype=int), "token_mean", 5).shape == (0,)
