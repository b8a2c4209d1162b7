"""Collective operations: gather objects, sum tensors, raise one rank's error on all, write one directory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bicc.errors import UserError
from megatron_bicc.files import atomic_directory, os_error_named, partial_name

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the value of every rank of the group, in rank order; None: all ranks. Collective.

    value: anything that can be pickled.
    """
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class SumOverRanks(torch.autograd.Function):
    """(values, group) -> their sum over the ranks of the group. Collective, forward and backward.

    For a loss that is the sum of all ranks' losses: each of them depends on the sum, so a rank's values get
    the gradients of all ranks, added up.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@contextmanager
def raised_on_all_ranks(*kinds: type[Exception], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Runs the block on every rank; if it raises one of `kinds` on any, every rank raises. Collective.

    Without this, the failing rank would leave while the others wait for it in their next collective.
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


@contextmanager
def shared_atomic_directory(target: Path) -> Iterator[Path]:
    """Yields `files.atomic_directory` to all ranks; rank 0 makes it and renames it at the end. Collective.

    Raises UserError on every rank if `target` exists or cannot be made. An exception of the block leaves it
    at once on the rank that raised it; rank 0 removes the directory, or the next call does.
    """
    with ExitStack() as stack:
        with raised_on_all_ranks(UserError):
            is_first = dist.get_rank() == 0
            partial = stack.enter_context(atomic_directory(target)) if is_first else partial_name(target)
        with os_error_named(target):
            yield partial
        dist.barrier()  # rank 0 must not rename it while another rank writes
    dist.barrier()  # no rank continues before `target` exists
