"""Dynamic sampling on an engine that streams: prompts are submitted while others are generated.

Every process submits prompts to the engine and scores their groups. The shared counts (prompts submitted,
groups finished, groups with contrast) are in torch.distributed's store, which needs no collective. The
process that finishes a group submits the prompts that are missing by then, so none waits for a slow one.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from tqdm import tqdm

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.collect import GroupSampler, exchange
from megatron_bicc.rollout.types import Group, RolloutError, Stream

LOOK_S = 0.5
"""Seconds that a process waits for a group before it checks whether enough were found"""


def likely_prompts(wanted: int, finished: int, found: int) -> int:
    """Estimates how many more prompts `wanted` groups with contrast need.

    From the share of finished groups with contrast, with one success added: before any group has finished,
    all are assumed to have contrast, and the estimate is finite while none has.
    """
    return max(0, math.ceil((wanted - found) * (finished + 1) / (found + 1)))


@dataclass(frozen=True)
class Search:
    """One step's search for groups with contrast."""

    prompts: list[Prompt]
    """Prompts in the order of submission; all that the step may submit"""
    wanted: int
    """Groups with contrast"""
    at_once: int
    """Limit on unfinished groups, over all processes"""
    seed: tuple[int, ...]
    finish: bool
    """Once enough are found, wait for unfinished groups; False: abort them"""

    def unfinished(self, finished: int, found: int) -> int:
        """Returns the number of groups that should be in flight now."""
        return min(likely_prompts(self.wanted, finished, found), self.at_once)


@dataclass(frozen=True)
class Found:
    """The result of a search, the same on every process."""

    groups: list[Group]
    """All finished groups, in the order of their prompts"""
    submitted: int
    """Number of prompts submitted, from the first of the search"""


def search(plan: Search, sampler: GroupSampler, has_contrast: Callable[[Group], bool]) -> Found:
    """Submits prompts until enough groups have contrast or all prompts were submitted. Collective.

    The number of submitted prompts depends on timing; a group's seeds depend only on its prompt and index.
    Raises RolloutError or UserError on every process if the engine or the verifier of one does.
    """
    counts = SearchCounts(plan)
    with raised_on_all_ranks(RolloutError, UserError):
        try:
            with sampler.engine.stream(sampler.sampling) as stream:
                own = _own_groups(plan, counts, stream, sampler, has_contrast)
        except (RolloutError, UserError):
            # the other processes must leave their loops: raised_on_all_ranks waits for them
            counts.give_up()
            raise
    groups = exchange(own, plan.prompts)
    return Found([groups[place] for place in sorted(groups)], counts.submitted())


def _own_groups(
    plan: Search,
    counts: "SearchCounts",
    stream: Stream,
    sampler: GroupSampler,
    has_contrast: Callable[[Group], bool],
) -> dict[int, Group]:
    """Returns the groups that this process finished, by the index of their prompt."""

    def submit(places: range) -> None:
        for place in places:
            stream.submit(place, sampler.requests(plan.prompts[place], (*plan.seed, place)))

    groups: dict[int, Group] = {}
    with tqdm(total=plan.wanted, desc="groups with contrast", leave=False, disable=device.quiet()) as bar:
        submit(counts.first())
        while stream.outstanding() and not counts.may_stop():
            finished = stream.next(LOOK_S)
            if finished:
                place, samples = finished
                (groups[place],) = sampler.scored([plan.prompts[place]], samples)
                submit(counts.finished(has_contrast(groups[place])))
            bar.update(counts.found() - bar.n)
    return groups


class SearchCounts:
    """The counts of one search, shared by all processes in the store."""

    def __init__(self, plan: Search) -> None:
        """Counts the first prompts as submitted. Collective."""
        self._plan = plan
        self._begin = min(plan.unfinished(0, 0), len(plan.prompts))
        # a new prefix: the store still has the keys of earlier searches, and of the run before a restart
        prefix = gathered(secrets.token_hex(8))[0]
        self._store = dist.PrefixStore(f"megatron_bicc/search/{prefix}", device.store())
        self._store.compare_set("submitted", "", f"{self._begin} by all")

    def first(self) -> range:
        """Returns the indices of the prompts that this process submits first: an equal share of the start."""
        return range(dist.get_rank(), self._begin, dist.get_world_size())

    def finished(self, has_contrast: bool) -> range:
        """Counts a finished group. Returns the indices of the prompts that this process submits next."""
        # `found` first: between the two, another process would count this group as one without contrast
        found = self._store.add("found", int(has_contrast))
        finished = self._store.add("finished", 1)
        return self._claim(min(finished + self._plan.unfinished(finished, found), len(self._plan.prompts)))

    def found(self) -> int:
        """Returns the number of groups with contrast so far."""
        return self._store.add("found", 0)

    def submitted(self) -> int:
        """Returns the number of prompts submitted so far."""
        return int(self._store.get("submitted").split()[0])

    def may_stop(self) -> bool:
        """Returns whether this process may abort its unfinished groups."""
        enough = self.found() >= self._plan.wanted and not self._plan.finish
        return enough or self._store.add("given up", 0) > 0

    def give_up(self) -> None:
        """Ends the search on all processes, because this one failed."""
        self._store.add("given up", 1)

    def _claim(self, goal: int) -> range:
        """Claims the prompts up to index `goal` that no process has submitted, and returns their indices."""
        while True:
            now = self._store.get("submitted").decode()
            start = int(now.split()[0])
            # compare-and-set; the rank tells this claim from one of another process with the same goal
            claim = f"{goal} by {dist.get_rank()}"
            if start >= goal:
                return range(0)
            if self._store.compare_set("submitted", now, claim).decode() == claim:
                return range(start, goal)
