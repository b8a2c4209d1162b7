"""The edges of the clip interval, in the logarithm of the ratio."""

import math
from dataclasses import dataclass

from megatron_bicc.config import LossConfig


@dataclass(frozen=True)
class ClipBounds:
    """Edges of the log ratio; the ratio at an edge is not clipped."""

    low: float
    """Below it a token of negative advantage is clipped; -inf: never."""
    high: float
    """Above it a token of positive advantage is clipped."""
    dual: float
    """Above it a token of negative advantage is clipped by the dual clip; inf: never."""


def clip_bounds(loss: LossConfig) -> ClipBounds:
    """Edges that a resolved LossConfig means; ValueError if it still holds a None."""
    for name in ("objective", "clip_low", "clip_high", "dual_clip"):
        if getattr(loss, name) is None:
            raise ValueError(f"loss.{name} is not set; fill it in with algorithms.presets.resolve")
    dual = math.log(loss.dual_clip) if loss.dual_clip else math.inf
    if loss.objective == "geometric":
        return ClipBounds(-loss.clip_low, loss.clip_high, dual)
    low = math.log1p(-loss.clip_low) if loss.clip_low < 1.0 else -math.inf
    return ClipBounds(low, math.log1p(loss.clip_high), dual)
