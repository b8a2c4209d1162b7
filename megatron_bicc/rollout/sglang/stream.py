"""Groups of samples on their way: asked for by the trainer's thread, awaited in the event loop."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.from_thread import BlockingPortal

from megatron_bicc.rollout.types import Request, Sample

SampleGroup = Callable[[list[Request]], Awaitable[list[Sample]]]


class GroupStream:
    """rollout.types.Stream over an event loop that runs in another thread."""

    def __init__(
        self, portal: BlockingPortal, tasks: TaskGroup, sample: SampleGroup, most_samples: int
    ) -> None:
        """most_samples: those worked on at a time; a group waits until it fits."""
        self._portal, self._tasks, self._sample, self._most = portal, tasks, sample, most_samples
        self._slots: anyio.Semaphore | None = None
        self._finished: SimpleQueue[tuple[int, list[Sample] | Exception]] = SimpleQueue()
        self._outstanding = 0

    def ask(self, key: int, requests: list[Request]) -> None:
        """Asks for the samples of one prompt; `next` gives them under this key. Does not wait."""
        if self._slots is None:
            self._slots = anyio.Semaphore(max(1, self._most // len(requests)))
        self._outstanding += 1
        self._portal.call(self._start, key, requests)

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """The key and the samples of a group that is finished; None if none is within so many seconds.

        seconds: None waits for as long as it takes. Raises RolloutError for a group that cannot be had.
        """
        try:
            key, outcome = self._finished.get(timeout=seconds)
        except Empty:
            return None
        self._outstanding -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return key, outcome

    def outstanding(self) -> int:
        """Groups asked for that `next` has not given."""
        return self._outstanding

    def _start(self, key: int, requests: list[Request]) -> None:
        # gives nothing back: the portal would await a task
        self._tasks.start_soon(self._run, key, requests)

    async def _run(self, key: int, requests: list[Request]) -> None:
        outcome: list[Sample] | Exception
        async with self._slots:
            try:
                outcome = await self._sample(requests)
            except Exception as error:  # for the thread that asked
                outcome = error
        self._finished.put((key, outcome))


@contextmanager
def group_stream(portal: BlockingPortal, sample: SampleGroup, most_samples: int) -> Iterator[GroupStream]:
    """A stream. What is not finished when the context ends is cancelled, and has ended when it is left."""
    ended, tasks = portal.start_task(_task_group)
    try:
        yield GroupStream(portal, tasks, sample, most_samples)
    finally:
        portal.call(tasks.cancel_scope.cancel)
        ended.result()


async def _task_group(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with anyio.create_task_group() as tasks:
        task_status.started(tasks)
        await anyio.sleep_forever()
