"""Simulates asynchronous rollouts beside the synchronous loop: no weights, no GPU, a clock that jumps.

The run's own collectors drive a scripted engine: synchronous (rollout.max_staleness=0) and asynchronous. The
servers decode up to --slots responses at once, each response at the same speed; a response waits until a slot
is free. Lengths are log-normal. The policy trains for --training times the seconds that a synchronous step
generates. Weight syncs, scoring and the collector itself take no time.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from benchmarks._measure import one_process

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.rewards.registry import Completion
from megatron_bicc.rollout.async_collector import make_collector
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.types import Engine, Request, Sample, Sampling

RIGHT, WRONG = 1, 0
"""First tokens of responses"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--steps", type=int, default=100, help="training steps (%(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="groups of a step (%(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="responses of a group (%(default)s)")
    parser.add_argument("--slots", type=int, default=256, help="responses decoded at once (%(default)s)")
    parser.add_argument("--tokens-per-s", type=float, default=8000, help="with all slots full (%(default)s)")
    parser.add_argument(
        "--alone",
        type=float,
        default=2,
        help="speed of one response alone over that of full slots (%(default)s)",
    )
    parser.add_argument("--median", type=float, default=1000, help="median length in tokens (%(default)s)")
    parser.add_argument("--sigma", type=float, default=1, help="sigma of the log of lengths (%(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="rollout.max_new_tokens (%(default)s)")
    parser.add_argument(
        "--training", type=float, default=1, help="training over synchronous generation (%(default)s)"
    )
    parser.add_argument(
        "--contrast", type=float, default=1, help="share of groups with contrast; below 1: dynamic sampling"
    )
    parser.add_argument(
        "--staleness", type=int, nargs="+", default=[1, 2, 4], help="rollout.max_staleness (1 2 4)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Simulates the synchronous loop and one run for each staleness.

    Returns:
        cases: one per rollout.max_staleness, 0 first, with staleness, seconds of a step, groups_per_s and
        tokens_per_s trained, their ratios to the synchronous loop's (speedup, token_speedup), policy_idle and
        server_idle (shares of time and of slots), ages (share of the trained groups by staleness), dropped
        (share of the drawn prompts past the bound) and length (mean of the trained responses).
    """
    a = arguments
    with one_process():
        generation = simulate(0, 0.0, a)["seconds"]
        cases = [simulate(bound, a.training * generation, a) for bound in (0, *a.staleness)]
    for case in cases:
        case["speedup"] = case["groups_per_s"] / cases[0]["groups_per_s"]
        case["token_speedup"] = case["tokens_per_s"] / cases[0]["tokens_per_s"]
    _print(cases)
    return {"cases": cases}


def _print(cases: list[dict[str, Any]]) -> None:
    names = {
        "seconds": ("s a step", ",.0f"),
        "speedup": ("groups/s", ".2f"),
        "token_speedup": ("tokens/s", ".2f"),
        "policy_idle": ("policy idle", ".0%"),
        "server_idle": ("slots idle", ".0%"),
        "dropped": ("dropped", ".1%"),
        "length": ("mean length", ",.0f"),
    }
    print("staleness".ljust(11) + "".join(f"{title:>13}" for title, _ in names.values()) + "  by staleness")
    for case in cases:
        row = "".join(f"{case[name]:>13{form}}" for name, (_, form) in names.items())
        print(f"{case['staleness']:<11}{row}  {' '.join(f'{share:.2f}' for share in case['ages'])}")


def simulate(bound: int, training_s: float, a: argparse.Namespace) -> dict[str, Any]:
    """Simulates a run with rollout.max_staleness = bound; returns its case, without ratios.

    training_s: seconds for which the policy trains in a step.
    """
    config = Config(algorithm="dapo" if a.contrast < 1 else "grpo")
    config.train.steps, config.rollout.max_staleness = a.steps, bound
    config.rollout.prompts_per_step, config.rollout.group_size = a.prompts, a.group_size
    config.rollout.max_prompts_per_step = 100 * a.prompts
    drawable = 4 * a.prompts
    prompts = [Prompt(i, [], np.array([i], np.int32), str(RIGHT), "", {}) for i in range(drawable)]
    collector = make_collector(resolve(config), prompts, PromptSampler(drawable, a.prompts, seed=1))
    engine = ScriptedEngine(Servers(a.slots, a.tokens_per_s / a.slots, a.alone), a)
    sampler = GroupSampler(engine, score, FirstTokens(), Sampling(1.0, a.longest), a.group_size)
    lengths, ages, dropped = [], [], 0
    for step in range(1, a.steps + 1):
        found = collector.step(step, sampler)
        lengths += [len(sample.token_ids) for group in found.groups for sample in group.samples]
        if found.queue:
            ages += found.queue.staleness
            dropped += found.queue.dropped_stale
        engine.servers.advance(training_s)
    collector.close()
    seconds = engine.servers.now / a.steps
    return {
        "staleness": bound,
        "seconds": seconds,
        "groups_per_s": a.prompts / seconds,
        "tokens_per_s": sum(lengths) / engine.servers.now,
        "policy_idle": 1 - training_s / seconds,
        "server_idle": 1 - engine.servers.busy / (a.slots * engine.servers.now),
        "ages": (np.bincount(ages) / len(ages)).tolist() if ages else [1.0],
        "dropped": dropped / collector.sampler.drawn,
        "length": float(np.mean(lengths)),
    }


class Servers:
    """Slots that decode at one speed, by a clock that jumps from one response's end to the next."""

    def __init__(self, slots: int, tokens_per_s: float, alone: float) -> None:
        """tokens_per_s: speed of each response in full slots; alone: that of a single one relative to it."""
        self.now = 0.0
        self.busy = 0.0
        """Seconds of decoding, added up over slots"""
        self.ended: deque[tuple[int, int]] = deque()
        """Responses that have ended and were not read yet"""
        self._slots, self._speed, self._alone = slots, tokens_per_s, alone
        self._waiting: deque[tuple[tuple[int, int], int]] = deque()
        self._running: list[tuple[float, tuple[int, int]]] = []
        """A heap of responses by the tokens decoded in a slot at their end"""
        self._decoded = 0.0
        """Tokens that a slot has decoded that was never free"""

    def submit(self, response: tuple[int, int], tokens: int) -> None:
        """Takes a response of so many tokens; it starts as soon as a slot is free."""
        self._waiting.append((response, tokens))
        self._fill()

    def abort(self, key: int) -> None:
        """Removes the responses whose name begins with the key."""
        self._waiting = deque(item for item in self._waiting if item[0][0] != key)
        self._running = [item for item in self._running if item[1][0] != key]
        self.ended = deque(response for response in self.ended if response[0] != key)
        heapq.heapify(self._running)
        self._fill()

    def advance(self, seconds: float, stop: bool = False) -> None:
        """Decodes for so many seconds. stop: only until a response ends."""
        end = self.now + seconds
        while self._running:
            speed = self._speed_of(len(self._running))
            until = self.now + (self._running[0][0] - self._decoded) / speed
            self._pass(min(until, end), speed)
            if until > end:
                return
            self.ended.append(heapq.heappop(self._running)[1])
            self._fill()
            if stop:
                return
        if end < float("inf"):
            self.now = end

    def _speed_of(self, running: int) -> float:
        # a decoding step costs a constant, for reading the weights, and the same more for every response
        share = (running - 1) / max(1, self._slots - 1)
        return self._speed / ((1 - share) / self._alone + share)

    def _pass(self, until: float, speed: float) -> None:
        self.busy += (until - self.now) * len(self._running)
        self._decoded += (until - self.now) * speed
        self.now = until

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            response, tokens = self._waiting.popleft()
            heapq.heappush(self._running, (self._decoded + tokens, response))


class ScriptedEngine(Engine):
    """A StreamingEngine whose responses have random lengths and outcomes; it is its own stream."""

    def __init__(self, servers: Servers, a: argparse.Namespace) -> None:
        self.servers = servers
        self._a = a
        self._groups: dict[int, list[Sample]] = {}
        self._left: dict[int, int] = {}

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Returns samples of the groups, once all have ended."""
        size, found = self._a.group_size, {}
        for first in range(0, len(requests), size):
            self.submit(first, requests[first : first + size])
        while self.outstanding():
            key, found[key] = self.next(None)
        return [sample for key in sorted(found) for sample in found[key]]

    @contextmanager
    def stream(self, sampling: Sampling) -> Iterator["ScriptedEngine"]:
        """Yields itself; aborts what is left."""
        yield self
        for key in list(self._groups):
            self.abort(key)

    def submit(self, key: int, requests: list[Request]) -> None:
        """As Stream.submit. Lengths and outcomes depend on the seeds."""
        random, a = np.random.default_rng([request.seed for request in requests]), self._a
        lengths = np.exp(random.normal(np.log(a.median), a.sigma, len(requests)))
        lengths = np.clip(lengths, 1, a.longest).astype(int)
        outcomes = np.full(len(requests), random.choice([RIGHT, WRONG]))
        if random.random() < a.contrast:
            outcomes[: len(outcomes) // 2] = RIGHT + WRONG - outcomes[0]
        self._groups[key] = [
            Sample(np.full(n, outcome, np.int32), np.zeros(n, np.float32), "length", 0)
            for n, outcome in zip(lengths, outcomes, strict=True)
        ]
        self._left[key] = len(requests)
        for i, n in enumerate(lengths):
            self.servers.submit((key, i), int(n))

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """As Stream.next, by the servers' clock."""
        end = float("inf") if seconds is None else self.servers.now + seconds
        while True:
            while self.servers.ended:
                key, _ = self.servers.ended.popleft()
                self._left[key] -= 1
                if not self._left[key]:
                    del self._left[key]
                    return key, self._groups.pop(key)
            if self.servers.now >= end or not self._left:
                return None
            self.servers.advance(end - self.servers.now, stop=True)

    def abort(self, key: int) -> None:
        """As Stream.abort."""
        del self._left[key], self._groups[key]
        self.servers.abort(key)

    def outstanding(self) -> int:
        """As Stream.outstanding."""
        return len(self._left)


class FirstTokens:
    """A tokenizer that decodes a response to its first token's number."""

    def batch_decode(self, tokens: list[np.ndarray], **_: Any) -> list[str]:
        """Returns the texts."""
        return [str(response[0]) for response in tokens]


def score(completions: list[Completion]) -> np.ndarray:
    """Returns 1 for a response that is its prompt's ground truth: float32 [R]."""
    return np.array([each.response == each.ground_truth for each in completions], np.float32)
