"""What a reward function is given and returns (docs/rewards.md)."""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from megatron_bicc.data.rows import Message


@dataclass(frozen=True)
class Completion:
    """One response to score, with everything that the data file says about its prompt."""

    messages: list[Message]
    """Chat messages of the prompt: role and content"""
    response: str
    """Text of the response without special tokens; if the prompt ends with an assistant message, that text
    comes first"""
    ground_truth: str
    """The right final answer"""
    data_source: str = ""
    """The row's column data_source; empty if it has none"""
    extra: dict[str, Any] = field(default_factory=dict)
    """The row's other columns by name"""
    row: int = 0
    """Row of the prompt in its file, from 1"""
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [T]: the tokens as they were sampled, including the end token if there is one"""
    finish_reason: Literal["stop", "length"] = "stop"
    """stop: the last token is an end token; length: cut off at rollout.max_new_tokens"""

    @property
    def prompt(self) -> str:
        """Contents of the messages, joined by newlines."""
        return "\n".join(message["content"] for message in self.messages)


Value = float | dict[str, Any]
"""What a function returns for a response: its reward, or {"reward": number, "feedback": text, name: number,
...}, where feedback is optional and the other names are metrics"""


class RewardFunction(Protocol):
    """A function that scores one response: reward.function, as pkg.module:name or path/to/file.py:name.

    The names of its parameters decide how it is called: (completion), (completion, group) or (completions).
    It is a plain function, a coroutine function, or an object with such a method __call__. It must not modify
    what it is given, which other calls share. The same responses must get the same rewards, so that a resumed
    run can repeat a step.
    """

    def __call__(self, completion: Completion, group: list[Completion]) -> Value | Awaitable[Value]:
        """Returns the score of a response. group: all responses to the prompt, this one included."""


class BatchRewardFunction(Protocol):
    """A function that scores all responses to a prompt at once; else as RewardFunction."""

    def __call__(self, completions: list[Completion]) -> list[Value] | Awaitable[list[Value]]:
        """Returns the score of every response, in order."""


@dataclass(frozen=True)
class Score:
    """The score of one response."""

    reward: float
    metrics: dict[str, float] = field(default_factory=dict)
    """By name, without the prefix reward/"""
    feedback: str = ""


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored."""

    reason: str
    """One line"""
    traceback: str = ""
    """Of the function, if it raised"""
    error: BaseException | None = None
    """What it raised, if that was in this process"""


@dataclass(frozen=True)
class Scores:
    """The scores of the R responses to one prompt."""

    rewards: np.ndarray
    """float32 [R], finite; 0 where `failed`"""
    metrics: list[dict[str, float]]
    """Per response"""
    feedback: list[str]
    """Per response; empty if there is none"""
    failed: np.ndarray
    """bool [R]: the function failed (reward.on_error is drop or zero)"""
