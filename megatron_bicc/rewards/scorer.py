"""Scores the responses to prompts: calls the reward functions where they run, adds up what they return.

A plain function of a user runs in the thread that submits; coroutine functions run in an event loop, and
functions that wait for other processes in threads, both beside whatever the caller does meanwhile.
"""

import asyncio
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_bicc.errors import UserError
from megatron_bicc.rewards.functions import Function, Outcome
from megatron_bicc.rewards.types import Completion, Failure, Score, Scores

_log = logging.getLogger(__name__)

OnError = Literal["fail", "drop", "zero"]
Runs = Literal["here", "in threads", "in the loop"]


@dataclass(frozen=True)
class Part:
    """One function of a weighted sum."""

    name: str
    """As reward.function has it"""
    function: Function
    runs: Runs = "here"
    weight: float = 1.0
    at_once: int = 1
    """Most calls in progress, unless it runs here"""
    timeout_s: float | None = None
    """Of a call in the loop"""
    owned: list[Any] = field(default_factory=list)
    """What to close with the scorer: objects with a method close, or aclose, which is awaited"""

    @property
    def label(self) -> str:
        """Its name among the metrics."""
        return self.name.rpartition(":")[2]


class Scorer:
    """Scores the responses to prompts by a weighted sum of functions. For one thread."""

    def __init__(self, parts: list[Part], on_error: OnError = "fail") -> None:
        """on_error: fail raises for a response that could not be scored; the others give it a reward of 0.

        What fails is counted in Scores; the first failure is logged with its traceback.
        """
        self._parts, self._on_error = parts, on_error
        self._loop: _Loop | None = None
        self._logged = False

    def submit(self, completions: list[Completion]) -> "Future[Scores]":
        """Starts to score the responses to one prompt; returns before it is done where functions do not run
        here.

        The future raises UserError, one line that names function and row, for a function that fails under
        on_error=fail.
        """
        ready = {
            part.name: [
                each for call in part.function.calls(completions) for each in part.function.scores(call)
            ]
            for part in self._parts
            if part.runs == "here"
        }
        if len(ready) < len(self._parts):
            return asyncio.run_coroutine_threadsafe(self._finish(completions, ready), self._running().loop)
        done: Future[Scores] = Future()
        try:
            done.set_result(self._combined(completions, ready))
        except UserError as error:
            done.set_exception(error)
        return done

    def score(self, completions: list[Completion]) -> Scores:
        """Returns the scores of the responses to one prompt. Raises as the future of `submit`."""
        return self.submit(completions).result()

    def close(self) -> None:
        """Ends worker processes, connections and the event loop. What is being scored is abandoned."""
        for owned in (each for part in self._parts for each in part.owned):
            if hasattr(owned, "close"):
                owned.close()
            elif self._loop is not None:
                asyncio.run_coroutine_threadsafe(owned.aclose(), self._loop.loop).result()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _running(self) -> "_Loop":
        # a fork of this process has no thread that runs the loop
        if self._loop is None or self._loop.owner != os.getpid():
            self._loop = _Loop(self._parts)
        return self._loop

    async def _finish(self, completions: list[Completion], ready: dict[str, list[Outcome]]) -> Scores:
        waiting = [part for part in self._parts if part.name not in ready]
        outcomes = await asyncio.gather(*(self._outcomes(part, completions) for part in waiting))
        return self._combined(
            completions, ready | {p.name: o for p, o in zip(waiting, outcomes, strict=True)}
        )

    async def _outcomes(self, part: Part, completions: list[Completion]) -> list[Outcome]:
        found = await asyncio.gather(*(self._called(part, call) for call in part.function.calls(completions)))
        return [each for outcomes in found for each in outcomes]

    async def _called(self, part: Part, call: tuple[Any, ...]) -> list[Outcome]:
        running = self._running()
        if part.runs == "in threads":
            return await running.loop.run_in_executor(running.threads[part.name], part.function.scores, call)
        async with running.slots[part.name]:
            return await part.function.awaited(call, part.timeout_s)

    def _combined(self, completions: list[Completion], found: dict[str, list[Outcome]]) -> Scores:
        """Adds up the parts' outcomes. Raises UserError for a failure under on_error=fail."""
        rewards, metrics, feedback, failed = [], [], [], []
        for place in range(len(completions)):
            score = self._sum(
                {part.name: found[part.name][place] for part in self._parts}, completions, place
            )
            failed.append(score is None)
            score = score or Score(0.0)
            rewards.append(score.reward)
            metrics.append(score.metrics)
            feedback.append(score.feedback)
        return Scores(np.array(rewards, np.float32), metrics, feedback, np.array(failed, bool))

    def _sum(self, outcomes: dict[str, Outcome], completions: list[Completion], place: int) -> Score | None:
        """Returns the score of a response; None if a function failed."""
        total, metrics, feedback = 0.0, {}, []
        for part in self._parts:
            outcome = outcomes[part.name]
            if isinstance(outcome, Failure):
                self._failed(part, outcome, completions[place].row, place)
                return None
            total += part.weight * outcome.reward
            metrics |= outcome.metrics
            if len(self._parts) > 1:
                metrics[part.label] = outcome.reward
            feedback.append(outcome.feedback)
        return Score(total, metrics, "\n".join(filter(None, feedback)))

    def _failed(self, part: Part, failure: Failure, row: int, place: int) -> None:
        line = f"reward.function={part.name}, response {place} to the prompt of row {row}: {failure.reason}"
        if not self._logged:
            self._logged = True
            # the traceback goes to the log of this rank: the other ranks and the command see one line
            then = (
                "" if self._on_error == "fail" else f"; reward.on_error={self._on_error}, counted from now on"
            )
            _log.error("%s%s\n%s", line, then, failure.traceback)
        if self._on_error == "fail":
            raise UserError(line) from failure.error


class _Loop:
    """An event loop that runs in a thread of its own, and the threads that it gives work to."""

    def __init__(self, parts: list[Part]) -> None:
        self.owner = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.slots = {part.name: asyncio.Semaphore(part.at_once) for part in parts}
        self.threads = {part.name: ThreadPoolExecutor(part.at_once, "rewards") for part in parts}
        # a daemon: an error that ends the run does not wait for it
        threading.Thread(target=self.loop.run_forever, name="rewards", daemon=True).start()

    def close(self) -> None:
        """Ends the loop; threads end with what they are doing."""
        for threads in self.threads.values():
            threads.shutdown(wait=False)
        self.loop.call_soon_threadsafe(self.loop.stop)
