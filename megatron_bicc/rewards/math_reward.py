"""Scores a response by its final answer: finds the answer by its marker, compares it as mathematics.

rewards.verdict compares the answer with the ground truth: plain numbers in this process, all else in the
worker process of rewards.worker.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_bicc.config import AnswerStyle
from megatron_bicc.data.rows import has_box, last_boxed
from megatron_bicc.rewards import verdict
from megatron_bicc.rewards.verdict import Reading
from megatron_bicc.rewards.worker import WORKER, OutOfTimeError

Style = AnswerStyle

_ANSWER_LINE = re.compile(r"\banswer\b[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)", re.IGNORECASE)
_LAST_LINE = re.compile(r"[^\n]*\banswer\b[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)", re.IGNORECASE)
_HASH = re.compile(r"####[ \t]*([^\n#]+)")
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])-?\.\d+")


def final_answer(text: str, style: Style) -> str | None:
    """Returns the final answer; None if the response has none in that style.

    Only text after the last </think> is read, and nothing if the response was cut off inside <think>: an
    intermediate result is not an answer.
    """
    _, _, text = text.rpartition("</think>")
    return None if "<think>" in text else STYLES[style].read(text)


def asked_styles(prompt: str) -> list[Style]:
    """Returns the styles whose marker occurs in a prompt."""
    return [name for name, style in STYLES.items() if style.marker and re.search(style.marker, prompt)]


def _answer_line(text: str) -> str | None:
    return _in_box(_last(_ANSWER_LINE, text))


def _hash(text: str) -> str | None:
    return _in_box(_last(_HASH, text))


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace("$", "") if numbers else None


def _auto(text: str) -> str | None:
    """Reads a last line `Answer: X`, else the last box, else the last `Answer: X`, else the last `#### X`.

    A box in the derivation does not outrank the answer at the end, nor does a Markdown heading outrank an
    answer.
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
    """How answers in a style are written and read."""

    read: Callable[[str], str | None]
    response: Callable[[str], str]
    """Ground truth -> a response that gives exactly that answer"""
    marker: str = ""
    """Pattern that occurs in prompts that request the style; empty if none do"""
    shown: str = ""
    """The marker as log messages show it"""


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
"""A longer final answer scores 0: the time of math-verify's parser is superlinear in the length."""
MAX_QUICK_CHARACTERS = 64
"""A longer answer is compared in the worker, whose time is limited, even if it is a number."""


def score(texts: list[str], truths: list[str], style: Style = "auto") -> np.ndarray:
    """Returns float32 [R]: 1 if the final answer of a text, read in that style, equals its truth, else 0.

    A response scores 0 if it has no answer, or one that does not parse or takes more than
    rewards.worker.CPU_SECONDS of processor time to evaluate (9^9^9^9). Thread-safe.
    """
    return np.array(
        [_reward(t, truth, style) for t, truth in zip(texts, truths, strict=True)], dtype=np.float32
    )


def response(truth: str, style: Style = "auto") -> str:
    """Returns a response that gives exactly the answer `truth`."""
    return STYLES[style].response(truth)


@lru_cache(maxsize=65536)
def reading(truth: str) -> Reading | None:
    """Returns the form in which a truth is compared; None if no answer can equal it."""
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
