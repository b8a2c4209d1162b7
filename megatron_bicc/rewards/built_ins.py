"""The built-in reward functions: one row of BUILT_INS each (docs/rewards.md)."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bicc.config import RewardConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.rewards import math_reward
from megatron_bicc.rewards.functions import Function
from megatron_bicc.rewards.math_reward import Style, final_answer
from megatron_bicc.rewards.remote import Remote, RewardServer
from megatron_bicc.rewards.sandbox import Test
from megatron_bicc.rewards.scorer import Part, Runs
from megatron_bicc.rewards.types import Completion
from megatron_bicc.rewards.worker import CODE, MATH, Limits, Workers

CODE_GRACE_S = 10.0
"""Seconds that a worker has beside the wall time of the programs that it runs"""
_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_LETTER = re.compile(
    r"""[\s*_$\\({\[]*(?:(?:text|textbf|mathrm|mathbf)\s*\{)?[\s({\[]*(?:(?:option|choice)\s*)?
    ([A-Za-z])\s*(?:[)\].:}*_$,].*|\Z)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
r"""An answer that begins with the letter of a choice: B, (B), \text{(B)}, B) 12, option B."""


@dataclass(frozen=True)
class BuiltIn:
    """A reward function of this package. Unlike a user's it can be checked against the data at start-up."""

    make: Callable[[RewardConfig], Callable[..., Any]]
    """Returns the function; a row whose functions wait for others returns an object that can be closed"""
    complaint: Callable[[Prompt, RewardConfig], str | None] = lambda prompt, reward: None
    """Returns why no response to a prompt can be right; None if one can"""
    runs: Runs = "here"
    at_once: Callable[[RewardConfig], int] = lambda reward: 1
    """Most calls in progress, unless it runs here"""
    reads_answer: bool = False
    """It reads the final answer, in the style of reward.answer"""

    def part(self, name: str, weight: float, reward: RewardConfig) -> Part:
        """Returns the function as a term of reward.function."""
        made = self.make(reward)
        owned = [made] if hasattr(made, "close") or hasattr(made, "aclose") else []
        return Part(name, Function.of(name, made), self.runs, weight, self.at_once(reward), None, owned)


class Math:
    """math: 1 if the final answer equals the ground truth as mathematics, else 0."""

    def __init__(self, reward: RewardConfig) -> None:
        size = reward.workers
        self._own = Workers(MATH, Limits(math_reward.CPU_SECONDS), size) if size > 1 else None
        self._style = reward.answer

    def __call__(self, completions: list[Completion]) -> list[dict[str, float]]:
        """Returns rewards, and as metric too_slow whether an answer was too slow to compare."""
        workers = self._own or math_reward.WORKERS
        found = [
            math_reward.right(each.response, each.ground_truth, self._style, workers) for each in completions
        ]
        return [{"reward": float(each is True), "too_slow": float(each is None)} for each in found]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._own:
            self._own.close()


class Exact:
    """exact: 1 if the final answer is the ground truth, character by character, else 0."""

    def __init__(self, reward: RewardConfig) -> None:
        self._style: Style = reward.answer

    def __call__(self, completion: Completion) -> float:
        """Returns 1 or 0. White space around both is ignored."""
        answer = final_answer(completion.response, self._style)
        return float(bool(answer) and answer.strip() == completion.ground_truth.strip())


class MultipleChoice:
    """multiple_choice: 1 if the final answer names the right choice, else 0."""

    def __init__(self, reward: RewardConfig) -> None:
        self._style: Style = reward.answer

    def __call__(self, completion: Completion) -> float:
        """Returns 1 or 0."""
        choices = _choices(completion.extra)
        answer = _choice(final_answer(completion.response, self._style) or "", choices)
        return float(answer is not None and answer == _right_choice(completion.ground_truth, choices))


def _choices(columns: dict[str, Any]) -> dict[str, str]:
    """Returns the texts of the choices by letter: a row's column choices, a list or as ARC has it."""
    found = columns.get("choices")
    if isinstance(found, dict):
        labels, texts = found.get("label"), found.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            return {str(label).upper(): str(text) for label, text in zip(labels, texts, strict=False)}
    return {chr(ord("A") + i): str(text) for i, text in enumerate(found)} if isinstance(found, list) else {}


def _choice(answer: str, choices: dict[str, str]) -> str | None:
    """Returns the letter that an answer names, by itself or by the text of a choice."""
    by_text = {" ".join(text.split()).casefold(): letter for letter, text in choices.items()}
    text = " ".join(answer.split()).casefold()
    if text in by_text:
        return by_text[text]
    letter = _LETTER.fullmatch(answer)
    return letter[1].upper() if letter else None


def _right_choice(truth: str, choices: dict[str, str]) -> str | None:
    """Returns the letter of a ground truth: a letter, a choice's text, or its index from 0."""
    found = _choice(truth, choices)
    letters = list(choices)
    if found is None and truth.isdecimal() and int(truth) < len(letters):
        return letters[int(truth)]
    return found


def _no_choice(prompt: Prompt, reward: RewardConfig) -> str | None:
    choices = _choices(prompt.extra)
    found = _right_choice(prompt.ground_truth, choices)
    if found is None or choices and found not in choices:
        known = f"one of {', '.join(choices)}" if choices else "a letter"
        return f"the ground truth {prompt.ground_truth[:60]!r} is no choice; write {known}"
    return None


class Code:
    """code: 1 if the response's program passes all tests of its row, else 0."""

    def __init__(self, reward: RewardConfig) -> None:
        memory = int(reward.memory_gb * 2**30)
        self._limits = reward.cpu_s, reward.timeout_s, memory
        # what runs the programs needs little itself: their own processor time is not that of the worker
        limits = Limits(reward.timeout_s, reward.timeout_s + CODE_GRACE_S, memory)
        self.workers = Workers(CODE, limits, max(1, reward.workers))

    def __call__(self, completion: Completion) -> dict[str, Any]:
        """Returns the reward, the share of tests passed and out of time, and what the first failure said."""
        source = program(completion.response)
        if source is None:
            return {"reward": 0.0, "tests_passed": 0.0, "tests_timeout": 0.0, "feedback": "no program"}
        tests = unit_tests(completion.ground_truth, completion.extra)
        report = self.workers.ask("run", source, tests, *self._limits)
        return {
            "reward": float(report["passed"] == len(tests)),
            "tests_passed": report["passed"] / len(tests),
            "tests_timeout": report["timeouts"] / len(tests),
            "feedback": report["feedback"],
        }

    def close(self) -> None:
        """Ends the worker processes."""
        self.workers.close()


def program(response: str) -> str | None:
    """Returns the last fenced block of a response, after its last </think>; None if there is none."""
    _, _, text = response.rpartition("</think>")
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks and "<think>" not in text else None


def unit_tests(truth: str, columns: dict[str, Any]) -> list[Test]:
    """Returns the tests of a row: those of its column tests, else of its ground truth.

    They are Python code, a list of such, or {"inputs": [...], "outputs": [...]}: what a program reads on
    stdin and must print. A list or an object may be JSON text. Raises ValueError, one line, for anything
    else and for none.
    """
    found: Any = columns.get("tests", truth)
    if isinstance(found, str):
        try:
            decoded = json.loads(found)
        except ValueError:
            decoded = None
        found = decoded if isinstance(decoded, dict | list) else [found]
    if isinstance(found, dict):
        inputs, outputs = found.get("inputs"), found.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("its tests have no lists inputs and outputs of one length")
        found = [{"stdin": i, "stdout": o} for i, o in zip(inputs, outputs, strict=True)]
        if not all(isinstance(text, str) for test in found for text in test.values()):
            raise ValueError("its inputs and outputs must be texts")
        tests = found
    elif isinstance(found, list) and all(isinstance(each, str) for each in found):
        tests = [{"code": each} for each in found]
    else:
        raise ValueError(f"its tests are a {type(found).__name__}; write Python code or inputs and outputs")
    if not tests:
        raise ValueError("it has no tests")
    return tests


def _no_tests(prompt: Prompt, reward: RewardConfig) -> str | None:
    try:
        for test in unit_tests(prompt.ground_truth, prompt.extra):
            if "code" in test:
                compile(test["code"], "<test>", "exec")
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


class Format:
    """format: 1 if the whole response matches the regular expression reward.format, else 0."""

    def __init__(self, reward: RewardConfig) -> None:
        self._pattern = re.compile(reward.format, re.DOTALL)

    def __call__(self, completion: Completion) -> float:
        """Returns 1 or 0."""
        return float(self._pattern.fullmatch(completion.response) is not None)


class Length:
    """length: 1 for a response of no tokens, falling linearly to 0 at reward.target_tokens and beyond."""

    def __init__(self, reward: RewardConfig) -> None:
        self._target = reward.target_tokens

    def __call__(self, completion: Completion) -> float:
        """Returns a number within 0 and 1."""
        return max(0.0, 1.0 - len(completion.token_ids) / self._target)


def _remote(reward: RewardConfig) -> Remote:
    server = RewardServer(reward.url, reward.timeout_s, reward.retries, reward.concurrency)
    return Remote(server, reward.batch_size)


def _workers(reward: RewardConfig) -> int:
    return max(1, reward.workers)


def _unread(prompt: Prompt, reward: RewardConfig) -> str | None:
    truth = prompt.ground_truth
    if final_answer(math_reward.response(truth, reward.answer), reward.answer) == truth:
        return None
    return f"reward.answer={reward.answer} cannot read the ground truth {truth[:60]!r}; correct it"


BUILT_INS: dict[str, BuiltIn] = {
    "math": BuiltIn(Math, runs="in threads", at_once=_workers, reads_answer=True),
    "exact": BuiltIn(Exact, _unread, reads_answer=True),
    "multiple_choice": BuiltIn(MultipleChoice, _no_choice, reads_answer=True),
    "code": BuiltIn(Code, _no_tests, runs="in threads", at_once=_workers),
    "format": BuiltIn(Format),
    "length": BuiltIn(Length),
    "remote": BuiltIn(_remote, runs="in the loop", at_once=lambda reward: reward.concurrency),
}
"""By the name that reward.function takes; registry checks the ground truths of math itself"""
