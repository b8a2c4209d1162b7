"""Tests the weights of loss.correction against plain loops over one response at a time.

Shape suffixes: R rollouts, T response tokens.
"""

import itertools
import math

import numpy as np
import pytest
from algorithms import reference
from algorithms.reference import Correction

from megatron_bicc.algorithms.corrections import CORRECTIONS, CorrectionWeights, correction_weights
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config, LossConfig

LENGTHS = 6 * (1, 5, 1, 3, 8, 1, 2)
OFFSETS_R = np.cumsum([0, *LENGTHS])
BOUNDS = (0.8, 1.3)
NAMES = list(CORRECTIONS)


def make_loss(name: str, **changes: float) -> LossConfig:
    return resolve(Config(loss=LossConfig(correction=name, **changes))).loss


def make_log_probs() -> tuple[np.ndarray, np.ndarray]:
    """Log-probs float32 [T] of the old policy and of the engine."""
    rng = np.random.default_rng(4)
    old_T = -rng.exponential(1.5, sum(LENGTHS))
    return old_T.astype(np.float32), (old_T + 0.5 * rng.standard_normal(len(old_T))).astype(np.float32)


def of_tokens(
    log_ratio: list[float], loss: LossConfig, lengths: list[int] | None = None
) -> CorrectionWeights:
    """Weights of these log-ratios; of responses of one token each if no lengths are given."""
    offsets_R = np.cumsum([0, *(lengths or [1] * len(log_ratio))])
    return correction_weights(np.array(log_ratio), np.zeros(len(log_ratio)), offsets_R, loss)


@pytest.mark.parametrize("veto", [0.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula_of_each_response(name: str, veto: float) -> None:
    old_T, engine_T = make_log_probs()
    loss = make_loss(name, correction_low=BOUNDS[0], correction_high=BOUNDS[1], correction_veto=veto)
    found = correction_weights(old_T, engine_T, OFFSETS_R, loss)
    expected, vetoed = [], []
    for start, end in itertools.pairwise(OFFSETS_R):
        old, engine = old_T[start:end].tolist(), engine_T[start:end].tolist()
        expected += reference.correction_weights(old, engine, Correction(name, *BOUNDS, veto=veto))
        lowest = min(math.exp(o - e) for o, e in zip(old, engine, strict=True))
        vetoed += [lowest < veto] * len(old)
    assert found.weight_T.dtype == np.float32
    np.testing.assert_allclose(found.weight_T, expected, rtol=1e-6)
    assert found.vetoed_T.tolist() == vetoed
    weight_T, free_T = found.weight_T, ~found.vetoed_T
    at_bound_T = np.isclose(weight_T, BOUNDS[0]) | np.isclose(weight_T, BOUNDS[1])
    truncates = name.endswith("tis")
    assert np.array_equal(found.truncated_T, at_bound_T & free_T & truncates)
    assert np.array_equal(found.masked_T, (weight_T == 0) & free_T & (not truncates))
    assert (found.truncated_T | found.masked_T)[free_T].any() and not weight_T[found.vetoed_T].any()
    assert found.vetoed_T.any() == (veto > 0) and (weight_T > 0).any()


def test_bounds_are_the_published_ones_unless_they_are_set() -> None:
    expected = {
        "token_tis": (0.0, 2.0),
        "sequence_tis": (0.0, 2.0),
        "token_mask": (0.5, 5.0),
        "sequence_mask": (0.0, 2.0),
        "geometric_mask": (0.999, 1.001),
    }
    for name, bounds in expected.items():
        loss = make_loss(name)
        assert (loss.correction_low, loss.correction_high, loss.correction_veto) == (*bounds, 0.0)
        loss = make_loss(name, correction_low=0.0, correction_high=3.0)
        assert (loss.correction_low, loss.correction_high) == (0.0, 3.0)
    loss = make_loss("none")
    assert loss.correction_low is loss.correction_high is None
    assert sorted(expected) == sorted(CORRECTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_a_ratio_at_a_bound_is_inside_and_one_beyond_it_is_not(name: str) -> None:
    loss = make_loss(name, correction_low=0.5, correction_high=2.0)
    low, high = math.log(0.5), math.log(2.0)
    found = of_tokens([low, high, low - 1e-12, high + 1e-12], loss)
    changed_T = found.truncated_T | found.masked_T
    assert changed_T.tolist() == [False, False, True, True]
    inside = [1.0, 1.0] if name == "geometric_mask" else [0.5, 2.0]
    assert found.weight_T.tolist() == inside + ([0.5, 2.0] if name.endswith("tis") else [0.0, 0.0])


@pytest.mark.parametrize("name", ["none", *NAMES])
def test_a_token_below_the_veto_masks_its_response_alone(name: str) -> None:
    veto = math.log(1e-4)
    loss = make_loss(name, correction_veto=1e-4)
    # the response of the last two would be inside any bounds
    found = of_tokens([0.0, veto, veto - 1e-12, -veto + 1e-12], loss, lengths=[1, 1, 2])
    assert found.vetoed_T.tolist() == [False, False, True, True]
    assert found.weight_T[[0, 2, 3]].tolist() == [1.0, 0.0, 0.0]
    assert not found.truncated_T[2:].any() and not found.masked_T[2:].any()


def test_without_a_correction_every_weight_is_one() -> None:
    old_T, engine_T = make_log_probs()
    found = correction_weights(old_T, engine_T, OFFSETS_R, make_loss("none"))
    assert (found.weight_T == 1).all()
    assert not (found.truncated_T | found.masked_T | found.vetoed_T).any()


def test_of_one_token_response_and_token_are_the_same() -> None:
    log_ratio = np.random.default_rng(0).normal(0, 1, 50).tolist()
    for kind in ("tis", "mask"):
        by_token, by_response = (
            of_tokens(log_ratio, make_loss(f"{level}_{kind}", correction_low=0.5, correction_high=2.0))
            for level in ("token", "sequence")
        )
        assert np.array_equal(by_token.weight_T, by_response.weight_T)
        assert 0 < (by_token.truncated_T | by_token.masked_T).sum() < 50


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_have_finite_weights(name: str) -> None:
    largest = float(np.finfo(np.float32).max)
    rows = [[1e4], [-1e4], [largest, largest], [-largest, -largest], [1e4, -1e4], [0.01] * 100_000]
    loss = make_loss(name, correction_high=1e6)
    with np.errstate(all="raise", under="ignore"):
        found = of_tokens(sum(rows, []), loss, lengths=[len(row) for row in rows])
    assert np.isfinite(found.weight_T).all() and found.weight_T.max() <= 1e6
    if name.startswith("sequence"):
        ends = np.cumsum([len(row) for row in rows]) - 1
        outside = 1e6 if name == "sequence_tis" else 0.0
        assert found.weight_T[ends].tolist() == [outside, 0.0, outside, 0.0, 1.0, outside]


@pytest.mark.parametrize("name", NAMES)
def test_a_response_has_the_same_weights_whatever_it_is_sampled_with(name: str) -> None:
    old_T, engine_T = make_log_probs()
    loss = make_loss(name, correction_low=BOUNDS[0], correction_high=BOUNDS[1], correction_veto=0.4)
    together = correction_weights(old_T, engine_T, OFFSETS_R, loss).weight_T
    for start, end in itertools.pairwise(OFFSETS_R):
        own = correction_weights(old_T[start:end], engine_T[start:end], np.array([0, end - start]), loss)
        assert np.array_equal(own.weight_T, together[start:end])


def expectations(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Exact expectations of a gradient's stand-in, under the engine with the weights and under the policy.

    Responses of three tokens out of three, with the rewards drawn at random. An older policy has sampled the
    first token, another one the others.
    """
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 0.5, (3, 3, 3, 3))  # of each policy, by position and last token
    old, first, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    responses = list(itertools.product(range(3), repeat=3))
    value = rng.normal(size=(len(responses), 3, 5))
    places = [[(t, (0, *y)[t], y[t]) for t in range(3)] for y in responses]
    old_logp = np.array([[old[place] for place in response] for response in places])
    mu_logp = np.array([[(other if p[0] else first)[p] for p in response] for response in places])
    offsets_R = 3 * np.arange(len(responses) + 1)
    bounds = {} if name == "none" else {"correction_low": 0.0, "correction_high": 1e6}
    loss = make_loss(name, **bounds)
    weight = correction_weights(old_logp.ravel(), mu_logp.ravel(), offsets_R, loss).weight_T.reshape(-1, 3)
    by_engine = np.einsum("r,rt,rtx->x", np.exp(mu_logp.sum(1)), weight, value)
    return by_engine, np.einsum("r,rtx->x", np.exp(old_logp.sum(1)), value)


def test_the_product_of_a_response_alone_leaves_no_bias() -> None:
    """Without bounds; also where several versions of the weights have sampled a response."""
    for name in ("sequence_tis", "sequence_mask"):
        np.testing.assert_allclose(*expectations(name), rtol=1e-6)
    for name in ("none", "token_tis", "token_mask", "geometric_mask"):
        by_engine, by_policy = expectations(name)
        assert np.abs(by_engine - by_policy).max() > 0.01, name
