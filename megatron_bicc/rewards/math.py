"""Rewards by math-verify on the final answer."""

import logging
from functools import lru_cache
from typing import Any

import numpy as np
from math_verify import parse, verify

from megatron_bicc.rewards.extraction import last_boxed
from megatron_bicc.rewards.limit import OutOfTime, cpu_limit

MAX_ANSWER_CHARACTERS = 512
"""A longer final answer is no answer; math-verify's parser is superlinear in the length."""
TIMEOUT_S = 2.0
"""Processor time for parsing and comparing an answer."""

# It would warn that its own time limit, by the clock, is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(texts: list[str], truths: list[str]) -> np.ndarray:
    r"""float32 [N]: 1 where the last \boxed{} of a text is mathematically its truth, else 0.

    A response without an answer, with one that does not parse, or with one that takes longer than
    TIMEOUT_S of processor time to understand (9^9^9^9) scores 0. Call it from a main thread.
    """
    return np.array([_reward(t, truth) for t, truth in zip(texts, truths, strict=True)], dtype=np.float32)


def response(truth: str) -> str:
    """A response that answers exactly `truth`."""
    return f"\\boxed{{{truth}}}"


def _reward(text: str, truth: str) -> float:
    answer = last_boxed(text)
    if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
        return 0.0
    return float(_same(answer, truth.strip()))


@lru_cache(maxsize=65536)
def _same(answer: str, truth: str) -> bool:
    if answer == truth:
        return True
    try:
        with cpu_limit(TIMEOUT_S):
            return verify(_parsed(truth), _parsed(answer), timeout_seconds=None)
    except OutOfTime:
        return False


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
