"""Tests reward.on_error: what becomes of responses that cannot be scored, from the group to the metrics."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.rewards import scorer_of
from support.scripted import PROMPTS, Scripted, Words

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config, OnError
from megatron_bicc.errors import UserError
from megatron_bicc.evaluation.benchmarks import ask, evaluation_metrics, summarize
from megatron_bicc.rewards.types import Completion
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.sampling import Collected, comparable
from megatron_bicc.rollout.types import Group, Sample, Sampling
from megatron_bicc.training.batch import collate
from megatron_bicc.training.step_metrics import rollout_metrics


def reward(completions: list[Completion]) -> list[Any]:
    """Of the responses 0, 1, 2 and 3 the odd ones are right; 0 cannot be scored."""
    numbers = [int(each.response) for each in completions]
    return [float("nan") if not n else {"reward": n % 2, "number": n, "feedback": str(n)} for n in numbers]


def sampler(on_error: OnError) -> GroupSampler:
    drop = on_error == "drop"
    return GroupSampler(None, scorer_of(reward, on_error), Words(), Sampling(1.0, 9), 4, drop)


def samples(numbers: list[int]) -> list[Sample]:
    experts = np.zeros((1, 1, 1), np.int8)
    rest = [None] * (len(numbers) - 1)
    log_probs = np.zeros(1, np.float32)
    return [
        Sample(np.array([n], np.int32), log_probs, "length", 0, experts, first)
        for n, first in zip(numbers, [experts, *rest], strict=True)
    ]


def group(on_error: OnError, numbers: list[int]) -> Group:
    (found,) = sampler(on_error).scored(PROMPTS[:1], samples(numbers))
    return found


def metrics(on_error: OnError, groups: list[Group]) -> dict[str, float]:
    config = Config()
    config.reward.on_error = on_error
    return rollout_metrics(Collected(groups, groups, 0, 0, 0), resolve(config))


def test_what_becomes_of_a_response_that_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="response 0 to the prompt of row 1: the reward is nan"):
        group("fail", [0, 1, 2, 3])
    zero, drop = group("zero", [0, 1, 2, 3]), group("drop", [0, 1, 2, 3])
    assert zero.rewards.tolist() == [0, 1, 0, 1] and drop.rewards.tolist() == [1, 0, 1]
    assert zero.failed == drop.failed == 1
    # it is in no baseline and no context, and its tokens count in no denominator
    plain = replace(drop, samples=[replace(each, experts=None) for each in drop.samples])
    assert collate([plain]).lengths_R.tolist() == [1, 1, 1]
    assert drop.texts == drop.feedback == ["1", "2", "3"] and zero.feedback == ["", "1", "2", "3"]
    assert drop.metrics == zero.metrics[1:] == [{"number": 1.0}, {"number": 2.0}, {"number": 3.0}]
    # the first sample of a group has the prompt's experts
    assert drop.samples[0].prompt_experts is not None and drop.samples[1].prompt_experts is None


def test_they_are_counted_and_metrics_are_averaged() -> None:
    found = metrics("drop", [group("drop", [0, 1, 2, 3]), group("drop", [0, 0, 0, 0])])
    assert found["reward/failed"] == 5 and found["reward/number"] == 2.0
    assert found["reward/mean"] == pytest.approx(2 / 3) and found["rollout/prompts"] == 2
    assert metrics("zero", [group("zero", [0, 1, 2, 3])])["reward/mean"] == 0.5
    assert "reward/failed" not in metrics("fail", [group("fail", [1, 1, 2, 3])])


def test_a_group_without_two_responses_is_not_trained() -> None:
    groups = [group("drop", numbers) for numbers in ([1, 2, 3, 3], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 2])]
    assert [each.rewards.tolist() for each in comparable(groups)] == [[1, 0, 1, 1], [1, 0]]
    with pytest.raises(
        UserError, match="reward.on_error is drop; 7 responses of 2 prompts could not be scored"
    ):
        comparable(groups[1:3])


@pytest.mark.usefixtures("single_process")
def test_an_evaluation_counts_them_as_wrong() -> None:
    """Its figures need as many samples of every prompt."""

    def fails_once(completions: list[Completion]) -> list[float]:
        return [float("nan"), *[float(each.response == each.ground_truth) for each in completions[1:]]]

    engine = Scripted(lambda prompt: 4)
    answers = ask(
        PROMPTS[:2], GroupSampler(engine, scorer_of(fails_once, "drop"), Words(), Sampling(1.0, 8), 4), 1
    )
    found = summarize(answers, 0.5)
    assert found.avg.value == 0.75 and found.failed == 2
    assert evaluation_metrics(found)["eval/failed"] == 2
