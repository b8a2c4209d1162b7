"""Rewards by the final answer: read from the response in a style, compared by mathematics."""

from functools import lru_cache

import numpy as np

from megatron_bicc.rewards import verdict
from megatron_bicc.rewards.extraction import STYLES, Style, final_answer
from megatron_bicc.rewards.processes import WORKER, OutOfTimeError
from megatron_bicc.rewards.verdict import Reading

MAX_ANSWER_CHARACTERS = 512
"""A longer final answer is no answer; math-verify's parser is superlinear in the length."""
MAX_QUICK_CHARACTERS = 64
"""A longer answer is compared in the worker, whose time is limited, even where it is a number."""


def score(texts: list[str], truths: list[str], style: Style = "auto") -> np.ndarray:
    """float32 [N]: 1 where the final answer of a text, read in that style, is its truth, else 0.

    A response without an answer, with one that does not parse, or with one that takes longer than
    rewards.worker.CPU_SECONDS of processor time to understand (9^9^9^9) scores 0. From any thread.
    """
    return np.array(
        [_reward(t, truth, style) for t, truth in zip(texts, truths, strict=True)], dtype=np.float32
    )


def response(truth: str, style: Style = "auto") -> str:
    """A response that answers exactly `truth`."""
    return STYLES[style].response(truth)


@lru_cache(maxsize=65536)
def reading(truth: str) -> Reading | None:
    """What a truth is compared as; None if no answer can be equal to it."""
    if len(truth) > MAX_ANSWER_CHARACTERS:
        return None
    if len(truth) <= MAX_QUICK_CHARACTERS and verdict.is_number(truth):
        return "number"
    try:
        return WORKER.ask("reading", truth)
    except OutOfTimeError:
        return None


def _reward(text: str, truth: str, style: Style) -> float:
    answer = final_answer(text, style)
    if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
        return 0.0
    return float(_same(answer, truth.strip()))


@lru_cache(maxsize=65536)
def _same(answer: str, truth: str) -> bool:
    if max(len(answer), len(truth)) <= MAX_QUICK_CHARACTERS:
        known = verdict.quick(answer, truth)
        if known is not None:
            return known
    try:
        return WORKER.ask("same", answer, truth)
    except OutOfTimeError:
        return False
