"""Kernels over lists of tensors, one tensor after another."""

from typing import Any

import torch
from torch import Tensor


class MultiTensorApply:
    """Calls such a kernel, without empty tensors."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self, op: Any, noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
    ) -> Any:
        """Returns None without a call if the first list has no element."""
        kept = [place for place, tensor in enumerate(tensor_lists[0]) if tensor.numel()]
        if not kept:
            return None
        lists = [[tensors[place] for place in kept] for tensors in tensor_lists]
        return op(self.chunk_size, noop_flag_buffer, lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (norm of all elements, float32 [1]; norms of the tensors, or nothing)."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm()[None], norms if per_tensor else norms[:0]


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Writes the first list's tensors, times `scale`, into the second's."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
