"""RMSNorm as a layer of its own."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import _ExtraState


class RMSNorm(_ExtraState):
    """Norm over the last axis; its weight tells megatron-core whether sequence parallel cuts its input."""

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`hidden_size` and `params_dtype` are former names of `normalized_shape` and `dtype`.

        kwargs: device, dtype.
        """
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        size = hidden_size if normalized_shape is None else normalized_shape
        dtype = kwargs.pop("dtype", params_dtype)
        self.weight = torch.nn.Parameter(torch.ones(size, device=kwargs.pop("device", "cuda"), dtype=dtype))
        self.weight.sequence_parallel = sequence_parallel
        if kwargs:
            raise TypeError(f"RMSNorm has no arguments {sorted(kwargs)}")

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.rms_norm(input, weight.shape, weight, self.eps)
