""" "The final answer of a response, in one of the styles that prompts ask for.

Rewards by the final answer: read from the response in a style, compared by mathematics.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_bicc.data.boxed import has_box, last_boxed
from megatron_bicc.rewards import verdict
from megatron_bicc.rewards.verdict import Reading
from megatron_bicc.rewards.worker import WORKER, OutOfTimeError

Style = Literal["auto", "boxed", "answer_line", "hash", "last_number"]

_ANSWER_LINE = re.compile(r"\banswer\b[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)", re.IGNORECASE)
_LAST_LINE = re.compile(r"[^\n]*\banswer\b[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)", re.IGNORECASE)
_HASH = re.compile(r"####[ \t]*([^\n#]+)")
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])-?\.\d+")


def final_answer(text: str, style: Style) -> str | None:
    """The final answer; None if the response has none in that style.

    Only what follows the last </think> is read, and nothing of a response that was cut off inside <think>:
    what a model considers on the way is no answer.
    """
    _, _, text = text.rpartition("</think>")
    return None if "<think>" in text else STYLES[style].read(text)


def asked_styles(prompt: str) -> list[Style]:
    """The styles whose marker a prompt shows."""
    return [name for name, style in STYLES.items() if style.marker and re.search(style.marker, prompt)]


def _answer_line(text: str) -> str | None:
    return _in_box(_last(_ANSWER_LINE, text))


def _hash(text: str) -> str | None:
    return _in_box(_last(_HASH, text))


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace("$", "") if numbers else None


def _auto(text: str) -> str | None:
    """A last line `Answer: X`, else the last box, else the last line `Answer: X`, else the last `#### X`.

    A box in the working does not outrank the answer that a response ends on, nor a heading an answer.
    """
    lines = text.rstrip().splitlines()
    if lines and (ending := _LAST_LINE.fullmatch(lines[-1])):
        return _in_box(ending[1].strip())
    if has_box(text):
        return last_boxed(text)
    return _answer_line(text) or _hash(text)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].strip() if found else None


def _in_box(answer: str | None) -> str | None:
    return last_boxed(answer) if answer and has_box(answer) else answer


@dataclass(frozen=True)
class StyleOfAnswer:
    """How answers of a style are written and read."""

    read: Callable[[str], str | None]
    response: Callable[[str], str]
    """A response that answers exactly that"""
    marker: str = ""
    """Pattern of what a prompt asks for; empty if it is nothing particular"""
    shown: str = ""
    """The same for people"""


STYLES: dict[Style, StyleOfAnswer] = {
    "auto": StyleOfAnswer(_auto, lambda truth: f"\\boxed{{{truth}}}"),
    "boxed": StyleOfAnswer(
        last_boxed, lambda truth: f"\\boxed{{{truth}}}", r"\\(?:boxed|fbox)", "\\boxed{X}"
    ),
    "answer_line": StyleOfAnswer(
        _answer_line, lambda truth: f"Answer: {truth}", r"(?i)\banswer\b[*_]*\s*:", "Answer: X"
    ),
    "hash": StyleOfAnswer(_hash, lambda truth: f"#### {truth}", r"####", "#### X"),
    "last_number": StyleOfAnswer(_last_number, lambda truth: truth),
}


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
