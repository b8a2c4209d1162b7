"""Small objects of all processes, on all of them."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's value, in rank order; of the default group, or of another. Collective. Pickles."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
