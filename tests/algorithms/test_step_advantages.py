"""What the reference policy's log-probs are used for, and when they are asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_bicc.algorithms.advantages import TokenLogProbs, advantages, needs_reference
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError

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
    np.testing.assert_array_equal(watched.covariance_G, corrected.covariance_G)
    np.testing.assert_allclose(corrected.covariance_G, np.cov([1, 0, 0], OLD_T - REF_T, bias=True)[0, 1])
    assert (corrected.baseline_G > watched.baseline_G).all()
    assert without.covariance_G == 0


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("old_T", "log-prob under the old policy"),
        ("ref_T", "log-prob under the reference policy"),
        ("rollout_T", "log-prob of the rollout engine"),
        ("entropy_T", "entropy under the old policy"),
    ],
)
@pytest.mark.parametrize("algorithm", ["grpo", "grpo+rcc"])
def test_a_log_prob_of_minus_infinity_is_refused_by_name(field: str, name: str, algorithm: str) -> None:
    fields = {"old_T": OLD_T, "ref_T": REF_T, "rollout_T": OLD_T, "entropy_T": OLD_T}
    broken_T = fields[field].copy()
    broken_T[1] = -np.inf
    with pytest.raises(UserError, match=f"{name} of rollout 1, token 0 is -inf"):
        advantages(ROLLOUTS, TokenLogProbs(**fields | {field: broken_T}), configuration(algorithm))
