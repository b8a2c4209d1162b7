"""Makes a scorer of one function, for tests that need rewards and no settings."""

from collections.abc import Callable
from typing import Any

from megatron_bicc.config import OnError
from megatron_bicc.rewards.functions import Function
from megatron_bicc.rewards.scorer import Part, Scorer


def scorer_of(function: Callable[..., Any], on_error: OnError = "fail") -> Scorer:
    """A plain function, with parameters as reward.function has them."""
    return Scorer([Part("test", Function.of("test", function))], on_error)
