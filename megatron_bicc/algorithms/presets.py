"""Named algorithms: presets of advantage, ratio and clip, aggregation, sampling and reward shaping."""

from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import product
from types import MappingProxyType
from typing import TypeVar

from megatron_bicc.algorithms.corrections import CORRECTIONS
from megatron_bicc.config import (
    Advantage,
    Aggregation,
    Config,
    KlEstimator,
    LossConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_bicc.errors import UserError

BICC_DUAL_CLIP = 3.0
Section = TypeVar("Section", LossConfig, RolloutConfig, RewardConfig)
ALIASES = MappingProxyType({"bicc": "grpo+bicc+rcc"})

KL_ESTIMATORS: MappingProxyType[str, KlEstimator] = MappingProxyType({"loss": "k2", "reward": "k1"})
"""The estimator whose expected gradient is that of KL(pi || pi_ref), by loss.kl_in (policy_loss)."""


@dataclass(frozen=True)
class Preset:
    """Values of an algorithm's settings, named as in LossConfig, RolloutConfig and RewardConfig."""

    advantage: Advantage
    objective: str
    clip_low: float
    clip_high: float
    aggregation: Aggregation
    dual_clip: float = 0.0
    dynamic_sampling: bool = False
    overlong_penalty: float = 0.0


PRESETS = MappingProxyType(
    {
        "grpo": Preset("normalized", "token", 0.2, 0.2, "sequence_mean"),  # arXiv 2402.03300
        "dr_grpo": Preset("centered", "token", 0.2, 0.2, "constant"),  # arXiv 2503.20783
        "dapo": Preset(  # arXiv 2503.14476
            "normalized", "token", 0.2, 0.28, "token_mean", dynamic_sampling=True, overlong_penalty=1.0
        ),
        "gspo": Preset("normalized", "sequence", 3e-4, 4e-4, "sequence_mean"),  # arXiv 2507.18071
        "gmpo": Preset("normalized", "geometric", 0.4, 0.4, "sequence_mean"),  # arXiv 2507.20673
        "aspo": Preset("normalized", "aspo", 0.2, 0.2, "token_mean", dual_clip=3.0),  # arXiv 2510.06062
        "cispo": Preset("normalized", "cispo", 1.0, 4.0, "token_mean"),  # arXiv 2506.13585
    }
)
"""The table of docs/algorithms.md."""


def parse_algorithm(name: str) -> tuple[str, bool, bool]:
    """Splits an algorithm's name such as "dapo+bicc" into (preset, bicc, rcc); "bicc" is "grpo+bicc+rcc".

    Raises UserError, with the nearest name, for an unknown one.
    """
    base, *additions = ALIASES.get(name, name).split("+")
    known = base in PRESETS and set(additions) <= {"bicc", "rcc"} and len(set(additions)) == len(additions)
    if not known:
        names = [*ALIASES, *("".join(parts) for parts in product(PRESETS, ("", "+bicc"), ("", "+rcc")))]
        nearest = max(names, key=lambda known_name: SequenceMatcher(None, name, known_name).ratio())
        raise UserError(
            f"algorithm is {name!r}; did you mean {nearest}? "
            f"(One of {', '.join(PRESETS)}, with +bicc, +rcc or both; or bicc.)"
        )
    return base, "bicc" in additions, "rcc" in additions


def resolve(config: Config) -> Config:
    """Returns a copy of config with every None filled in: from the preset; loss.kl_estimator by loss.kl_in;
    the bounds of loss.correction, which "none" does not have.

    Explicit values take precedence. With BICC the default of loss.dual_clip is 3. Raises UserError for an
    unknown algorithm.
    """
    base, bicc, rcc = parse_algorithm(config.algorithm)
    bicc = bicc if config.bicc.enabled is None else config.bicc.enabled
    rcc = rcc if config.rcc.enabled is None else config.rcc.enabled
    preset = replace(PRESETS[base], dual_clip=BICC_DUAL_CLIP) if bicc else PRESETS[base]
    loss = _filled(config.loss, preset)
    if loss.kl_estimator is None:
        loss = replace(loss, kl_estimator=KL_ESTIMATORS[loss.kl_in])
    if loss.correction in CORRECTIONS:
        low, high = CORRECTIONS[loss.correction].low, CORRECTIONS[loss.correction].high
        loss = replace(
            loss,
            correction_low=low if loss.correction_low is None else loss.correction_low,
            correction_high=high if loss.correction_high is None else loss.correction_high,
        )
    return replace(
        config,
        loss=loss,
        rollout=_filled(config.rollout, preset),
        reward=_filled(config.reward, preset),
        bicc=replace(config.bicc, enabled=bicc),
        rcc=replace(config.rcc, enabled=rcc),
    )


def kl_warning(loss: LossConfig) -> str | None:
    """Returns one line if a resolved loss.kl_estimator does not have the KL's gradient, else None."""
    exact = KL_ESTIMATORS[loss.kl_in]
    if not loss.kl_coefficient or loss.kl_estimator == exact:
        return None
    found = "KL(ref || policy), the other direction" if loss.kl_in == "loss" else "no KL"
    return (
        f"loss.kl_estimator is {loss.kl_estimator} with loss.kl_in={loss.kl_in}; its expected gradient is "
        f"that of {found}: {exact} has that of KL(policy || ref)"
    )


def _filled(section: Section, preset: Preset) -> Section:
    """Returns the section with the preset's values in place of None."""
    names = {f.name for f in fields(preset)} & {f.name for f in fields(section)}
    missing = [name for name in names if getattr(section, name) is None]
    return replace(section, **{name: getattr(preset, name) for name in missing})
