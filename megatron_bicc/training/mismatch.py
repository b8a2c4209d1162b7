"""Whether rollout engine and policy compute one model, by the log-probs of what the engine sampled.

Before a step's first update the policy has the weights that the engine sampled with, so only rounding may
differ. kl/rollout_old is the mean over tokens of k3 = pi / mu - 1 - log(pi / mu), with mu the engine's and pi
the policy's probability of a token.

Shape suffixes: T tokens of all responses of a step.
"""

import logging
from dataclasses import dataclass

import numpy as np

from megatron_bicc import platform
from megatron_bicc.algorithms.statistics import engine_statistics
from megatron_bicc.config import Config
from megatron_bicc.training.weighing import TokenLogProbs

logger = logging.getLogger(__name__)


class EngineMismatch(RuntimeError):
    """Engine and policy compute different models; the message is one line."""


@dataclass(frozen=True)
class Bounds:
    """What rounding explains at temperature 1; kl/rollout_old grows as the square of the differences."""

    warn: float
    """Of kl/rollout_old: more is far over what rounding makes"""
    stop: float
    """Of kl/rollout_old: more is impossible for rounding, unless single tokens make it"""
    weight: float
    """Of pi / mu and its inverse: where over 1 % of the tokens are beyond, it is not single ones"""


FP32 = Bounds(warn=1e-5, stop=1e-2, weight=1.1)
"""Differences of 1e-4 (weight_sync.probe), of which kl/rollout_old is 5e-9, are already large"""
BITS_16 = Bounds(warn=1e-2, stop=0.5, weight=2.0)
"""Healthy is 1e-3; 24 random layers reached differences of 0.2 (docs/weight_sync.md), about 1e-2"""
BITS_16_EXPERTS = Bounds(warn=0.1, stop=0.5, weight=2.0)
"""Rounding makes a router choose another expert for a token now and then: differences up to 1.33 were seen"""


def bounds_of(config: Config, experts: bool) -> Bounds:
    """Those of the coarser of the policy's and the engine's types, at the sampling temperature."""
    rollout = config.rollout
    coarse = any(word in rollout.sglang.server_args for word in ("quant", "kv-cache-dtype"))
    # of an attached server the type is not known
    known = rollout.engine == "local" or (rollout.launch == "spawn" and not coarse)
    plain = BITS_16_EXPERTS if experts else BITS_16
    bounds = FP32 if config.model.dtype == "float32" and known else plain
    # errors of logits are divided by the temperature
    scale = max(1.0, 1.0 / rollout.temperature)
    return Bounds(bounds.warn * scale**2, bounds.stop * scale**2, bounds.weight**scale)


class MismatchCheck:
    """Looks at each step of a run; keeps whether it has warned."""

    def __init__(self, config: Config, experts: bool) -> None:
        """experts: whether the policy has any."""
        self.bounds = bounds_of(config, experts)
        self.dtype = config.model.dtype
        self._first = True
        self._over = False

    def step(self, step: int, log_probs: list[TokenLogProbs]) -> None:
        """Looks at a step before its first update; the same on every process.

        log_probs: of rollouts that the engine sampled with the policy's present weights. Warns in one line,
        on the first process, where kl/rollout_old is over the bound and was not at the step before. Raises
        EngineMismatch at the first step that is looked at, where rounding cannot make it.
        """
        if not log_probs:
            return
        old_T, rollout_T = (
            np.concatenate([getattr(x, n) for x in log_probs]) for n in ("old_T", "rollout_T")
        )
        found, bounds = engine_statistics(old_T, rollout_T), self.bounds
        kl, largest = found["kl/rollout_old"], found["tis/max"]
        first, was_over, self._first, self._over = self._first, self._over, False, kl > bounds.warn
        line = (
            f"step {step}: rollout engine and policy differ: kl/rollout_old is {kl:.2g} where {self.dtype} "
            f"makes less than {bounds.warn:.2g}, the largest weight policy / engine is {largest:.3g}"
        )
        many = found["tis/q99"] > bounds.weight or found["tis/q01"] < 1 / bounds.weight
        if first and many and kl > bounds.stop:
            raise EngineMismatch(
                f"{line}; they compute different models: compare config.json and the servers' arguments "
                "with docs/policy.md"
            )
        if self._over and not was_over and platform.is_first():
            logger.warning("%s (docs/scaling.md)", line)
