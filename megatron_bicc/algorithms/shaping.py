"""Soft overlong punishment (DAPO, arXiv 2503.14476, section "Overlong Reward Shaping").

Shape suffix: R rollouts.
"""

import numpy as np

from megatron_bicc.config import RewardConfig


def overlong_penalty(lengths_R: np.ndarray, longest: int, reward: RewardConfig) -> np.ndarray:
    """float64 [R]: what is taken off the reward of a response of so many tokens.

    Nothing up to (1 - overlong_share) longest tokens, then growing linearly up to overlong_penalty at
    `longest`, where a response is truncated. The paper: longest 20480, a share of 0.2 (its cache of 4096
    tokens), a penalty of 1. `reward` must be resolved (presets.resolve).
    """
    cache = reward.overlong_share * longest
    return reward.overlong_penalty * np.clip((np.asarray(lengths_R) - (longest - cache)) / cache, 0.0, 1.0)
