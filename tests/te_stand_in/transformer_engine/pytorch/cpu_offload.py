"""Offload of activations to the host: only the context that does nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
    manual_synchronization: bool = False,
    retain_pinned_cpu_buffers: bool = False,
    offload_stream: Any = None,
) -> tuple[AbstractContextManager, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns (context of a layer's forward pass, function of its output); neither moves anything."""
    if enabled:
        raise NotImplementedError("the stand-in for Transformer Engine does not offload activations")
    return nullcontext(), lambda tensor: tensor
