"""A limit on the processor time of a computation."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The computation used up its time; no Exception, so that libraries do not swallow it."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body once the process has used so many seconds of processor time.

    Processor time and not the clock, so that a busy machine does not turn right answers into wrong ones.
    By SIGPROF: raises ValueError outside a main thread.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
