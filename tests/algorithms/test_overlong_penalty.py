"""Tests that the overlong penalty changes rewards, but not which responses are right.

Shape suffix: R rollouts.
"""

import numpy as np
import pytest

from megatron_bicc.algorithms.advantages import TokenLogProbs, advantages, overlong_penalty
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config, RewardConfig
from megatron_bicc.packing.types import RolloutBatch

LONGEST, CACHE = 20480, 4096


def paper(length: int) -> float:
    """DAPO, equation 13: L_max is the longest response, L_cache the punished end of it."""
    if length <= LONGEST - CACHE:
        return 0.0
    if length <= LONGEST:
        return ((LONGEST - CACHE) - length) / CACHE
    return -1.0


def test_is_the_papers() -> None:
    lengths_R = np.array([1, 16384, 16385, 18432, 20479, 20480])
    found_R = overlong_penalty(lengths_R, LONGEST, RewardConfig(overlong_penalty=1.0, overlong_buffer=0.2))
    assert found_R == pytest.approx([-paper(int(n)) for n in lengths_R])
    assert found_R[-1] == 1.0


def make_rollouts(rewards: list[float], lengths: list[int]) -> RolloutBatch:
    total = sum(lengths)
    return RolloutBatch(
        prompt_tokens=np.array([2], np.int32),
        prompt_offsets_B=np.array([0, 1]),
        tokens=np.full(total, 3, np.int32),
        offsets_R=np.concatenate([[0], np.cumsum(lengths)]),
        group_offsets_B=np.array([0, len(rewards)]),
        rewards_R=np.array(rewards, np.float32),
    )


def make_config(algorithm: str, longest: int) -> Config:
    config = Config(algorithm=algorithm)
    config.rollout.max_new_tokens = longest
    return resolve(config)


def advantages_of(config: Config, rewards: list[float], lengths: list[int]) -> np.ndarray:
    zeros_T = np.zeros(sum(lengths), np.float32)
    log_probs = TokenLogProbs(zeros_T, None, zeros_T, zeros_T)
    return advantages(make_rollouts(rewards, lengths), log_probs, config).advantage_R


def test_dapo_weighs_by_shaped_values() -> None:
    rewards, lengths = [1.0, 1.0, 0.0, 0.0], [5, 19, 5, 20]
    shaped = np.array([1.0, 1.0 - 0.75, 0.0, -1.0])
    found_R = advantages_of(make_config("dapo", longest=20), rewards, lengths)
    assert found_R == pytest.approx((shaped - shaped.mean()) / shaped.std())


def test_a_truncated_right_answer_keeps_its_side() -> None:
    """Its value falls to that of a short wrong one: the group keeps its contrast, nobody is preferred."""
    assert advantages_of(make_config("dapo", longest=20), [1.0, 0.0], [20, 3]) == pytest.approx([0.0, 0.0])


def test_other_presets_do_not_shape() -> None:
    found_R = advantages_of(make_config("grpo", longest=20), [1.0, 0.0], [20, 3])
    assert found_R == pytest.approx([1.0, -1.0])
