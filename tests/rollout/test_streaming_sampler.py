"""Tests dynamic sampling on a streaming engine: prompts submitted while others run, and surplus groups."""

import pytest
from support.scripted import GROUP_SIZE, PROMPTS, WANTED, Scripted, drawn, indices, make_collector, some, step

from megatron_bicc.rollout.sampling import NoContrastError
from megatron_bicc.rollout.streaming_sampler import Search, likely_prompts
from megatron_bicc.rollout.types import RolloutError


@pytest.mark.parametrize(
    ("wanted", "finished", "found", "expected"),
    [(6, 0, 0, 6), (6, 1, 0, 12), (6, 1, 1, 5), (6, 9, 4, 4), (6, 20, 6, 0), (6, 20, 9, 0), (6, 11, 5, 2)],
)
def test_likely_prompts(wanted: int, finished: int, found: int, expected: int) -> None:
    assert likely_prompts(wanted, finished, found) == expected


def test_prompts_are_asked_for_while_others_run(single_process: None) -> None:
    engine, collector = Scripted(some, lambda p: 1 + p % 5), make_collector()
    found = step(engine, collector)
    assert len(found.groups) == WANTED
    assert all(0 < group.rewards.sum() < GROUP_SIZE for group in found.groups)
    assert engine.asked == drawn(len(engine.asked)), "in the sampler's order, none twice"
    assert engine.most == WANTED
    assert indices(found.sampled) == [p for p in engine.asked if p in indices(found.sampled)]
    assert collector.sampler.peek(1) == drawn(1, after=len(engine.asked))


def test_a_slow_prompt_holds_up_none_and_is_aborted(single_process: None) -> None:
    slow = drawn(1)[0]
    engine = Scripted(some, lambda p: 1000.0 if p == slow else 1.0)
    found = step(engine, make_collector())
    assert slow not in indices(found.sampled)
    assert found.aborted == engine.aborted >= 1
    assert found.aborted + len(found.sampled) == len(engine.asked)
    assert engine.now < 1000


def test_what_is_kept_is_finished_and_learned_from_next(single_process: None) -> None:
    slow = [p for p in drawn(WANTED) if some(p) == 2][:1]
    engine = Scripted(some, lambda p: 1000.0 if p in slow else 1.0)
    collector = make_collector(leftover="keep")
    first = step(engine, collector)
    assert first.aborted == engine.aborted == 0
    assert set(slow) < set(indices(first.sampled)) == set(engine.asked)
    # the slow group finished last, and groups are learned from in the order of their prompts
    assert indices(first.groups)[0] == slow[0]
    assert 0 < first.leftover < WANTED
    kept = collector.leftover
    second = step(Scripted(some), collector, 2)
    assert second.carried == first.leftover
    assert indices(second.groups)[: second.carried] == indices(kept)
    assert indices(second.sampled)[0] == drawn(1, after=len(engine.asked))[0]


def test_the_cap(single_process: None) -> None:
    engine = Scripted(lambda _: 0)
    with pytest.raises(NoContrastError, match="max_prompts_per_step is 20; .* 0 have .* 20 are all wrong"):
        step(engine, make_collector(max_prompts_per_step=20))
    assert len(engine.asked) == 20


def test_no_more_than_a_step_is_left_over() -> None:
    """However the answers fall, what is unfinished when enough are found is less than a step."""
    plan = Search(PROMPTS, WANTED, WANTED, (1, 1), finish=True)
    for finished in range(50):
        for found in range(min(finished, WANTED) + 1):
            assert 0 <= plan.unfinished(finished, found) <= WANTED
            assert (plan.unfinished(finished, found) == 0) == (found == WANTED)


def test_an_engine_that_fails(single_process: None) -> None:
    engine, collector = Scripted(some), make_collector()
    engine.fails_at = drawn(4)[3]
    with pytest.raises(RolloutError, match="no answer after 3 s"):
        step(engine, collector)
