"""Tests the softmax bandit, whose gradient and variance are known, and the table generated from it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("bandit_variance", ROOT / "tools" / "bandit_variance.py")
tool = importlib.util.module_from_spec(SPEC)
sys.modules["bandit_variance"] = tool
SPEC.loader.exec_module(tool)

ESTIMATORS = ("weighted", "on-policy")
CELLS = (slice(3, 8, 2), slice(4, 7, 2))
"""Ratios and shares in a row of the second table."""


def bandit(estimator: str, seed: int = 0, scale: float = 0.5) -> tool.Bandit:
    return tool.make_bandit(np.random.default_rng(seed), estimator, "learned", scale)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_and_variance_are_those_of_the_estimator(estimator: str) -> None:
    b = bandit(estimator)
    score_VV = np.eye(tool.ARMS) - b.policy_V
    theta_V, step = np.log(b.policy_V), 1e-6
    for arm in range(tool.ARMS):
        shift = step * np.eye(tool.ARMS)[arm]
        slope = (tool.softmax(theta_V + shift) - tool.softmax(theta_V - shift)) @ b.reward_V / (2 * step)
        assert b.gradient()[arm] == pytest.approx(slope, abs=1e-9)
    for baseline in (0.0, 0.7):
        draws_VV = (b.weight_V * (b.reward_V - baseline))[:, None] * score_VV
        mean_V = b.sampler_V @ draws_VV
        np.testing.assert_allclose(mean_V, b.gradient(), atol=1e-12)  # unbiased, whatever the constant
        assert b.variance(baseline) == pytest.approx(b.sampler_V @ ((draws_VV - mean_V) ** 2).sum(axis=1))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(5))
def test_no_constant_beats_the_optimal_baseline(estimator: str, seed: int) -> None:
    b = bandit(estimator, seed)
    least = b.variance(b.baseline("optimal"))
    assert all(least <= b.variance(value) + 1e-12 for value in np.linspace(-1, 2, 301))


@pytest.mark.parametrize("name", tool.BASELINES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_measured_variance_is_the_enumerated_one(estimator: str, name: str) -> None:
    b = bandit(estimator)
    variance, error, bias = tool.measure(b, name, False, 6 * tool.CHUNK, seed=3)
    assert error < 0.02 * variance
    assert variance == pytest.approx(b.variance(b.baseline(name)), abs=6 * error)
    assert bias < 0.05


def test_rcc_lowers_the_variance_of_the_estimator_it_is_derived_for() -> None:
    b = bandit("weighted")
    names = ("mean", "first_order", "exact")
    measured = {name: tool.measure(b, name, True, 2 * tool.CHUNK, seed=3)[0] for name in names}
    assert measured["exact"] < 0.7 * measured["mean"] and measured["first_order"] < 0.7 * measured["mean"]


def test_the_committed_tables_are_what_the_tool_makes() -> None:
    lines = (ROOT / "docs" / "bandit_variance.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    enumerated = [row for row in rows if row[1] in ("learned", "random")]
    made = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tool.enumerated_rows(300, 1)]
    assert [row[:3] for row in enumerated] == [row[:3] for row in made] and len(made) == 12
    for row, again in zip(enumerated, made, strict=True):
        ratios, shares = ([[float(cell.strip(" %")) for cell in r[i]] for r in (row, again)] for i in CELLS)
        assert ratios[0] == pytest.approx(ratios[1], abs=0.002)
        assert shares[0] == pytest.approx(shares[1], abs=1.0)
    measured = [row for row in rows if row[1] in tool.BASELINES]
    assert len(measured) == 10
    for estimator, name, baseline, variance, population, *_ in measured:
        b = tool.make_bandit(np.random.default_rng(1), estimator, "learned", 0.5)
        assert baseline == f"{b.baseline(name):.4f}" and variance == f"{b.variance(b.baseline(name)):.4f}"
        mean, error = map(float, population.split("±"))
        assert mean == pytest.approx(float(variance), abs=5 * error)
