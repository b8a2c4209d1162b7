"""Verifiers by the name that reward.verifier gives."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import numpy as np

from megatron_bicc.rewards import math
from megatron_bicc.rewards.extraction import Style
from megatron_bicc.rewards.verdict import Reading

Verifier = Callable[[list[str], list[str]], np.ndarray]
"""(responses, ground truths) -> float32 [N] rewards."""

VERIFIERS: dict[str, Callable[..., np.ndarray]] = {"math": math.score}
"""(responses, ground truths, style=how answers are read) -> rewards"""
RESPONSES: dict[str, Callable[[str, Style], str]] = {"math": math.response}
"""What answers a ground truth with exactly that in a style, by verifier"""
READINGS: dict[str, Callable[[str], Reading | None]] = {"math": math.reading}
"""What a ground truth is compared as, None if nothing can be equal to it, by verifier"""


def get_verifier(name: str, style: Style = "auto") -> Verifier:
    """The verifier of that name, which reads answers in that style.

    Raises ValueError, with the nearest name, if there is none.
    """
    if name not in VERIFIERS:
        nearest = get_close_matches(name, VERIFIERS, n=1, cutoff=0)[0]
        raise ValueError(f"reward.verifier: unknown '{name}'; did you mean '{nearest}'?")
    return partial(VERIFIERS[name], style=style)


def check_threshold(name: str, threshold: float) -> None:
    """Raises ValueError if that verifier calls even an empty response right, which all would then be."""
    (reward,) = get_verifier(name)([""], [""])
    if reward > threshold:
        raise ValueError(
            f"reward.threshold is {threshold}; reward.verifier={name} gives {reward:g} to an empty response: "
            "every rollout would be right, and none could be learned from"
        )


def unscorable(name: str, truths: list[str], threshold: float, style: Style = "auto") -> list[int]:
    """Indices of the ground truths for which even a response that answers exactly that is not right."""
    rewards = get_verifier(name, style)([RESPONSES[name](truth, style) for truth in truths], truths)
    return [
        i for i, truth in enumerate(truths) if not rewards[i] > threshold or READINGS[name](truth) is None
    ]


def compared_as_text(name: str, truths: list[str]) -> list[int]:
    """Indices of the ground truths that do not read as mathematics."""
    return [i for i, truth in enumerate(truths) if READINGS[name](truth) == "text"]
