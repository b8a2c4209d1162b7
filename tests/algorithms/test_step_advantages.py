"""Tests which settings need the reference policy's log-probs, and what they are used for."""

from types import SimpleNamespace

import numpy as np

from megatron_bicc.algorithms.advantages import TokenLogProbs, advantages, needs_reference
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config

ROLLOUTS = SimpleNamespace(
    rewards_R=np.array([1, 0, 0], np.float32),
    offsets_R=np.array([0, 1, 2, 3]),
    group_offsets_B=np.array([0, 3]),
)
OLD_T, REF_T = np.array([-1.0, -2.0, -3.0], np.float32), np.array([-1.3, -1.9, -2.6], np.float32)


def configuration(algorithm: str, reference: bool = False) -> Config:
    config = Config(algorithm=algorithm)
    config.monitoring.reference = reference
    return resolve(config)


def test_the_reference_is_computed_where_it_is_needed_or_asked_for() -> None:
    assert not needs_reference(configuration("grpo"))
    assert needs_reference(configuration("grpo", reference=True))
    assert needs_reference(configuration("grpo+rcc"))


def test_a_reference_that_is_only_watched_moves_no_advantage() -> None:
    without, watched, corrected = (
        advantages(ROLLOUTS, TokenLogProbs(OLD_T, ref_T, OLD_T, OLD_T), configuration(algorithm))
        for algorithm, ref_T in (("grpo", None), ("grpo", REF_T), ("grpo+rcc", REF_T))
    )
    np.testing.assert_array_equal(watched.advantage_R, without.advantage_R)
    np.testing.assert_array_equal(watched.covariance_B, corrected.covariance_B)
    np.testing.assert_allclose(corrected.covariance_B, np.cov([1, 0, 0], OLD_T - REF_T, bias=True)[0, 1])
    assert (corrected.baseline_R > watched.baseline_R).all()
    assert without.covariance_B == 0
