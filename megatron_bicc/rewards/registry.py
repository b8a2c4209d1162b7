"""Reward functions: the built-in ones by name, a user's by import path, and their start-up checks.

`reward.verifier` names one. Rollouts and evaluations call it through `get_verifier`.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np

from megatron_bicc import device, plugins
from megatron_bicc.config import RewardConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.data.rows import Message
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.rewards import math_reward
from megatron_bicc.rewards.math_reward import STYLES, Style, asked_styles
from megatron_bicc.rewards.verdict import Reading

_log = logging.getLogger(__name__)

INSPECTED = 64
"""Number of prompts, from the first, that the start-up message is about"""


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

    @property
    def prompt(self) -> str:
        """Contents of the messages, joined by newlines."""
        return "\n".join(message["content"] for message in self.messages)


class RewardFunction(Protocol):
    """A function that scores responses: reward.verifier.

    It is named as pkg.module:name or path/to/file.py:name. It is called once per prompt with all responses to
    it (rollout.group_size, or the samples of an evaluation), in the main thread of the rank that generated
    them, and returns one finite number per response, in order. A response is correct if its number exceeds
    reward.threshold. A coroutine function is awaited. It must not modify the completions: they share messages
    and columns with the prompt.

    The run ends with an error that names verifier and prompt if the function raises, or returns the wrong
    number of values, or one that is not finite. The same responses must get the same rewards, so that a
    resumed run can repeat a step.
    """

    def __call__(self, completions: list[Completion], /) -> Sequence[float] | Awaitable[Sequence[float]]:
        """Returns one reward per completion."""


Verifier = Callable[[list[Completion]], np.ndarray]
"""Scores the R responses to one prompt; returns float32 [R]. Raises UserError naming the prompt."""


@dataclass(frozen=True)
class BuiltIn:
    """A verifier of this package. Unlike a user's function it can be checked against the data at start-up."""

    score: Callable[[list[str], list[str], Style], np.ndarray]
    """(responses, ground truths, style in which answers are marked) -> float32 rewards"""
    response: Callable[[str, Style], str]
    """(ground truth, style) -> a response that gives exactly that answer"""
    reading: Callable[[str], Reading | None]
    """Ground truth -> the form it is compared in; None if no answer can equal it"""


BUILT_INS = {
    "math": BuiltIn(math_reward.score, math_reward.response, math_reward.reading),
}


def get_verifier(reward: RewardConfig) -> Verifier:
    """Returns the function that reward.verifier names.

    Raises UserError if there is no such built-in (it names the nearest) or nothing at the import path.
    """
    if plugins.is_import_path(reward.verifier):
        return _CheckedFunction(reward.verifier, plugins.load("reward.verifier", reward.verifier))
    built_in = _built_in(reward.verifier)

    def score(completions: list[Completion]) -> np.ndarray:
        truths = [completion.ground_truth for completion in completions]
        return built_in.score([completion.response for completion in completions], truths, reward.answer)

    return score


def _built_in(name: str) -> BuiltIn:
    if name not in BUILT_INS:
        nearest = get_close_matches(name, BUILT_INS, n=1, cutoff=0)[0]
        raise UserError(
            f"reward.verifier: unknown {name!r}; did you mean {nearest!r}? To use your own function, write "
            "package.module:name or path/to/file.py:name"
        )
    return BUILT_INS[name]


class _CheckedFunction:
    """A user's reward function, with every result checked."""

    def __init__(self, path: str, function: RewardFunction) -> None:
        self._path, self._function = path, function

    def __call__(self, completions: list[Completion]) -> np.ndarray:
        """Returns float32 [R]. Raises UserError; an exception of the function is logged and is its cause."""
        where = f"reward.verifier={self._path}, responses to the prompt of row {completions[0].row}"
        try:
            found = self._function(completions)
            if inspect.isawaitable(found):
                found = asyncio.run(_awaited(found))
        except (
            Exception,
            SystemExit,
        ) as error:  # of the user's code, which must not end the run
            # the traceback goes to the log of this rank: the other ranks and the command see one line
            _log.exception("%s: the function raised", where)
            raise UserError(
                f"{where}: the function raised {type(error).__name__}: {first_line(error)}"
            ) from error
        return self._checked(found, len(completions), where)

    def _checked(self, found: Any, count: int, where: str) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused below
                rewards = np.array([float(reward) for reward in found]).astype(np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: returned {str(found)[:80]!r}, a {type(found).__name__}; return a list with one "
                "number per response"
            ) from error
        if len(rewards) != count:
            raise UserError(
                f"{where}: returned {len(rewards)} rewards for {count} responses; return one per response"
            )
        if not np.isfinite(rewards).all():
            place = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise UserError(f"{where}: the reward of response {place} is {rewards[place]}; it must be finite")
        return rewards


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def answer_style(reward: RewardConfig) -> Style | None:
    """Returns the style in which final answers are read; None for a user's function."""
    return None if plugins.is_import_path(reward.verifier) else reward.answer


def check_reward(reward: RewardConfig) -> None:
    """Raises UserError if reward.verifier cannot be found, or a built-in one accepts an empty response.

    In the second case every response would be correct. A user's function is not called: it may need prompts
    and columns.
    """
    if plugins.is_import_path(reward.verifier):
        plugins.load("reward.verifier", reward.verifier)
        return
    (value,) = _built_in(reward.verifier).score([""], [""], reward.answer)
    if value > reward.threshold:
        raise UserError(
            f"reward.threshold is {reward.threshold}; reward.verifier={reward.verifier} gives {value:g} to "
            "an empty response: every rollout would be correct, and no group would have contrast"
        )


def check_truths(reward: RewardConfig, path: str, prompts: list[Prompt]) -> None:
    """Checks the ground truths of a file's prompts against a built-in verifier; skips a user's function.

    Logs on the first process how they are read, and likely mistakes. Raises UserError, with file and row, for
    a truth that no response can match.
    """
    if plugins.is_import_path(reward.verifier):
        return
    truths = [prompt.ground_truth for prompt in prompts]
    for i in unscorable(reward, truths):
        raise UserError(
            f"{path}, row {prompts[i].index + 1}: no response can be correct: "
            f"reward.verifier={reward.verifier} does not even accept the ground truth itself, "
            f"{truths[i][:60]!r}; correct it or remove the row"
        )
    if not device.is_first():
        return
    if texts := compared_as_text(reward, truths):
        _log.warning(
            "%s: %d of %d ground truths are compared as text, such as %.60r in row %d",
            path,
            len(texts),
            len(prompts),
            truths[texts[0]],
            prompts[texts[0]].index + 1,
        )
    _log.info("%s: %s", path, describe_styles(reward, prompts))
    if mismatch := style_mismatch(reward.answer, prompts):
        _log.warning("%s: %s", path, mismatch)


def unscorable(reward: RewardConfig, truths: list[str]) -> list[int]:
    """Returns the indices of truths for which not even the truth itself is a correct answer."""
    verifier = _built_in(reward.verifier)
    responses = [verifier.response(truth, reward.answer) for truth in truths]
    rewards = verifier.score(responses, truths, reward.answer)
    return [
        i
        for i, truth in enumerate(truths)
        if not rewards[i] > reward.threshold or verifier.reading(truth) is None
    ]


def compared_as_text(reward: RewardConfig, truths: list[str]) -> list[int]:
    """Returns the indices of the ground truths that do not read as mathematics."""
    verifier = _built_in(reward.verifier)
    return [i for i, truth in enumerate(truths) if verifier.reading(truth) == "text"]


def describe_styles(reward: RewardConfig, prompts: list[Prompt]) -> str:
    """Returns one line: number of truths readable per style, and of prompts that request each style."""
    verifier, first = _built_in(reward.verifier), prompts[:INSPECTED]
    truths = [prompt.ground_truth for prompt in first]
    counts = []
    for name in STYLES:
        if name != "auto":
            responses = [verifier.response(truth, name) for truth in truths]
            counts.append(f"{name} {int(verifier.score(responses, truths, name).sum())}")
    asked = [f"{STYLES[name].shown} ({count})" for name, count in _asked(prompts).items() if count]
    wanted = f"prompts ask for {', '.join(asked)}" if asked else "no prompt specifies an answer format"
    return (
        f"reward.answer={reward.answer}; in the first {len(first)} prompts, "
        f"ground truths readable per answer style: {', '.join(counts)}; {wanted}"
    )


def style_mismatch(style: Style, prompts: list[Prompt]) -> str | None:
    """Returns a warning if most prompts request a marker and none that of `style`; else None."""
    asked = _asked(prompts)
    most = max(asked, key=lambda name: asked[name])
    if style in ("auto", "last_number") or asked[style] or 2 * asked[most] < len(prompts[:INSPECTED]):
        return None
    return (
        f"reward.answer is {style}, but the prompts ask for {STYLES[most].shown}: a response that follows "
        f"them scores 0; set reward.answer={most}"
    )


def _asked(prompts: list[Prompt]) -> dict[Style, int]:
    """Returns, for each style with a marker, the number of the first prompts that contain it."""
    counts: dict[Style, int] = {name: 0 for name, style in STYLES.items() if style.marker}
    for prompt in prompts[:INSPECTED]:
        for name in asked_styles("\n".join(message["content"] for message in prompt.messages)):
            counts[name] += 1
    return counts
