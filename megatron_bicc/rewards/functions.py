"""How reward functions are called, and what they may return (docs/rewards.md)."""

import asyncio
import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_bicc import plugins
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.rewards.types import Completion, Failure, Score

Takes = Literal["one", "one of a group", "all"]
Outcome = Score | Failure
CALLED: dict[tuple[str, ...], Takes] = {
    ("completion",): "one",
    ("completion", "group"): "one of a group",
    ("completions",): "all",
}
"""By the names of a function's parameters: what a call gets"""
RESERVED = ("mean", "pass_rate", "overlong_penalty", "failed")
"""Metrics under reward/ that a function cannot give"""
LARGEST = float(np.finfo(np.float32).max)
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Function:
    """A reward function and how it is called."""

    call: Callable[..., Any]
    takes: Takes
    is_async: bool

    @classmethod
    def of(cls, name: str, call: Callable[..., Any]) -> "Function":
        """Describes a function or an object that can be called. Raises UserError for other parameters."""
        try:
            parameters = inspect.signature(call).parameters.values()
        except ValueError as error:
            raise UserError(f"reward.function is {name}; its parameters are not known: {error}") from error
        names = tuple(each.name for each in parameters if each.default is each.empty)
        if names not in CALLED:
            raise UserError(
                f"reward.function is {name}; its parameters are ({', '.join(names)}), which must be "
                "(completion), (completion, group) or (completions): their names decide how it is called"
            )
        is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
        return cls(call, CALLED[names], is_async)

    def calls(self, completions: list[Completion]) -> list[tuple[Any, ...]]:
        """Returns the arguments of every call that scores the responses to a prompt."""
        if self.takes == "all":
            return [(completions,)]
        return [(each,) if self.takes == "one" else (each, completions) for each in completions]

    def scores(self, arguments: tuple[Any, ...]) -> list[Outcome]:
        """Calls the function and returns the outcome of every response of this call; never raises its errors.

        For a coroutine function there must be no event loop in this thread.
        """
        try:
            value = self.call(*arguments)
            value = asyncio.run(value) if self.is_async else value
        except (Exception, SystemExit) as error:  # a user's code may raise anything, and must not end the run
            return self.failed(failure(error), arguments)
        return self._read(value, arguments)

    async def awaited(self, arguments: tuple[Any, ...], timeout_s: float | None) -> list[Outcome]:
        """Does the same in the running event loop, for a coroutine function; None: without a time limit."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                value = await self.call(*arguments)
        except (Exception, SystemExit) as error:
            if isinstance(error, TimeoutError) and limit.expired():
                return self.failed(Failure(f"it took over reward.timeout_s = {timeout_s:g} s"), arguments)
            return self.failed(failure(error), arguments)
        return self._read(value, arguments)

    def failed(self, reason: Failure, arguments: tuple[Any, ...]) -> list[Outcome]:
        """Returns this outcome for every response of a call."""
        return [reason] * (len(arguments[0]) if self.takes == "all" else 1)

    def _read(self, value: Any, arguments: tuple[Any, ...]) -> list[Outcome]:
        """Returns the outcomes that a function's value gives."""
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            return self.failed(Failure("returned an awaitable; declare it `async def`"), arguments)
        if self.takes != "all":
            return [score_of(value)]
        if isinstance(value, str | dict) or not isinstance(value, Iterable):
            returned = f"returned {str(value)[:80]!r}, a {type(value).__name__}"
            return self.failed(Failure(f"{returned}; return a list with one score per response"), arguments)
        values, count = list(value), len(arguments[0])
        if len(values) != count:
            reason = f"returned {len(values)} scores for {count} responses; return one per response"
            return self.failed(Failure(reason), arguments)
        return [score_of(each) for each in values]


def load(path: str) -> Function:
    """Returns the function at an import path. Raises UserError, as plugins.load and Function.of do."""
    return Function.of(path, plugins.load("reward.function", path))


def failure(error: BaseException) -> Failure:
    """Returns what an exception says."""
    reason = f"the function raised {type(error).__name__}: {first_line(error)}"
    return Failure(reason, "".join(traceback.format_exception(error)), error)


def portable(outcomes: list[Outcome]) -> list[Outcome]:
    """Returns outcomes that can be pickled: without exceptions, of which the text stays."""
    return [replace(each, error=None) if isinstance(each, Failure) else each for each in outcomes]


def score_of(value: Any) -> Outcome:
    """Reads what a function returned for one response (types.Value)."""
    if not isinstance(value, dict):
        reward = _number(value)
        if isinstance(reward, str):
            return Failure(f"returned {reward}; return a number, or a dict with 'reward'")
        return (
            Score(reward)
            if math.isfinite(reward)
            else Failure(f"the reward is {reward}; return a finite one")
        )
    if "reward" not in value:
        return Failure(f"returned a dict with {', '.join(map(str, value)) or 'nothing'}; it needs 'reward'")
    feedback = value.get("feedback") or ""
    if not isinstance(feedback, str):
        return Failure(f"returned feedback of type {type(feedback).__name__}; return a text")
    numbers: dict[str, float] = {}
    for name, each in value.items():
        if name == "feedback":
            continue
        number = _number(each)
        if isinstance(number, str):
            return Failure(f"returned {number} as {name!r}; return a number")
        if not math.isfinite(number):
            return Failure(f"the {name!s} is {number}; return a finite one")
        if not _NAME.fullmatch(str(name)) or name in RESERVED:
            return Failure(f"returned a metric {str(name)!r}; choose another name")
        numbers[name] = number
    return Score(numbers.pop("reward"), numbers, feedback)


def _number(value: Any) -> float | str:
    """Returns the number, infinite if it is too large for float32; else the value in words."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
        return math.copysign(math.inf, number) if abs(number) > LARGEST else number
    except (TypeError, ValueError):
        return f"{str(value)[:80]!r}, a {type(value).__name__}"
