"""Quantisation: always off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    """Says that no context of quantised layers is open."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Does nothing; raises NotImplementedError where quantised layers are asked for."""
    if enabled:
        raise NotImplementedError("the stand-in for Transformer Engine has no quantised layers")
    yield
