"""Asynchronous rollouts: groups are generated while the policy trains (rollout.max_staleness above 0).

The weights after step s are version s, so step s trains under version s - 1. At step s a group is stale by
s - 1 minus the version that was current when its prompt was submitted. A step takes the oldest groups that
have finished, and drops what would be past rollout.max_staleness at the next one.

Every process asks its own engine for a share of the prompts. All processes have the same list of pending
prompts and learn from a gather which have finished; every decision follows from that list alone, so that all
decide alike.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.collect import GroupSampler, exchange
from megatron_bicc.rollout.sampling import (
    Collected,
    Collector,
    NoContrastError,
    Queue,
    group_from_json,
    group_to_json,
)
from megatron_bicc.rollout.streaming_sampler import likely_prompts
from megatron_bicc.rollout.types import Group, RolloutError, Stream

FIRST_POLL_S, LONGEST_POLL_S, GROWTH = 0.005, 1.0, 1.05
"""Longest waits between two gathers: the first of a step, and the longest; each is GROWTH times the one
before. A step waits at most 5 % longer than it must, and many processes gather once a second."""


@dataclass
class Pending:
    """A prompt that was drawn and neither trained nor dropped yet."""

    prompt: Prompt
    version: int
    """Of the weights when it was submitted"""
    process: int
    """Rank of the process whose engine was asked; -1: it is to be asked for again, after a resume"""
    usable: bool | None = None
    """Whether a step may train on it: without contrast dynamic sampling does not; None: it is in flight"""
    group: Group | None = None
    """On every process once finished groups are exchanged"""


class AsyncCollector(Collector):
    """Keeps prompts in flight across steps and takes the oldest groups that have finished.

    In flight and finished are together at most (rollout.max_staleness + 1) x rollout.prompts_per_step groups
    while a step waits, and rollout.max_staleness x rollout.prompts_per_step while it trains (AReaL, arXiv
    2505.24298, section on staleness): with more, groups would grow older than the bound. Under dynamic
    sampling these are the groups expected to have contrast. None is asked for beyond the last step's need.

    State: position in the data, groups that have finished, and prompts in flight, which a resumed run asks
    for again with the same seeds.
    """

    def __init__(self, config: Config, prompts: list[Prompt], sampler: PromptSampler) -> None:
        """`config` is resolved (algorithms.presets.resolve)."""
        super().__init__(config, prompts, sampler)
        self.pending: dict[int, Pending] = {}
        """By number: how many prompts were drawn before it. The same on every process."""
        self._own: dict[int, Group] = {}
        """Groups that this process's engine has finished and the others do not have"""
        self._carried: set[int] = set()
        """Numbers of the usable groups that the last step left"""
        self._seen, self._found = 0, 0
        """Groups that have finished and those of them that are usable, recent steps counting most"""
        self._stack = ExitStack()
        self._stream: Stream | None = None
        self._sampler: GroupSampler | None = None

    def step(self, step: int, sampler: GroupSampler) -> Collected:
        """Returns the groups of step `step`, the oldest first. Collective.

        Returns with prompts in flight. Raises NoContrastError at rollout.max_prompts_per_step; RolloutError
        or UserError on every process if the engine or the verifier of one does.
        """
        wanted, bound = self.config.rollout.prompts_per_step, self.config.rollout.max_staleness
        version, steps_left = step - 1, self.config.train.steps - step
        self._sampler = sampler
        self._ask_again(version)
        # of a run that was resumed with another bound
        dropped = self._drop_older_than(version - bound)
        self._wait(wanted, min(bound, steps_left) + 1, version)
        self._exchange()
        taken = self._take(self._usable()[:wanted])
        without_contrast = self._take([n for n, each in self.pending.items() if each.usable is False])
        aborted = 0 if steps_left else len(self._abort(self._in_flight()))
        # at once: their slots serve groups that can still be trained
        dropped += self._drop_older_than(step - bound)
        self._carried = set(self._usable())
        self._submit(min(bound, steps_left), version)
        self._seen, self._found = self._seen // 2, self._found // 2
        staleness = [version - each.version for each in taken]
        groups = [each.group for each in taken]
        left = [each.group for each in (*without_contrast, *dropped) if each.group]
        return Collected(
            groups,
            groups + left,
            carried=sum(age > 0 for age in staleness),
            leftover=len(self._carried),
            aborted=aborted,
            queue=Queue(
                staleness,
                in_flight=len(self._in_flight()),
                dropped_stale=len(dropped),
                dropped_no_contrast=len(without_contrast),
            ),
        )

    def close(self) -> None:
        """Aborts what is in flight."""
        self._stack.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON values: with what has finished by now. Collective."""
        if self._stream:
            self._poll(0.0)
            self._exchange()
        rows = {prompt.index: i for i, prompt in enumerate(self.prompts)}
        return self.sampler.state_dict() | {
            "in_flight": [[n, rows[self.pending[n].prompt.index]] for n in self._in_flight()],
            "finished": [
                {
                    "number": n,
                    "version": each.version,
                    "usable": each.usable,
                    **group_to_json(each.group, rows[each.prompt.index]),
                }
                for n, each in self.pending.items()
                if each.group
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. Raises UserError if it is of other data, another seed or a synchronous run."""
        self.sampler.load_state_dict(state)
        if "in_flight" not in state:
            raise UserError(
                f"rollout.max_staleness is {self.config.rollout.max_staleness}; the checkpoint is of a run "
                "with 0, which checkpoint.force cannot change: set it back, or start from an export"
            )
        again = {n: Pending(self.prompts[row], 0, -1) for n, row in state["in_flight"]}
        finished = {
            each["number"]: Pending(
                self.prompts[each["prompt"]],
                each["version"],
                -1,
                each["usable"],
                group_from_json(each, self.prompts),
            )
            for each in state["finished"]
        }
        self.pending = again | finished
        self._carried = set(self._usable())

    def _ask_again(self, version: int) -> None:
        """Opens the stream at the run's first step, and submits what was in flight at its resume point."""
        if self._stream:
            return
        self._stream = self._stack.enter_context(self._sampler.engine.stream(self._sampler.sampling))
        for number in sorted(self._in_flight()):
            self._ask(number, self.pending.pop(number).prompt, version)

    def _wait(self, wanted: int, steps: int, version: int) -> None:
        """Submits prompts for so many steps, and waits until `wanted` groups are usable."""
        self._poll(0.0)  # what has finished while the policy trained
        pause = FIRST_POLL_S
        with tqdm(total=wanted, desc="groups", leave=False, disable=device.quiet()) as bar:
            while True:
                self._submit(steps, version)
                usable = len(self._usable())
                bar.update(min(usable, wanted) - bar.n)
                if usable >= wanted:
                    return
                self._check_contrast(wanted)
                self._poll(pause)
                pause = min(GROWTH * pause, LONGEST_POLL_S)

    def _poll(self, seconds: float) -> None:
        """Learns which groups of all processes have finished; waits at most `seconds` for this one's next."""
        with raised_on_all_ranks(RolloutError, UserError):
            own = self._finished_here(seconds)
        for found in gathered(own):
            self._seen += len(found)
            self._found += sum(found.values())
            for number, usable in found.items():
                self.pending[number].usable = usable

    def _finished_here(self, seconds: float) -> dict[int, bool]:
        """Scores the groups that this process's engine has finished; returns by number which are usable."""
        found: dict[int, bool] = {}
        while self._stream.outstanding() and (finished := self._stream.next(seconds)):
            number, samples = finished
            (group,) = self._sampler.scored([self.pending[number].prompt], samples)
            self._own[number] = group
            found[number] = not self.config.rollout.dynamic_sampling or bool(self._has_contrast(group))
            seconds = 0.0
        return found

    def _exchange(self) -> None:
        """Gives the groups that have finished to every process."""
        prompts = {number: each.prompt for number, each in self.pending.items()}
        for number, group in exchange(self._own, prompts).items():
            self.pending[number].group = group
        self._own.clear()

    def _submit(self, steps: int, version: int) -> None:
        """Draws and submits prompts, until what is in flight and usable is likely to fill so many steps."""
        rollout, usable = self.config.rollout, len(self._usable())
        needed = steps * rollout.prompts_per_step - usable
        # as in a search for `needed` more groups, with the share of usable ones in recent steps
        count = likely_prompts(self._found + needed, self._seen, self._found) - len(self._in_flight())
        if rollout.dynamic_sampling:
            sampled = self.pending.keys() - self._carried
            count = min(count, steps * rollout.max_prompts_per_step - len(sampled))
        count = max(0, count)
        for number, prompt in enumerate(self._draw(count), self.sampler.drawn):
            self._ask(number - count, prompt, version)

    def _ask(self, number: int, prompt: Prompt, version: int) -> None:
        """Submits a prompt to the process with the fewest in flight."""
        load = Counter(each.process for each in self.pending.values() if each.usable is None)
        process = min(range(dist.get_world_size()), key=lambda rank: load[rank])
        self.pending[number] = Pending(prompt, version, process)
        if process == dist.get_rank():
            self._stream.submit(number, self._sampler.requests(prompt, (self.config.seed, number)))

    def _in_flight(self) -> list[int]:
        return [number for number, each in self.pending.items() if each.usable is None]

    def _usable(self) -> list[int]:
        """Returns the numbers of the groups that a step may take, the oldest first."""
        usable = [number for number, each in self.pending.items() if each.usable]
        return sorted(usable, key=lambda number: (self.pending[number].version, number))

    def _take(self, numbers: list[int]) -> list[Pending]:
        return [self.pending.pop(number) for number in numbers]

    def _drop_older_than(self, version: int) -> list[Pending]:
        """Drops groups that were submitted under older weights, finished or in flight; returns them."""
        old = [number for number, each in self.pending.items() if each.version < version]
        in_flight = [number for number in old if self.pending[number].usable is None]
        return self._abort(in_flight) + self._take([number for number in old if number not in in_flight])

    def _abort(self, numbers: list[int]) -> list[Pending]:
        aborted = self._take(numbers)
        for number, each in zip(numbers, aborted, strict=True):
            if each.process == dist.get_rank():
                self._stream.abort(number)
        return aborted

    def _check_contrast(self, wanted: int) -> None:
        """Raises NoContrastError if the step has sampled all prompts that it may and needs more groups."""
        finished = [number for number, each in self.pending.items() if each.usable is not None]
        sampled = [number for number in finished if number not in self._carried]
        if self.config.rollout.dynamic_sampling and len(sampled) >= self.config.rollout.max_prompts_per_step:
            self._exchange()
            found, groups = len(self._usable()), [self.pending[number].group for number in sampled]
            raise NoContrastError(
                self._too_few(found - len(self._carried), wanted - len(self._carried), groups)
            )


def make_collector(config: Config, prompts: list[Prompt], sampler: PromptSampler) -> Collector:
    """Returns the collector that rollout.max_staleness asks for. `config` is resolved."""
    return (AsyncCollector if config.rollout.max_staleness else Collector)(config, prompts, sampler)
