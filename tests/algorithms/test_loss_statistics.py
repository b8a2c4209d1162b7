"""Tests a step's statistics against plain loops, and its clip fractions against what the loss clips."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.token_loss import clip_masks

from megatron_bicc.algorithms.corrections import CorrectionWeights
from megatron_bicc.algorithms.policy_loss import LossRows, policy_loss
from megatron_bicc.algorithms.presets import PRESETS, resolve
from megatron_bicc.algorithms.statistics import (
    RatioTokens,
    StepTokens,
    contrast_statistics,
    correction_statistics,
    ratio_statistics,
)
from megatron_bicc.config import Config

OFFSETS_R = np.array([0, 1, 4, 6, 11, 12])
CORRECT_R = np.array([True, False, False, True, False])
ADVANTAGE_R = np.array([1.2, -0.8, -0.8, 0.4, -0.1])
SIDE_T = np.repeat(CORRECT_R, np.diff(OFFSETS_R))
LOSS = resolve(Config(algorithm="bicc")).loss


def make_tokens(**changes) -> StepTokens:
    rng = np.random.default_rng(1)
    old = -rng.random(12)
    new, ref, rollout = (old + 0.6 * rng.standard_normal(12) for _ in range(3))
    contrast_R = np.ones(5, dtype=bool)
    tokens = StepTokens(ratio_of(old, new), OFFSETS_R, CORRECT_R, contrast_R, old, rollout, ref)
    return replace(tokens, **changes)


def ratio_of(old_T: np.ndarray, new_T: np.ndarray) -> RatioTokens:
    """With the masks of the bicc preset's objective."""
    masks = clip_masks(new_T - old_T, ADVANTAGE_R, OFFSETS_R, LOSS)
    return RatioTokens(old_T, new_T, *(masks[edge].astype(np.float32) for edge in ("low", "high", "dual")))


def test_ratios_by_side() -> None:
    tokens = make_tokens()
    statistics = ratio_statistics(tokens)
    for side, mask_T in (("right", SIDE_T), ("wrong", ~SIDE_T)):
        pairs = zip(tokens.ratio.new_logp_T[mask_T], tokens.ratio.old_logp_T[mask_T], strict=True)
        ratios = [math.exp(n - o) for n, o in pairs]
        assert statistics[f"ratio/{side}/mean"] == pytest.approx(sum(ratios) / len(ratios))
        assert statistics[f"ratio/{side}/max"] == pytest.approx(max(ratios))
        for key, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            assert statistics[f"ratio/{side}/{key}"] == pytest.approx(np.quantile(ratios, q))


def test_clip_fractions_by_side() -> None:
    tokens = make_tokens()
    statistics = ratio_statistics(tokens)
    advantage_T = np.repeat(ADVANTAGE_R, np.diff(OFFSETS_R))
    ratio_T = np.exp(tokens.ratio.new_logp_T - tokens.ratio.old_logp_T)
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
    statistics = ratio_statistics(tokens)
    old, new, ref, mu = (
        tokens.ratio.old_logp_T,
        tokens.ratio.new_logp_T,
        tokens.ref_logp_T,
        tokens.rollout_logp_T,
    )
    for key, p, q in (("old_new", old, new), ("old_ref", old, ref), ("rollout_old", mu, old)):
        k3 = [math.exp(b - a) - 1 - (b - a) for a, b in zip(p, q, strict=True)]
        assert statistics[f"kl/{key}"] == pytest.approx(sum(k3) / 12)
    weights = np.exp(old - mu)
    assert statistics["kl/old_rollout"] == pytest.approx((weights * np.log(weights) - weights + 1).mean())
    assert statistics["correction/ratio/max"] == pytest.approx(np.exp(old - mu).max())
    assert statistics["correction/ratio/mean"] == pytest.approx(np.exp(old - mu).mean())
    delta = [(old - ref)[a:b].mean() for a, b in zip(OFFSETS_R[:-1], OFFSETS_R[1:], strict=True)]
    assert statistics["delta/right"] == pytest.approx((delta[0] + delta[3]) / 2)
    assert statistics["delta/wrong"] == pytest.approx((delta[1] + delta[2] + delta[4]) / 3)
    assert statistics["delta/gap"] == pytest.approx(statistics["delta/right"] - statistics["delta/wrong"])


def test_a_context_in_the_denominator_stays_out_of_reference_and_engine() -> None:
    tokens = make_tokens()
    ratio = ratio_of(tokens.ratio.old_logp_T - 1.0, tokens.ratio.new_logp_T)
    conditioned = replace(tokens, ratio=ratio)
    plain, other = ratio_statistics(tokens), ratio_statistics(conditioned)
    moved = {key for key in plain if plain[key] != other[key]}
    assert moved and all(key.startswith(("ratio/", "clip/", "kl/old_new")) for key in moved)


def test_groups_without_contrast_count_in_the_distances_of_reference_and_engine_alone() -> None:
    tokens = make_tokens()
    contrast_R = np.array([True, True, False, True, False])
    kept_T = np.repeat(contrast_R, np.diff(OFFSETS_R))
    own = tokens.ratio
    fields = (own.old_logp_T, own.new_logp_T, own.low_T, own.high_T, own.dual_T)
    ratio = RatioTokens(*(np.where(kept_T, x, np.nan) for x in fields))
    found = ratio_statistics(replace(tokens, ratio=ratio, contrast_R=contrast_R))
    alone = StepTokens(
        ratio=RatioTokens(*(x[kept_T] for x in fields)),
        offsets_R=np.concatenate([[0], np.cumsum(np.diff(OFFSETS_R)[contrast_R])]),
        correct_R=CORRECT_R[contrast_R],
        contrast_R=np.ones(contrast_R.sum(), dtype=bool),
        plain_logp_T=tokens.plain_logp_T[kept_T],
        rollout_logp_T=tokens.rollout_logp_T[kept_T],
        ref_logp_T=tokens.ref_logp_T[kept_T],
    )
    of_contrast, of_all = ratio_statistics(alone), ratio_statistics(tokens)
    assert found.keys() == of_all.keys()
    for key, value in found.items():
        by_contrast = key.startswith(("ratio/", "clip/", "delta/", "kl/old_new"))
        assert value == pytest.approx((of_contrast if by_contrast else of_all)[key]), key
    nothing = ratio_statistics(replace(tokens, contrast_R=np.zeros(5, dtype=bool)))
    assert {key.split("/")[0] for key in nothing} == {"kl", "correction"} and "kl/old_new" not in nothing


def test_weights_of_a_correction_over_all_tokens_and_by_staleness() -> None:
    rng = np.random.default_rng(2)
    old_T, engine_T = -rng.random((2, 40))
    staleness_T = rng.choice([0, 1, 3], 40)
    weight_T, kind_T = rng.random(40).astype(np.float32), rng.integers(0, 4, 40)
    weight_T[kind_T > 1] = 0
    weights = CorrectionWeights(weight_T, kind_T == 1, kind_T == 2, kind_T == 3)
    expected = {}
    for name in ("", *(f"/staleness_{n}" for n in (0, 1, 3))):
        at = [t for t in range(40) if not name or staleness_T[t] == int(name[-1])]
        weight = [float(weight_T[t]) for t in at]
        expected |= {
            f"correction/mean{name}": sum(weight) / len(at),
            f"correction/max{name}": max(weight),
            f"correction/ess{name}": sum(weight) ** 2 / sum(w * w for w in weight) / len(at),
        }
        for number, kind in enumerate(("truncated", "masked", "vetoed"), 1):
            expected[f"correction/{kind}{name}"] = sum(kind_T[t] == number for t in at) / len(at)
        if name:
            expected[f"tokens{name}"] = len(at)
            x = [old_T[t] - engine_T[t] for t in at]
            expected[f"kl/rollout_old{name}"] = sum(math.exp(d) - 1 - d for d in x) / len(at)
    assert correction_statistics(old_T, engine_T, staleness_T, weights) == pytest.approx(expected)
    assert min(expected[f"correction/{kind}"] for kind in ("truncated", "masked", "vetoed")) > 0
    without = correction_statistics(old_T, engine_T, staleness_T, None)
    of_rollouts = {k for k in expected if k.startswith(("kl/", "tokens/"))}
    assert without == {key: pytest.approx(expected[key]) for key in of_rollouts}
    nothing = replace(weights, weight_T=np.zeros(40, np.float32))
    assert correction_statistics(old_T, engine_T, staleness_T, nothing)["correction/ess"] == 0


def test_what_is_not_there_is_left_out() -> None:
    one_side = replace(make_tokens(), correct_R=np.zeros(5, dtype=bool), ref_logp_T=None)
    statistics = ratio_statistics(one_side)
    assert not any("right" in key or key.startswith(("delta", "kl/old_ref")) for key in statistics)
    assert "ratio/wrong/mean" in statistics
    with_ref = ratio_statistics(make_tokens(correct_R=np.ones(5, dtype=bool)))
    assert "delta/right" in with_ref and "delta/gap" not in with_ref
    empty = np.zeros(0)
    none = np.zeros(0, dtype=bool)
    nothing = StepTokens(RatioTokens(*[empty] * 5), np.array([0]), none, none, empty, empty, empty)
    assert ratio_statistics(nothing) == {}
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
    rows = LossRows(torch.from_numpy(advantage_T), ones, response, old_logp=zeros)
    policy_loss(logp, None, rows, loss).share.backward()
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
