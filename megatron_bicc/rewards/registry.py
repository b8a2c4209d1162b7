"""The reward function of a run: the built-in ones by name, a user's by import path, and start-up checks.

`reward.function` names one, or a weighted sum of several. Rollouts and evaluations call it through
`get_scorer`.
"""

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron_bicc import device, plugins
from megatron_bicc.config import RewardConfig, weighted_terms
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards import math_reward
from megatron_bicc.rewards.built_ins import BUILT_INS, BuiltIn, Code
from megatron_bicc.rewards.functions import Function, Outcome, load
from megatron_bicc.rewards.math_reward import STYLES, Style, asked_styles
from megatron_bicc.rewards.scorer import Part, Scorer
from megatron_bicc.rewards.types import Completion, Failure
from megatron_bicc.rewards.worker import Limits, WorkerKilled, Workers, pack, unpack

_log = logging.getLogger(__name__)

INSPECTED = 64
"""Number of prompts, from the first, that the start-up message is about"""


def get_scorer(reward: RewardConfig) -> Scorer:
    """Returns what scores responses by the functions that reward.function names; close it at the end.

    Raises UserError if there is no such built-in (it names the nearest), nothing at an import path, or a
    function with other parameters than rewards.types describes.
    """
    parts = [
        _users(name, weight, reward)
        if plugins.is_import_path(name)
        else _built_in(name).part(name, weight, reward)
        for weight, name in weighted_terms(reward.function)
    ]
    return Scorer(parts, reward.on_error)


def _users(name: str, weight: float, reward: RewardConfig) -> Part:
    """Returns a user's function as a term of reward.function."""
    function = load(name)
    if reward.workers:
        limits = Limits(reward.cpu_s, reward.timeout_s, int(reward.memory_gb * 2**30))
        workers = Workers(name, limits, reward.workers)
        proxy = _InWorker(function.call, function.takes, function.is_async, workers)
        return Part(name, proxy, "in threads", weight, reward.workers, owned=[workers])
    if function.is_async:
        return Part(name, function, "in the loop", weight, reward.concurrency, reward.timeout_s)
    return Part(name, function, weight=weight)


@dataclass(frozen=True)
class _InWorker(Function):
    """A user's function that worker processes call."""

    workers: Workers

    def scores(self, arguments: tuple[Any, ...]) -> list[Outcome]:
        """Returns the outcome of every response of this call."""
        try:
            return unpack(self.workers.ask("score", pack(arguments)))
        except (WorkerKilled, RuntimeError) as error:
            return self.failed(Failure(str(error)), arguments)


def _built_in(name: str) -> BuiltIn:
    if name not in BUILT_INS:
        nearest = get_close_matches(name, BUILT_INS, n=1, cutoff=0)[0]
        raise UserError(
            f"reward.function: unknown {name!r}; did you mean {nearest!r}? To use your own function, write "
            "package.module:name or path/to/file.py:name"
        )
    return BUILT_INS[name]


def _built_ins(reward: RewardConfig) -> dict[str, BuiltIn]:
    """Returns the built-in functions that reward.function names."""
    names = [name for _, name in weighted_terms(reward.function)]
    return {name: _built_in(name) for name in names if not plugins.is_import_path(name)}


def answer_style(reward: RewardConfig) -> Style | None:
    """Returns the style in which final answers are read; None if no function of reward.function reads one."""
    return reward.answer if any(each.reads_answer for each in _built_ins(reward).values()) else None


def check_reward(reward: RewardConfig) -> None:
    """Raises UserError if reward.function cannot be used, or its built-in functions accept an empty response.

    In the second case every response would be correct. A user's function is not called: it may need prompts
    and columns.
    """
    names = [name for _, name in weighted_terms(reward.function)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"reward.function is {reward.function}; it names {twice[0]} twice: add up the weights"
        )
    if ("remote" in names) != bool(reward.url):
        missing = "it must name remote" if reward.url else "set reward.url to the server's address"
        raise UserError(f"reward.function is {reward.function} and reward.url is {reward.url!r}; {missing}")
    scorer = get_scorer(reward)
    if len(_built_ins(reward)) < len(names) or reward.url:
        return
    value = float(scorer.score([Completion([], "", "")]).rewards[0])
    scorer.close()
    if value > reward.threshold:
        raise UserError(
            f"reward.threshold is {reward.threshold}; reward.function={reward.function} gives {value:g} to "
            "an empty response: every rollout would be correct, and no group would have contrast"
        )


def check_truths(reward: RewardConfig, path: str, prompts: list[Prompt]) -> None:
    """Checks the rows of a file for the built-in functions; skips a user's function.

    Logs on the first process how they are read, and likely mistakes. Raises UserError, with file and row, for
    a truth that no response can match.
    """
    built_ins = _built_ins(reward)
    for name, each in built_ins.items():
        for prompt in prompts:
            if why := each.complaint(prompt, reward):
                raise UserError(
                    f"{path}, row {prompt.index + 1}: no response can be correct: "
                    f"reward.function={name}: {why}"
                )
    if "code" in built_ins and device.is_first():
        _log_limits(reward)
    if "math" not in built_ins:
        return
    truths = [prompt.ground_truth for prompt in prompts]
    for i in unscorable(reward, truths):
        raise UserError(
            f"{path}, row {prompts[i].index + 1}: no response can be correct: "
            f"reward.function=math does not even accept the ground truth itself, "
            f"{truths[i][:60]!r}; correct it or remove the row"
        )
    if not device.is_first():
        return
    if texts := compared_as_text(truths):
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


def _log_limits(reward: RewardConfig) -> None:
    code = Code(reward)
    if missing := code.workers.ask("limits"):
        _log.warning(
            "reward.function=code: this host does not permit to keep programs from: %s (docs/rewards.md)",
            ", ".join(missing),
        )
    code.close()


def unscorable(reward: RewardConfig, truths: list[str]) -> list[int]:
    """Returns the indices of truths for which math does not even accept the truth itself as an answer."""
    responses = [math_reward.response(truth, reward.answer) for truth in truths]
    rewards = math_reward.score(responses, truths, reward.answer)
    return [i for i, truth in enumerate(truths) if not rewards[i] or math_reward.reading(truth) is None]


def compared_as_text(truths: list[str]) -> list[int]:
    """Returns the indices of the ground truths that do not read as mathematics."""
    return [i for i, truth in enumerate(truths) if math_reward.reading(truth) == "text"]


def describe_styles(reward: RewardConfig, prompts: list[Prompt]) -> str:
    """Returns one line: number of truths readable per style, and of prompts that request each style."""
    first = prompts[:INSPECTED]
    truths = [prompt.ground_truth for prompt in first]
    counts = []
    for name in STYLES:
        if name != "auto":
            responses = [math_reward.response(truth, name) for truth in truths]
            counts.append(f"{name} {int(math_reward.score(responses, truths, name).sum())}")
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
