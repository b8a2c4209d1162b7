"""Collects a step's groups. Dynamic sampling (DAPO, arXiv 2503.14476) continues until enough have contrast.

A group has contrast if it has right and wrong rollouts. An engine that streams gets more prompts while others
are generated (rollout/streaming_sampler.py). Any other engine works in rounds; a round's prompts depend only
on the rounds before it, so they are the same on every process and in a resumed run.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.registry import answer_style
from megatron_bicc.rollout.collect import GroupSampler, why_all_zero
from megatron_bicc.rollout.streaming_sampler import Search, likely_prompts, search
from megatron_bicc.rollout.types import Group, Sample, StreamingEngine


class NoContrastError(UserError):
    """Not enough groups with mixed outcomes. One line: how many, why, and a remedy."""


@dataclass(frozen=True)
class Queue:
    """What a step of an asynchronous run took, and what it left (rollout/async_collector.py)."""

    staleness: list[int]
    """Of each trained group: weight versions between its submission and the step"""
    in_flight: int
    """Number of groups in flight while the step trains"""
    dropped_stale: int
    """Number of groups dropped as past rollout.max_staleness, finished or in flight"""
    dropped_no_contrast: int
    """Number of groups dropped by dynamic sampling"""


@dataclass(frozen=True)
class Collected:
    """The rollouts of a step."""

    groups: list[Group]
    """The groups to train on: rollout.prompts_per_step of them"""
    sampled: list[Group]
    """All groups sampled in this step, trained on or not. Of an asynchronous run: those that the step trains
    or drops after they have finished"""
    carried: int
    """Number of `groups` that an earlier step sampled, or asked for"""
    leftover: int
    """Number of groups with contrast that were not needed: kept for the next step or dropped"""
    aborted: int
    """Number of groups aborted before they finished; of an asynchronous run: because it ends"""
    queue: Queue | None = None
    """Of an asynchronous run"""


class Collector:
    """Draws prompts and collects their groups. State: position in the data, and the groups left over."""

    def __init__(self, config: Config, prompts: list[Prompt], sampler: PromptSampler) -> None:
        """`config` is resolved (algorithms.presets.resolve)."""
        self.config, self.prompts, self.sampler = config, prompts, sampler
        self.leftover: list[Group] = []

    def step(self, step: int, sampler: GroupSampler) -> Collected:
        """Returns a step's groups. Raises NoContrastError at rollout.max_prompts_per_step. Collective."""
        wanted, carried = self.config.rollout.prompts_per_step, self.leftover
        if not self.config.rollout.dynamic_sampling:
            sampled = sampler.collect(self._draw(wanted), (self.config.seed, step))
            return Collected(sampled, sampled, carried=0, leftover=0, aborted=0)
        streams = isinstance(sampler.engine, StreamingEngine)
        find = self._while_others_run if streams else self._in_rounds
        sampled, aborted = find(step, wanted - len(carried), sampler)
        groups = carried + [group for group in sampled if self._has_contrast(group)]
        if len(groups) < wanted:
            raise NoContrastError(self._too_few(len(groups) - len(carried), wanted - len(carried), sampled))
        groups, over = groups[:wanted], groups[wanted:]
        self.leftover = over if self.config.rollout.leftover == "keep" else []
        return Collected(groups, sampled, len(carried), len(over), aborted)

    def _in_rounds(self, step: int, wanted: int, sampler: GroupSampler) -> tuple[list[Group], int]:
        """Collects rounds until `wanted` groups have contrast. Returns (groups, 0 aborted)."""
        rollout, sampled, found, number = self.config.rollout, [], 0, 0
        # a round of at most a step's prompts leaves over less than a step
        while count := min(
            likely_prompts(wanted, len(sampled), found),
            rollout.prompts_per_step,
            rollout.max_prompts_per_step - len(sampled),
        ):
            # seeded by the round, too: a prompt drawn twice in a step gets new seeds
            sampled += sampler.collect(self._draw(count), (self.config.seed, step, number))
            found = sum(self._has_contrast(group) for group in sampled)
            number += 1
        return sampled, 0

    def _while_others_run(self, step: int, wanted: int, sampler: GroupSampler) -> tuple[list[Group], int]:
        """Does the same with a streaming engine. Returns (groups, number of groups aborted)."""
        rollout = self.config.rollout
        plan = Search(
            prompts=[self.prompts[i] for i in self.sampler.peek(rollout.max_prompts_per_step)],
            wanted=wanted,
            at_once=rollout.prompts_per_step,
            seed=(self.config.seed, step),
            finish=rollout.leftover == "keep",
        )
        found = search(plan, sampler, self._has_contrast)
        self.sampler.draw(found.submitted)
        return found.groups, found.submitted - len(found.groups)

    def _too_few(self, found: int, wanted: int, sampled: list[Group]) -> str:
        right = sum(int(self._correct(group).all()) for group in sampled)
        wrong = len(sampled) - found - right
        kind, remedy = ("hard", "easier") if wrong >= right else ("easy", "harder")
        cause = why_all_zero(sampled, answer_style(self.config.reward)) or (
            f"too {kind} for this policy; train on {remedy} prompts, raise rollout.group_size or "
            "rollout.max_prompts_per_step, or set rollout.dynamic_sampling=false"
        )
        return (
            f"rollout.max_prompts_per_step is {self.config.rollout.max_prompts_per_step}; of these "
            f"prompts {found} have right and wrong rollouts, {wanted} are needed; {wrong} are all wrong and "
            f"{right} all right: {cause}"
        )

    def _draw(self, count: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.sampler.draw(count)]

    def _correct(self, group: Group) -> np.ndarray:
        return group.rewards > self.config.reward.threshold

    def _has_contrast(self, group: Group) -> bool:
        return 0 < self._correct(group).sum() < len(group.rewards)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON values."""
        rows = {prompt.index: i for i, prompt in enumerate(self.prompts)}
        leftover = [group_to_json(group, rows[group.prompt.index]) for group in self.leftover]
        return self.sampler.state_dict() | {"leftover": leftover}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. Raises UserError if it is of other data, another seed or an asynchronous run."""
        self.sampler.load_state_dict(state)
        if "leftover" not in state:
            raise UserError(
                "rollout.max_staleness is 0; the checkpoint is of a run with more, which checkpoint.force "
                "cannot change: set it back, or start from an export"
            )
        self.leftover = [group_from_json(group, self.prompts) for group in state["leftover"]]

    def close(self) -> None:
        """Does nothing: no group is in flight between two steps."""


def group_to_json(group: Group, prompt: int) -> dict[str, Any]:
    """Returns a group as JSON values. prompt: index of its prompt in the list of all."""
    samples = [
        {
            "token_ids": _array_to_json(s.token_ids),
            "log_probs": _array_to_json(s.log_probs),
            "finish_reason": s.finish_reason,
            "weight_version": s.weight_version,
            "experts": _array_to_json(s.experts),
            "prompt_experts": _array_to_json(s.prompt_experts),
            "versions": _array_to_json(s.versions),
        }
        for s in group.samples
    ]
    return {"prompt": prompt, "samples": samples, "texts": group.texts, "rewards": group.rewards.tolist()}


def group_from_json(state: dict[str, Any], prompts: list[Prompt]) -> Group:
    """Returns the group of a `group_to_json`."""
    samples = [
        Sample(
            _array_from_json(s["token_ids"], np.int32),
            _array_from_json(s["log_probs"], np.float32),
            s["finish_reason"],
            s["weight_version"],
            _array_from_json(s.get("experts")),
            _array_from_json(s.get("prompt_experts")),
            _array_from_json(s.get("versions")),
        )
        for s in state["samples"]
    ]
    rewards = np.array(state["rewards"], np.float32)
    return Group(prompts[state["prompt"]], samples, state["texts"], rewards)


def _array_to_json(array: np.ndarray | None) -> dict[str, Any] | None:
    """Returns an array as type, shape and base64: numbers as text are longer, and slow to write."""
    if array is None:
        return None
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": array.shape, "data": data}


def _array_from_json(state: dict[str, Any] | list | None, listed: type = np.float32) -> np.ndarray | None:
    """Returns the array of an `_array_to_json`. listed: type of a list, which older checkpoints have."""
    if state is None:
        return None
    if isinstance(state, list):
        return np.array(state, listed)
    flat = np.frombuffer(base64.b64decode(state["data"]), state["dtype"])
    return flat.reshape(state["shape"]).copy()  # a view of bytes could not be written to
