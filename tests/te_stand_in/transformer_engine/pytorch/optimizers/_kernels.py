"""What Transformer Engine has in C++."""

import torch
from torch import Tensor


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
