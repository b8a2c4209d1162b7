"""Small objects of all processes, on all of them."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every process of the group, by its rank there; None: all processes. Collective.

    value: anything that can be pickled.
    """
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
