"""Test doubles of a streaming engine and of a tokenizer, for dynamic sampling without a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.rewards.registry import Completion
from megatron_bicc.rollout.async_collector import make_collector as of_config
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.sampling import Collected, Collector
from megatron_bicc.rollout.types import Group, Request, RolloutError, Sample, Sampling, StreamingEngine

PROMPTS = [Prompt(i, [], np.array([i + 2], np.int32), "1", "", {}) for i in range(60)]
WANTED, GROUP_SIZE = 6, 4
END = 9


class Scripted:
    """Test double of an engine and its stream, by a clock that only `next` and the test move.

    rights: prompt -> number of right samples. seconds: prompt -> duration.
    """

    def __init__(self, rights: Callable[[int], int], seconds: Callable[[int], float] = lambda _: 1.0) -> None:
        self.rights, self.seconds = rights, seconds
        self.running: dict[int, tuple[float, int]] = {}
        self.asked: list[int] = []
        self.most = 0
        self.aborted = 0
        self.now = 0.0
        self.fails_at: int | None = None

    def generate(self, requests: object, sampling: object) -> None:
        raise AssertionError("generate must not be called on an engine that streams")

    memory_released = counts = close = generate

    @contextmanager
    def stream(self, sampling: Sampling) -> Iterator["Scripted"]:
        assert not self.running
        yield self
        self.aborted += len(self.running)
        self.running.clear()

    def submit(self, key: int, requests: list[Request]) -> None:
        prompt = int(requests[0].token_ids[0]) - 2
        self.running[key] = (self.now + self.seconds(prompt), prompt)
        self.asked.append(prompt)
        self.most = max(self.most, len(self.running))

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        key = min(self.running, key=lambda k: (self.running[k][0], k))
        ends, prompt = self.running[key]
        if seconds is not None and ends > self.now + seconds:
            self.now += seconds
            return None
        del self.running[key]
        self.now = max(self.now, ends)
        if prompt == self.fails_at:
            raise RolloutError("no answer after 3 s")
        rights = self.rights(prompt)
        tokens = [np.array([1 if i < rights else 0, END], np.int32) for i in range(GROUP_SIZE)]
        # the log-probs tell a group from another one of the same prompt
        return key, [Sample(one, np.full(2, -key, np.float32), "stop", 0) for one in tokens]

    def abort(self, key: int) -> None:
        del self.running[key]
        self.aborted += 1

    def outstanding(self) -> int:
        return len(self.running)


class Words:
    """Test double of a tokenizer: a token's text is its id, and no token is special."""

    def batch_decode(self, tokens: list[np.ndarray], **_: object) -> list[str]:
        return ["".join(map(str, one)) for one in tokens]


def score(completions: list[Completion]) -> np.ndarray:
    return np.array([each.response == each.ground_truth for each in completions], np.float32)


def step(engine: Scripted, collector: Collector, number: int = 1) -> Collected:
    assert isinstance(engine, StreamingEngine)
    return collector.step(number, GroupSampler(engine, score, Words(), Sampling(1.0, 8), GROUP_SIZE))


def make_collector(steps: int = 100, **rollout: object) -> Collector:
    config = Config(algorithm="dapo")
    config.train.steps = steps
    config.rollout.prompts_per_step, config.rollout.group_size = WANTED, GROUP_SIZE
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return of_config(resolve(config), PROMPTS, PromptSampler(len(PROMPTS), WANTED, seed=1))


def some(prompt: int) -> int:
    """Returns the number of right samples of a prompt: none, half or all."""
    return (0, 2, 4)[prompt % 3]


def indices(groups: list[Group]) -> list[int]:
    return [group.prompt.index for group in groups]


def drawn(count: int, after: int = 0) -> list[int]:
    sampler = PromptSampler(len(PROMPTS), WANTED, seed=1)
    sampler.draw(after)
    return [PROMPTS[i].index for i in sampler.draw(count)]
