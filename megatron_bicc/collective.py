"""Two exchanges between all ranks: gather small Python objects, and raise one rank's error on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the value of every rank of the group, in rank order; None: all ranks. Collective.

    value: anything that can be pickled.
    """
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raised_on_all_ranks(*kinds: type[Exception], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Runs the block on every rank; if it raises one of `kinds` on any, every rank raises. Collective.

    Without this, one rank would leave with its error while the others wait for it in their next collective.
    The failing rank raises its own error, with its traceback; the others raise the first failing rank's type
    with the same text. `kinds` must be constructible from one string. An exception of any other type is
    a fault of the program: it leaves the block at once, and the launcher ends the job.
    """
    own: Exception | None = None
    try:
        yield
    except kinds as error:
        own = error
    found = gathered(None if own is None else (type(own), str(own)), group)
    if own is not None:
        raise own
    for kind, text in filter(None, found):
        raise kind(text)
