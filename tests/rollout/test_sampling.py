"""Tests dynamic sampling in rounds: enough groups with contrast, the cap, leftovers, exact resume."""

import json
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.rollout.sampling import Collector, NoContrastError
from megatron_bicc.rollout.types import Group, Sample

PROMPTS = [Prompt(2 * i + 1, [], np.array([i + 2], np.int32), "", "", {}) for i in range(40)]
WANTED, GROUP_SIZE = 6, 4


def make_config(**rollout: object) -> Config:
    config = Config(algorithm="dapo")
    config.rollout.prompts_per_step, config.rollout.group_size = WANTED, GROUP_SIZE
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return resolve(config)


def make_collector(**rollout: object) -> Collector:
    return Collector(make_config(**rollout), PROMPTS, PromptSampler(len(PROMPTS), WANTED, seed=1))


class Answers:
    """Test double of a GroupSampler: each prompt's share of right answers, by its row."""

    engine = None
    """None that streams"""

    def __init__(self, share: Callable[[int], float], version: int = 0) -> None:
        self.share, self.version = share, version
        self.rounds: list[int] = []

    def collect(self, prompts: list[Prompt], seed: tuple[int, ...]) -> list[Group]:
        self.rounds.append(len(prompts))
        return [self._group(prompt, np.random.default_rng([*seed, prompt.index])) for prompt in prompts]

    def _group(self, prompt: Prompt, random: np.random.Generator) -> Group:
        lengths = random.integers(1, 5, GROUP_SIZE)
        samples = [
            Sample(
                random.integers(2, 9, n).astype(np.int32),
                random.normal(size=n).astype(np.float32),
                "stop" if n < 4 else "length",
                self.version,
                random.integers(0, 9, (n, 2, 3)).astype(np.uint8),
                None if i else random.integers(0, 9, (4, 2, 3)).astype(np.uint8),
            )
            for i, n in enumerate(lengths)
        ]
        rewards = (random.random(GROUP_SIZE) < self.share(prompt.index)).astype(np.float32)
        return Group(prompt, samples, [f"\\boxed{{{n}}}" for n in lengths], rewards)


def mixed(row: int) -> float:
    """Some prompts always right, some always wrong, some in between."""
    return (0.0, 0.5, 1.0)[row % 3]


def as_data(group: Group) -> tuple:
    listed = lambda array: array if array is None else (array.dtype, array.tolist())  # noqa: E731
    samples = [
        (
            *map(listed, (s.token_ids, s.log_probs, s.experts, s.prompt_experts)),
            s.finish_reason,
            s.weight_version,
        )
        for s in group.samples
    ]
    return group.prompt.index, samples, group.texts, group.rewards.tolist()


def contrast(group: Group) -> bool:
    return 0 < group.rewards.sum() < len(group.rewards)


def test_every_group_of_a_step_has_contrast() -> None:
    collector, answers = make_collector(), Answers(mixed)
    for step in range(1, 5):
        found = collector.step(step, answers)
        assert len(found.groups) == WANTED
        assert all(contrast(group) for group in found.groups)
        assert found.leftover == sum(contrast(group) for group in found.sampled) - WANTED
        assert found.carried == 0
    assert max(answers.rounds) <= WANTED
    assert len(answers.rounds) > 4


def test_prompts_are_drawn_in_order_and_none_twice() -> None:
    collector = make_collector()
    drawn = [g.prompt.index for step in (1, 2) for g in collector.step(step, Answers(mixed)).sampled]
    order = PromptSampler(len(PROMPTS), WANTED, seed=1).draw(len(drawn))
    assert drawn == [PROMPTS[i].index for i in order]


def test_a_prompt_that_comes_again_is_answered_anew() -> None:
    collector = Collector(make_config(), PROMPTS[:WANTED], PromptSampler(WANTED, WANTED, seed=1))
    sampled = collector.step(1, Answers(lambda _: 0.1)).sampled
    responses = [as_data(group)[:2] for group in sampled]
    assert len(sampled) > WANTED
    assert all(responses.count(one) == 1 for one in responses)


def test_without_it_groups_are_what_was_drawn() -> None:
    answers = Answers(mixed)
    found = make_collector(dynamic_sampling=False).step(1, answers)
    assert answers.rounds == [WANTED]
    assert found.groups == found.sampled
    assert not all(contrast(group) for group in found.groups)


@pytest.mark.parametrize(
    ("share", "cause"),
    [(0.0, "all 80 rewards are 0: 0% .* train on easier prompts"), (1.0, "too easy .* harder prompts")],
)
def test_the_cap_says_what_is_wrong(share: float, cause: str) -> None:
    answers = Answers(lambda _: share)
    counts = "20 are all wrong and 0 all right" if share == 0 else "0 are all wrong and 20 all right"
    expected = f"max_prompts_per_step is 20; .* 0 have .*, 6 are needed; {counts}: {cause}"
    with pytest.raises(NoContrastError, match=expected):
        make_collector(max_prompts_per_step=20).step(1, answers)
    assert sum(answers.rounds) == 20


def test_a_cap_that_is_just_enough() -> None:
    needed = len(make_collector().step(1, Answers(mixed)).sampled)
    assert len(make_collector(max_prompts_per_step=needed).step(1, Answers(mixed)).groups) == WANTED


def test_leftover_is_learned_from_first() -> None:
    collector, found = make_collector(leftover="keep"), []
    for step in range(1, 13):
        found.append(collector.step(step, Answers(lambda row: 0.5 * (row // 2 % 2), version=step - 1)))
        assert len(found[-1].groups) == WANTED
    assert max(step.carried for step in found) > 1
    for before, after in pairwise(found):
        over = [group for group in before.sampled if contrast(group)]
        kept = over[len(over) - before.leftover :]
        assert after.carried == before.leftover == len(kept)
        assert [as_data(g) for g in after.groups[: after.carried]] == [as_data(g) for g in kept]
    taken = [as_data(g) for step in found for g in step.groups]
    assert all(taken.count(one) == 1 for one in taken)


@pytest.mark.parametrize("leftover", ["drop", "keep"])
def test_resumes_to_the_group(leftover: str) -> None:
    whole = make_collector(leftover=leftover)
    states, steps = [], []
    for step in range(1, 9):
        states.append(json.loads(json.dumps(whole.state_dict())))
        steps.append(whole.step(step, Answers(mixed, version=step - 1)))
    assert any(state["leftover"] for state in states) == (leftover == "keep")
    for first, state in enumerate(states):
        resumed = make_collector(leftover=leftover)
        resumed.load_state_dict(state)
        for step, expected in list(enumerate(steps, 1))[first:]:
            found = resumed.step(step, Answers(mixed, version=step - 1))
            assert [as_data(g) for g in found.groups] == [as_data(g) for g in expected.groups]
            assert (found.carried, found.leftover) == (expected.carried, expected.leftover)
