"""Verifiers by the name that reward.verifier gives."""

from collections.abc import Callable
from difflib import get_close_matches

import numpy as np

from megatron_bicc.rewards import math

Verifier = Callable[[list[str], list[str]], np.ndarray]
"""(responses, ground truths) -> float32 [N] rewards."""

VERIFIERS: dict[str, Verifier] = {"math": math.score}
RESPONSES: dict[str, Callable[[str], str]] = {"math": math.response}
"""What answers a ground truth with exactly that, by verifier"""


def get_verifier(name: str) -> Verifier:
    """The verifier of that name; raises ValueError, with the nearest name, if there is none."""
    if name not in VERIFIERS:
        nearest = get_close_matches(name, VERIFIERS, n=1, cutoff=0)[0]
        raise ValueError(f"reward.verifier: unknown '{name}'; did you mean '{nearest}'?")
    return VERIFIERS[name]


def check_threshold(name: str, threshold: float) -> None:
    """Raises ValueError if that verifier calls even an empty response right, which all would then be."""
    (reward,) = get_verifier(name)([""], [""])
    if reward > threshold:
        raise ValueError(
            f"reward.threshold is {threshold}; reward.verifier={name} gives {reward:g} to an empty response: "
            "every rollout would be right, and none could be learned from"
        )


def unscorable(name: str, truths: list[str], threshold: float) -> list[int]:
    """Indices of the ground truths for which even a response that answers exactly that is not right."""
    rewards = get_verifier(name)([RESPONSES[name](truth) for truth in truths], truths)
    return np.flatnonzero(~(rewards > threshold)).tolist()
