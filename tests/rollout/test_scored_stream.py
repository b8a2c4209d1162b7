"""Tests that groups are scored while an engine that streams generates others."""

import asyncio

import pytest
from support.scripted import GROUP_SIZE, PROMPTS, Scripted, Words

from megatron_bicc.errors import UserError
from megatron_bicc.rewards.functions import Function
from megatron_bicc.rewards.scorer import Part, Scorer
from megatron_bicc.rewards.types import Completion
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.types import Sampling


class Meeting:
    """A coroutine function whose calls end once all have begun: one after another they never would."""

    def __init__(self, calls: int) -> None:
        self.calls, self.begun = calls, 0

    async def __call__(self, completions: list[Completion]) -> list[float]:
        self.begun += 1
        async with asyncio.timeout(20):
            while self.begun < self.calls:
                await asyncio.sleep(0.001)
        return [float(each.row) for each in completions]


def sampler(function: Meeting, engine: Scripted) -> GroupSampler:
    scorer = Scorer([Part("meeting", Function.of("meeting", function), "in the loop", at_once=8)])
    return GroupSampler(engine, scorer, Words(), Sampling(1.0, 8), GROUP_SIZE)


@pytest.mark.usefixtures("single_process")
def test_groups_are_scored_beside_each_other_and_keep_their_order() -> None:
    """The engine finishes the last prompt first."""
    made = sampler(Meeting(calls=4), Scripted(lambda prompt: 2, lambda prompt: 10.0 - prompt))
    groups = made.collect(PROMPTS[:4], (1,))
    made.scorer.close()
    assert [group.prompt.index for group in groups] == [0, 1, 2, 3]
    assert [group.rewards.tolist() for group in groups] == [[row] * GROUP_SIZE for row in (1, 2, 3, 4)]


def test_a_group_can_be_aborted_while_it_is_generated_or_scored() -> None:
    engine = Scripted(lambda prompt: 2, lambda prompt: 0.0)
    made = sampler(Meeting(calls=9), engine)
    with made.stream() as stream:
        for key in range(3):
            stream.submit(key, PROMPTS[key], made.requests(PROMPTS[key], (1,)))
        assert stream.next(0.01) is None and stream.outstanding() == 3
        assert engine.outstanding() == 0, "all are being scored"
        stream.abort(0)
        stream.submit(3, PROMPTS[3], made.requests(PROMPTS[3], (1,)))
        stream.abort(3)
        assert stream.outstanding() == 2 and engine.aborted == 1
    made.scorer.close()


@pytest.mark.usefixtures("single_process")
def test_an_error_of_one_group_is_raised() -> None:
    class Fails(Meeting):
        async def __call__(self, completions: list[Completion]) -> list[float]:
            if completions[0].row == 2:
                raise KeyError("column")
            return [0.0] * len(completions)

    made = sampler(Fails(0), Scripted(lambda prompt: 2))
    with pytest.raises(UserError, match="response 0 to the prompt of row 2: the function raised KeyError"):
        made.collect(PROMPTS[:3], (1,))
    made.scorer.close()
