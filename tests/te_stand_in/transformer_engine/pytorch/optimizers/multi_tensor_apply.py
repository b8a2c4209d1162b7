"""Kernels over lists of tensors, one tensor after another."""

from typing import Any

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
