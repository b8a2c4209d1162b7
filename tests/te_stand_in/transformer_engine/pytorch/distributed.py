"""Names that megatron-core imports for recomputation of quantised layers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class activation_recompute_forward(AbstractContextManager):
    """Does nothing: without quantisation nothing differs between the two forward passes."""

    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        super().__init__()

    def __exit__(self, *exc_details: Any) -> None:
        pass


class CudaRNGStatesTracker:
    """megatron-core derives a class from it; the tracker that it uses by default is its own."""


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Not in this stand-in: megatron-core calls it for quantised layers only."""
    raise NotImplementedError


def is_fp8_activation_recompute_enabled() -> bool:
    """Returns False: nothing is quantised."""
    return False
