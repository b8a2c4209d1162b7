"""Tests asynchronous rollouts: what a step takes and drops, bounds, resume, and that no prompt is lost."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted import GROUP_SIZE, PROMPTS, WANTED, Scripted, drawn, indices, make_collector, some, step

from megatron_bicc.errors import UserError
from megatron_bicc.rollout.async_collector import AsyncCollector
from megatron_bicc.rollout.sampling import Collected, Collector, NoContrastError
from megatron_bicc.rollout.types import Request, RolloutError

BOUND = 2


def mixed(prompt: int) -> int:
    return 2


def make(steps: int = 100, bound: int = BOUND, dynamic: bool = False, **rollout: object) -> AsyncCollector:
    return make_collector(steps, max_staleness=bound, dynamic_sampling=dynamic, **rollout)


def in_flight(collector: AsyncCollector) -> int:
    return sum(each.usable is None for each in collector.pending.values())


def numbers(found: Collected) -> list[int]:
    """Of the trained groups: how many prompts were drawn before each."""
    return [-int(group.samples[0].log_probs[0]) for group in found.groups]


def test_the_setting_chooses_the_collector() -> None:
    assert type(make_collector(max_staleness=0)) is Collector
    assert type(make()) is AsyncCollector


def test_a_step_leaves_two_steps_in_flight_and_takes_the_oldest(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 0.01 * (1 + p % 5)), make()
    seen = []
    for number in range(1, 6):
        found = step(engine, collector, number)
        assert len(engine.asked) == (number + BOUND) * WANTED
        assert found.queue.in_flight + found.leftover == BOUND * WANTED
        assert sorted(found.queue.staleness, reverse=True) == found.queue.staleness
        seen += numbers(found)
        engine.now += 1.0  # all have finished
    assert found.queue.staleness == WANTED * [BOUND]
    assert sorted(seen) == list(range(5 * WANTED)), "from the third step on there is nothing to wait for"
    assert engine.asked == drawn(7 * WANTED)


def test_a_step_waits_no_longer_than_it_must(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 10.0 if p in slow else 1.0), make(bound=1)
    slow = drawn(WANTED)
    found = step(engine, collector)
    assert indices(found.groups) == drawn(WANTED, after=WANTED)
    assert 1.0 <= engine.now < 1.1


def test_what_has_finished_in_training_goes_before_what_was_left(single_process: None) -> None:
    (slow,) = drawn(1)
    engine, collector = Scripted(mixed, lambda p: 0.5 if p == slow else 0.01), make()
    assert step(engine, collector).leftover > WANTED
    engine.now += 1.0
    assert indices(step(engine, collector, 2).groups)[0] == slow


def test_a_step_looks_seldom_where_it_waits_long(single_process: None) -> None:
    """By how long it waits for the next group before it tells the other processes."""
    engine, collector, waits = Scripted(mixed, lambda p: 30.0), make(), []
    look = engine.next
    engine.next = lambda seconds: waits.append(seconds) or look(seconds)
    step(engine, collector)
    before = np.cumsum(waits) - waits
    assert all(wait <= 0.01 + 0.06 * waited for wait, waited in zip(waits, before, strict=True))
    assert max(waits) == 1.0 and len(waits) < 200


def test_what_is_past_the_bound_is_dropped_and_its_slot_used(single_process: None) -> None:
    slow = drawn(2)
    engine, collector = Scripted(mixed, lambda p: 1000.0 if p in slow else 0.1), make(bound=1)
    assert step(engine, collector).queue.dropped_stale == 0 and engine.running.keys() >= {0, 1}
    second = step(engine, collector, 2)
    assert second.queue.dropped_stale == engine.aborted == 2
    assert second.queue.in_flight + second.leftover == WANTED
    assert len(engine.asked) == 3 * WANTED + 2
    assert second.aborted == 0


def test_nothing_is_asked_for_that_cannot_be_trained(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 0.01), make(steps=3)
    ends = [step(engine, collector, number) for number in (1, 2, 3)]
    assert len(engine.asked) == 3 * WANTED
    assert [found.queue.in_flight + found.leftover for found in ends] == [2 * WANTED, WANTED, 0]
    assert [found.aborted for found in ends] == [0, 0, 0]


def test_the_last_step_of_dynamic_sampling_aborts_what_is_left(single_process: None) -> None:
    engine, collector = Scripted(some, lambda p: 0.01 * (1 + p % 7)), make(steps=2, bound=1, dynamic=True)
    first, last = step(engine, collector), step(engine, collector, 2)
    assert first.aborted == 0 and first.queue.dropped_no_contrast > 0
    assert last.aborted == engine.aborted > 0 and last.queue.in_flight == 0
    assert not engine.running


def test_more_prompts_are_in_flight_where_few_have_contrast(single_process: None) -> None:
    engine, collector = Scripted(some, lambda p: 0.01), make(dynamic=True)
    for number in range(1, 5):
        found = step(engine, collector, number)
        assert all(0 < group.rewards.sum() < GROUP_SIZE for group in found.groups)
        without = [group for group in found.sampled if not 0 < group.rewards.sum() < GROUP_SIZE]
        assert len(without) == found.queue.dropped_no_contrast
    # a third of the prompts has contrast
    assert 2 * BOUND * WANTED < found.queue.in_flight + 3 * found.leftover < 5 * BOUND * WANTED


def test_the_cap(single_process: None) -> None:
    engine, collector = Scripted(lambda _: 0, lambda p: 0.01), make(dynamic=True, max_prompts_per_step=20)
    with pytest.raises(NoContrastError, match="max_prompts_per_step is 20; .* 0 have .* 6 are needed"):
        step(engine, collector)
    assert len(engine.asked) <= 3 * 20


@pytest.mark.parametrize("resumed", [False, True])
def test_what_an_earlier_step_left_does_not_count_towards_the_cap(
    single_process: None, resumed: bool
) -> None:
    bad, late = drawn(4, after=WANTED + 4), drawn(20, after=2 * WANTED + 3)
    engine = Scripted(lambda p: 0 if p in bad else 2, lambda p: 1.0 if p in late else 0.01)
    settings = {"bound": 1, "dynamic": True, "max_prompts_per_step": WANTED}
    collector = make(**settings)
    assert step(engine, collector).leftover == 4
    if resumed:
        state, collector = collector.state_dict(), make(**settings)
        collector.load_state_dict(state)
        engine.running.clear()
    assert step(engine, collector, 2).queue.dropped_no_contrast == 2


def test_the_cap_of_the_last_step(single_process: None) -> None:
    """What the step before left is not enough, and no other group has contrast."""
    good = drawn(WANTED + 2)
    engine = Scripted(lambda p: 2 if p in good else 0, lambda p: 0.01)
    collector = make(2, bound=1, dynamic=True, max_prompts_per_step=20)
    assert step(engine, collector).leftover == 2
    with pytest.raises(NoContrastError, match="max_prompts_per_step is 20; .* 0 have .* 4 are needed"):
        step(engine, collector, 2)
    assert len(engine.asked) <= 2 * WANTED + 20


def test_a_checkpoint_of_the_other_kind_is_refused(single_process: None) -> None:
    with pytest.raises(UserError, match="max_staleness is 2; the checkpoint is of a run with 0"):
        make().load_state_dict(make_collector().state_dict())
    with pytest.raises(UserError, match="max_staleness is 0; the checkpoint is of a run with more"):
        make_collector().load_state_dict(make().state_dict())


def test_what_finished_in_training_is_in_the_checkpoint(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 1.0 + p % 5), make()
    step(engine, collector)
    running = in_flight(collector)
    engine.now += 1.0
    state = json.loads(json.dumps(collector.state_dict()))
    assert 0 < len(state["in_flight"]) < running
    assert len(state["in_flight"]) + len(state["finished"]) == BOUND * WANTED
    again = make()
    again.load_state_dict(state)
    assert json.dumps(again.state_dict()) == json.dumps(state)


def test_a_lower_bound_holds_from_the_resume_on(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 0.01), make()
    for number in (1, 2, 3):
        step(engine, collector, number)
        engine.now += 1.0
    again = make(bound=1)
    again.load_state_dict(collector.state_dict())
    found = step(Scripted(mixed, lambda p: 0.01), again, 4)
    assert found.queue.dropped_stale > 0 and max(found.queue.staleness) == 1


def test_closing_aborts_what_is_in_flight(single_process: None) -> None:
    engine, collector = Scripted(mixed, lambda p: 1.0 + p % 5), make()
    running = step(engine, collector).queue.in_flight
    collector.close()
    assert engine.aborted == running > 0 and not engine.running


@dataclass
class Ledger:
    """What a run has made of its prompts, by number."""

    versions: dict[int, int] = field(default_factory=dict)
    """Of the weights when each was last submitted"""
    trained: set[int] = field(default_factory=set)
    dropped: int = 0


class Recorded(Scripted):
    """An engine that writes down under which weights, and with which seeds, each prompt is asked for."""

    def __init__(self, ledger: Ledger, seeds: dict[int, list[int]], *settings: Callable) -> None:
        super().__init__(*settings)
        self.ledger, self.seeds, self.version = ledger, seeds, 0

    def submit(self, key: int, requests: list[Request]) -> None:
        super().submit(key, requests)
        self.ledger.versions[key] = self.version
        again = [int(requests[0].token_ids[0]), *(request.seed for request in requests)]
        assert self.seeds.setdefault(key, again) == again, "the same prompt with the same seeds"


@dataclass
class Run:
    """A run that is killed, fails, and is resumed from its last checkpoint."""

    steps: int
    bound: int
    dynamic: bool
    random: np.random.Generator
    seeds: dict[int, list[int]] = field(default_factory=dict)
    saved: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    ledger_saved: Ledger = field(default_factory=Ledger)

    def start(self) -> None:
        """Makes engine and collector anew, in the state of the last checkpoint."""
        self.ledger = copy.deepcopy(self.ledger_saved)
        self.collector = make(self.steps, self.bound, self.dynamic)
        self.step = 0
        if self.saved:
            self.step, state = json.loads(self.saved)
            self.collector.load_state_dict(state)
        delays = self.random.lognormal(-4.0, 1.0, len(PROMPTS))
        self.engine = Recorded(self.ledger, self.seeds, some if self.dynamic else mixed, delays.__getitem__)
        if self.random.random() < 0.3:
            self.engine.fails_at = self.random.integers(len(PROMPTS))

    def save(self) -> None:
        self.saved = json.dumps([self.step, self.collector.state_dict()])
        self.ledger_saved = copy.deepcopy(self.ledger)

    def take_step(self) -> None:
        self.step += 1
        self.engine.version = self.step - 1
        found = step(self.engine, self.collector, self.step)
        self.check(found)
        self.engine.now += self.random.exponential(0.05)  # the policy trains

    def check(self, found: Collected) -> None:
        pending, ledger, taken = self.collector.pending, self.ledger, numbers(found)
        assert len(set(taken)) == WANTED and not ledger.trained & set(taken), "trained once"
        ledger.trained |= set(taken)
        ledger.dropped += found.queue.dropped_stale + found.queue.dropped_no_contrast + found.aborted
        assert not ledger.trained & pending.keys()
        assert len(ledger.trained) + ledger.dropped + len(pending) == self.collector.sampler.drawn
        ages = [self.step - 1 - ledger.versions[number] for number in taken]
        assert ages == found.queue.staleness and max(ages) <= self.bound
        place = [(ledger.versions[number], number) for number in taken]
        assert place == sorted(place), "the oldest first"
        left = [(each.version, number) for number, each in pending.items() if each.usable]
        assert found.leftover == len(left) and all(one > place[-1] for one in left)
        flying = {number for number, each in pending.items() if each.usable is None}
        assert flying == self.engine.running.keys() and len(flying) == found.queue.in_flight
        for number, each in pending.items():
            assert each.version == ledger.versions[number] >= self.step - self.bound
        if self.dynamic:
            assert all(0 < group.rewards.sum() < GROUP_SIZE for group in found.groups)
        else:
            assert len(pending) == min(self.bound, self.steps - self.step) * WANTED
            assert found.queue.dropped_no_contrast == found.aborted == 0


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bound=st.integers(1, 3),
    dynamic=st.booleans(),
    steps=st.integers(1, 9),
    kills=st.integers(0, 3),
)
def test_every_prompt_is_trained_once_dropped_or_in_flight(
    single_process: None, seed: int, bound: int, dynamic: bool, steps: int, kills: int
) -> None:
    """With random delays, failed groups, kills at any time and resumes from the last checkpoint."""
    run = Run(steps, bound, dynamic, np.random.default_rng(seed))
    run.start()
    while run.step < steps:
        try:
            run.take_step()
            if run.random.random() < 0.4:
                run.save()
        except RolloutError:
            run.start()
            run.engine.fails_at = None
        if kills and run.random.random() < 0.3:
            kills -= 1
            run.start()
    assert len(run.ledger.trained) == steps * WANTED
    assert not run.engine.running
