"""Statistics of a step against plain loops, and their agreement with what the loss really clips."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_bicc.algorithms.policy_loss import LossRows, policy_loss
from megatron_bicc.algorithms.presets import PRESETS, resolve
from megatron_bicc.algorithms.statistics import StepTokens, clip_masks, contrast_statistics, ratio_statistics
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError

OFFSETS_R = np.array([0, 1, 4, 6, 11, 12])
CORRECT_R = np.array([True, False, False, True, False])
ADVANTAGE_R = np.array([1.2, -0.8, -0.8, 0.4, -0.1])
SIDE_T = np.repeat(CORRECT_R, np.diff(OFFSETS_R))
LOSS = resolve(Config(algorithm="bicc")).loss


def make_tokens(**changes) -> StepTokens:
    rng = np.random.default_rng(1)
    old = -rng.random(12)
    new, ref, rollout = (old + 0.6 * rng.standard_normal(12) for _ in range(3))
    return replace(StepTokens(old, new, OFFSETS_R, ADVANTAGE_R, CORRECT_R, ref, rollout), **changes)


def test_ratios_by_side() -> None:
    tokens = make_tokens()
    statistics = ratio_statistics(tokens, LOSS)
    for side, mask_T in (("right", SIDE_T), ("wrong", ~SIDE_T)):
        pairs = zip(tokens.new_logp_T[mask_T], tokens.old_logp_T[mask_T], strict=True)
        ratios = [math.exp(n - o) for n, o in pairs]
        assert statistics[f"ratio/{side}/mean"] == pytest.approx(sum(ratios) / len(ratios))
        assert statistics[f"ratio/{side}/max"] == pytest.approx(max(ratios))
        for key, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            assert statistics[f"ratio/{side}/{key}"] == pytest.approx(np.quantile(ratios, q))


def test_clip_fractions_by_side() -> None:
    tokens = make_tokens()
    statistics = ratio_statistics(tokens, LOSS)
    advantage_T = np.repeat(ADVANTAGE_R, np.diff(OFFSETS_R))
    ratio_T = np.exp(tokens.new_logp_T - tokens.old_logp_T)
    for side, mask_T in (("right", SIDE_T), ("wrong", ~SIDE_T)):
        pairs = list(zip(ratio_T[mask_T], advantage_T[mask_T], strict=True))
        expected = {
            "low": sum(rho < 0.8 and a < 0 for rho, a in pairs),
            "high": sum(rho > 1.2 and a > 0 for rho, a in pairs),
            "dual": sum(rho > 3.0 and a < 0 for rho, a in pairs),
        }
        for edge, count in expected.items():
            assert statistics[f"clip/{side}/{edge}"] == pytest.approx(count / len(pairs))
    assert statistics["clip/right/high"] > 0 and statistics["clip/wrong/low"] > 0


def test_distances_of_the_policies() -> None:
    tokens = make_tokens()
    statistics = ratio_statistics(tokens, LOSS)
    old, new, ref, mu = tokens.old_logp_T, tokens.new_logp_T, tokens.ref_logp_T, tokens.rollout_logp_T
    for key, p, q in (("old_new", old, new), ("old_ref", old, ref), ("rollout_old", mu, old)):
        k3 = [math.exp(b - a) - 1 - (b - a) for a, b in zip(p, q, strict=True)]
        assert statistics[f"kl/{key}"] == pytest.approx(sum(k3) / 12)
    weights = np.exp(old - mu)
    assert statistics["kl/old_rollout"] == pytest.approx((weights * np.log(weights) - weights + 1).mean())
    assert statistics["tis/max"] == pytest.approx(np.exp(old - mu).max())
    assert statistics["tis/mean"] == pytest.approx(np.exp(old - mu).mean())
    delta = [(old - ref)[a:b].mean() for a, b in zip(OFFSETS_R[:-1], OFFSETS_R[1:], strict=True)]
    assert statistics["delta/right"] == pytest.approx((delta[0] + delta[3]) / 2)
    assert statistics["delta/wrong"] == pytest.approx((delta[1] + delta[2] + delta[4]) / 3)
    assert statistics["delta/gap"] == pytest.approx(statistics["delta/right"] - statistics["delta/wrong"])


def test_a_context_in_the_denominator_stays_out_of_reference_and_engine() -> None:
    tokens = make_tokens()
    conditioned = replace(tokens, old_logp_T=tokens.old_logp_T - 1.0, plain_logp_T=tokens.old_logp_T)
    plain, other = ratio_statistics(tokens, LOSS), ratio_statistics(conditioned, LOSS)
    moved = {key for key in plain if plain[key] != other[key]}
    assert moved and all(key.startswith(("ratio/", "clip/", "kl/old_new")) for key in moved)


def test_groups_without_contrast_count_in_the_distances_of_reference_and_engine_alone() -> None:
    tokens = make_tokens()
    contrast_R = np.array([True, True, False, True, False])
    kept_T = np.repeat(contrast_R, np.diff(OFFSETS_R))
    old, new = (np.where(kept_T, x, np.nan) for x in (tokens.old_logp_T, tokens.new_logp_T))
    found = ratio_statistics(
        replace(
            tokens, old_logp_T=old, new_logp_T=new, plain_logp_T=tokens.old_logp_T, contrast_R=contrast_R
        ),
        LOSS,
    )
    offsets_R = np.concatenate([[0], np.cumsum(np.diff(OFFSETS_R)[contrast_R])])
    parts = (x[kept_T] for x in (tokens.old_logp_T, tokens.new_logp_T))
    ref, rollout = tokens.ref_logp_T[kept_T], tokens.rollout_logp_T[kept_T]
    alone = StepTokens(*parts, offsets_R, ADVANTAGE_R[contrast_R], CORRECT_R[contrast_R], ref, rollout)
    of_contrast, of_all = ratio_statistics(alone, LOSS), ratio_statistics(tokens, LOSS)
    assert found.keys() == of_all.keys()
    for key, value in found.items():
        by_contrast = key.startswith(("ratio/", "clip/", "delta/", "kl/old_new"))
        assert value == pytest.approx((of_contrast if by_contrast else of_all)[key]), key
    nothing = ratio_statistics(replace(tokens, contrast_R=np.zeros(5, dtype=bool)), LOSS)
    assert {key.split("/")[0] for key in nothing} == {"kl", "tis"} and "kl/old_new" not in nothing


def test_what_is_not_there_is_left_out() -> None:
    one_side = replace(make_tokens(), correct_R=np.zeros(5, dtype=bool), ref_logp_T=None, rollout_logp_T=None)
    statistics = ratio_statistics(one_side, LOSS)
    assert not any("right" in key or key.startswith(("tis", "delta", "kl/old_ref")) for key in statistics)
    assert "ratio/wrong/mean" in statistics
    with_ref = ratio_statistics(make_tokens(correct_R=np.ones(5, dtype=bool)), LOSS)
    assert "delta/right" in with_ref and "delta/gap" not in with_ref
    empty = np.zeros(0)
    nothing = StepTokens(empty, empty, np.array([0]), empty, np.zeros(0, dtype=bool), empty, empty)
    assert ratio_statistics(nothing, LOSS) == {}
    assert all(math.isfinite(value) for value in (statistics | with_ref).values())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "cispo"])
def test_what_counts_as_clipped_has_no_gradient_and_nothing_else_has_none(preset: str) -> None:
    scale = {"gspo": 1.5e-3}.get(preset, 0.9)
    log_ratio_T = scale * np.random.default_rng(2).standard_normal(12)
    loss = replace(resolve(Config(algorithm=preset)).loss, dual_clip=1.0005 if preset == "gspo" else 1.3)
    masks = clip_masks(log_ratio_T, ADVANTAGE_R, OFFSETS_R, loss)
    lengths_R = np.diff(OFFSETS_R)
    logp = torch.from_numpy(log_ratio_T).requires_grad_()
    zeros, ones = torch.zeros(12, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    response = torch.from_numpy(np.repeat(np.arange(5), lengths_R))
    advantage_T = np.repeat(ADVANTAGE_R, lengths_R)
    policy_loss(logp, LossRows(zeros, torch.from_numpy(advantage_T), ones, response), loss).backward()
    soft_T = (advantage_T > 0) & (preset == "aspo")  # the soft dual clip keeps the gradient
    expected_T = masks["low"] | masks["high"] | (masks["dual"] & ~soft_T)
    np.testing.assert_array_equal(logp.grad.numpy() == 0, expected_T)
    assert masks["dual"].any()


def test_cispo_counts_the_weights_it_bounds() -> None:
    loss = replace(resolve(Config(algorithm="cispo")).loss, clip_low=0.2, clip_high=4.0, dual_clip=3.0)
    log_ratio_T = np.log([0.5, 0.9, 3.5, 6.0])
    masks = clip_masks(log_ratio_T, np.array([-1.0, 1.0]), np.array([0, 3, 4]), loss)
    np.testing.assert_array_equal(masks["low"], [1, 0, 0, 0])
    np.testing.assert_array_equal(masks["high"], [0, 0, 0, 1])
    np.testing.assert_array_equal(masks["dual"], [0, 0, 1, 0])


def test_aspo_counts_the_flipped_ratios_that_its_dual_clip_bounds() -> None:
    loss = resolve(Config(algorithm="aspo")).loss
    log_ratio_T = np.log([0.3, 0.4, 4.0, 4.0])
    masks = clip_masks(log_ratio_T, np.array([1.0, -1.0]), np.array([0, 3, 4]), loss)
    np.testing.assert_array_equal(masks["dual"], [1, 0, 0, 1])
    np.testing.assert_array_equal(masks["high"], [0, 0, 1, 0])


def test_how_groups_split() -> None:
    correct_R = np.array([1, 0, 0, 1, 1, 0, 0, 1, 1], dtype=bool)
    statistics = contrast_statistics(correct_R, np.array([0, 3, 5, 7, 9]))
    assert statistics == {
        "contrast/share": 0.25,
        "contrast/right_0_wrong_2": 0.25,
        "contrast/right_1_wrong_1": 0.0,
        "contrast/right_2_wrong_0": 0.5,
        "contrast/right_0_wrong_3": 0.0,
        "contrast/right_1_wrong_2": 0.25,
        "contrast/right_2_wrong_1": 0.0,
        "contrast/right_3_wrong_0": 0.0,
    }


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("old_logp_T", "old policy"),
        ("new_logp_T", "policy in training"),
        ("ref_logp_T", "reference policy"),
        ("rollout_logp_T", "rollout engine"),
    ],
)
def test_log_probs_that_are_not_finite_are_named(field: str, name: str) -> None:
    tokens = make_tokens()
    broken = getattr(tokens, field).copy()
    broken[7] = -np.inf
    with pytest.raises(UserError, match=f"{name} of rollout 3, token 1 is -inf"):
        ratio_statistics(replace(tokens, **{field: broken}), LOSS)


def test_fields_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="StepTokens.advantage_R has 3 entries for 5 rollouts"):
        make_tokens(advantage_R=np.zeros(3))
    with pytest.raises(ValueError, match="StepTokens.correct_R has dtype int64"):
        make_tokens(correct_R=np.zeros(5, dtype=np.int64))
