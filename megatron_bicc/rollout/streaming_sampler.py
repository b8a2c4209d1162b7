"""Prompts until enough have contrast, on an engine that streams: asked for while others are answered.

Every process asks the engine for its own prompts and scores them. What all must know, how many were asked
for, are finished, have contrast, is counted in the store that the processes met at. Whoever finishes a group
asks for what is missing by then, so a process that waits for a long answer holds up none.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from tqdm import tqdm

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.rollout.collect import GroupSampler, exchange
from megatron_bicc.rollout.types import Group, RolloutError, Stream

LOOK_S = 0.5
"""How long a process waits for a group before it looks whether the others have found enough."""


def likely_prompts(wanted: int, finished: int, found: int) -> int:
    """Further prompts that it takes for `wanted` to have contrast, if `found` of `finished` ones have.

    By the share that had it so far; before any is finished all are taken to have it.
    """
    return max(0, math.ceil((wanted - found) * (finished + 1) / (found + 1)))


@dataclass(frozen=True)
class Search:
    """What a step looks for."""

    prompts: list[Prompt]
    """In the order in which they are asked for, as many as a step may ask for"""
    wanted: int
    """Groups with contrast"""
    at_once: int
    """Most groups that are unfinished at a time, over all processes"""
    seed: tuple[int, ...]
    finish: bool
    """Whether groups that are unfinished when enough are found are waited for; else they are aborted"""

    def unfinished(self, finished: int, found: int) -> int:
        """How many groups should be at work now."""
        return min(likely_prompts(self.wanted, finished, found), self.at_once)


@dataclass(frozen=True)
class Found:
    """What a search has come to, the same on every process."""

    groups: list[Group]
    """All that were finished, in the order of their prompts"""
    asked: int
    """How many prompts were asked for, the first ones"""


def search(plan: Search, sampler: GroupSampler, has_contrast: Callable[[Group], bool]) -> Found:
    """Asks for prompts until enough have contrast or all were asked for. Collective.

    Which prompts those are depends on how long the answers take, a group's seeds on its prompt and its place
    alone. Raises RolloutError on every process if the engine of one does.
    """
    board = Board(plan)
    outcome: dict[int, Group] | RolloutError
    try:
        with sampler.engine.stream(sampler.sampling) as stream:
            outcome = _own_groups(plan, board, stream, sampler, has_contrast)
    except RolloutError as error:
        board.give_up()
        outcome = error
    groups = {place: group for share in exchange(outcome) for place, group in share.items()}
    return Found([groups[place] for place in sorted(groups)], board.asked())


def _own_groups(
    plan: Search,
    board: "Board",
    stream: Stream,
    sampler: GroupSampler,
    has_contrast: Callable[[Group], bool],
) -> dict[int, Group]:
    """The groups that this process finished, by their prompts' places."""

    def ask(places: range) -> None:
        for place in places:
            stream.ask(place, sampler.requests(plan.prompts[place], (*plan.seed, place)))

    groups: dict[int, Group] = {}
    with tqdm(total=plan.wanted, desc="groups with contrast", leave=False, disable=device.quiet()) as bar:
        ask(board.first())
        while stream.outstanding() and not board.may_leave():
            finished = stream.next(LOOK_S)
            if finished:
                place, samples = finished
                (groups[place],) = sampler.scored([plan.prompts[place]], samples)
                ask(board.finished(has_contrast(groups[place])))
            bar.update(board.found() - bar.n)
    return groups


class Board:
    """The counts of one search, in the store that the processes share."""

    def __init__(self, plan: Search) -> None:
        """Collective."""
        self._plan = plan
        self._begin = min(plan.unfinished(0, 0), len(plan.prompts))
        # no key of another search, nor of one before a restart
        prefix = gathered(secrets.token_hex(8))[0]
        self._store = dist.PrefixStore(f"megatron_bicc/search/{prefix}", device.store())
        self._store.compare_set("asked", "", f"{self._begin} by all")

    def first(self) -> range:
        """The places that this process asks for at the beginning: every process an equal share."""
        return range(dist.get_rank(), self._begin, dist.get_world_size())

    def finished(self, has_contrast: bool) -> range:
        """Counts a group that is finished; the places that this process is to ask for in its stead."""
        # in this order, so that no process takes a group with contrast for one without
        found = self._store.add("found", int(has_contrast))
        finished = self._store.add("finished", 1)
        return self._claim(min(finished + self._plan.unfinished(finished, found), len(self._plan.prompts)))

    def found(self) -> int:
        """Groups with contrast so far."""
        return self._store.add("found", 0)

    def asked(self) -> int:
        """Prompts asked for so far."""
        return int(self._store.get("asked").split()[0])

    def may_leave(self) -> bool:
        """Whether this process may give up what it waits for."""
        enough = self.found() >= self._plan.wanted and not self._plan.finish
        return enough or self._store.add("given up", 0) > 0

    def give_up(self) -> None:
        """Tells all that this process cannot go on."""
        self._store.add("given up", 1)

    def _claim(self, goal: int) -> range:
        """The places from those asked for to the goal; no other process gets one of them."""
        while True:
            now = self._store.get("asked").decode()
            start = int(now.split()[0])
            # with the rank, as another process may want to write the same number
            claim = f"{goal} by {dist.get_rank()}"
            if start >= goal:
                return range(0)
            if self._store.compare_set("asked", now, claim).decode() == claim:
                return range(start, goal)
