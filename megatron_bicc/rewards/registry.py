"""Verifiers by the name that reward.verifier gives.

What prompts ask for and what is read: said at start-up, as a wrong pair makes every reward 0.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import numpy as np

from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards import math_reward
from megatron_bicc.rewards.math_reward import STYLES, Style, asked_styles
from megatron_bicc.rewards.verdict import Reading

Verifier = Callable[[list[str], list[str]], np.ndarray]
"""(responses, ground truths) -> float32 [N] rewards."""

VERIFIERS: dict[str, Callable[..., np.ndarray]] = {"math": math_reward.score}
"""(responses, ground truths, style=how answers are read) -> rewards"""
RESPONSES: dict[str, Callable[[str, Style], str]] = {"math": math_reward.response}
"""What answers a ground truth with exactly that in a style, by verifier"""
READINGS: dict[str, Callable[[str], Reading | None]] = {"math": math_reward.reading}
"""What a ground truth is compared as, None if nothing can be equal to it, by verifier"""


def get_verifier(name: str, style: Style = "auto") -> Verifier:
    """The verifier of that name, which reads answers in that style.

    Raises UserError, with the nearest name, if there is none.
    """
    if name not in VERIFIERS:
        nearest = get_close_matches(name, VERIFIERS, n=1, cutoff=0)[0]
        raise UserError(f"reward.verifier: unknown '{name}'; did you mean '{nearest}'?")
    return partial(VERIFIERS[name], style=style)


def check_threshold(name: str, threshold: float) -> None:
    """Raises UserError if that verifier calls even an empty response right, which all would then be."""
    (reward,) = get_verifier(name)([""], [""])
    if reward > threshold:
        raise UserError(
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


LOOKED_AT = 64
"""Prompts, from the first, that are looked at"""


def describe_styles(verifier: str, style: Style, prompts: list[Prompt]) -> str:
    """How many truths each style reads, and how many prompts ask for which; one line."""
    first = prompts[:LOOKED_AT]
    truths = [prompt.ground_truth for prompt in first]
    reads = []
    for name in STYLES:
        if name != "auto":
            responses = [RESPONSES[verifier](truth, name) for truth in truths]
            reads.append(f"{name} {int(get_verifier(verifier, name)(responses, truths).sum())}")
    asked = [f"{STYLES[name].shown} ({count})" for name, count in _asked(prompts).items() if count]
    wanted = f"prompts ask for {', '.join(asked)}" if asked else "no prompt asks for a marked answer"
    return f"reward.answer={style}; of the first {len(first)} truths are read: {', '.join(reads)}; {wanted}"


def style_mismatch(style: Style, prompts: list[Prompt]) -> str | None:
    """One line where most prompts ask for a marker and none for the one that is read."""
    asked = _asked(prompts)
    most = max(asked, key=lambda name: asked[name])
    if style in ("auto", "last_number") or asked[style] or 2 * asked[most] < len(prompts[:LOOKED_AT]):
        return None
    return (
        f"reward.answer is {style}, but the prompts ask for {STYLES[most].shown}: an answer that "
        f"obeys them scores 0; set reward.answer={most}"
    )


def _asked(prompts: list[Prompt]) -> dict[Style, int]:
    """Of the first prompts, how many show the marker of each style that has one."""
    counts: dict[Style, int] = {name: 0 for name, style in STYLES.items() if style.marker}
    for prompt in prompts[:LOOKED_AT]:
        for name in asked_styles("\n".join(message["content"] for message in prompt.messages)):
            counts[name] += 1
    return counts
