"""Named algorithms: each is a choice of advantage, ratio-and-clip, aggregation, sampling and shaping."""

from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import product
from types import MappingProxyType
from typing import Literal, TypeVar

from megatron_bicc.config import Config, LossConfig, RewardConfig, RolloutConfig
from megatron_bicc.errors import UserError

BICC_DUAL_CLIP = 3.0
Section = TypeVar("Section", LossConfig, RolloutConfig, RewardConfig)
ALIASES = MappingProxyType({"bicc": "grpo+bicc+rcc"})

KL_ESTIMATORS = MappingProxyType({"loss": "k2", "reward": "k1"})
"""The estimator whose expected gradient is that of KL(pi || pi_ref), by loss.kl_in (algorithms.kl)."""


@dataclass(frozen=True)
class Preset:
    """What an algorithm sets; names and meanings are those of LossConfig, RolloutConfig and RewardConfig."""

    advantage: Literal["normalized", "centered"]
    objective: Literal["token", "sequence", "geometric", "aspo", "cispo"]
    clip_low: float
    clip_high: float
    aggregation: Literal["sequence_mean", "constant", "token_mean"]
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
    """(preset, bicc, rcc) of an algorithm's name such as "dapo+bicc"; "bicc" is "grpo+bicc+rcc".

    Raises UserError with the nearest known name.
    """
    base, *additions = ALIASES.get(name, name).split("+")
    known = base in PRESETS and set(additions) <= {"bicc", "rcc"} and len(set(additions)) == len(additions)
    if not known:
        names = [*ALIASES, *("".join(parts) for parts in product(PRESETS, ("", "+bicc"), ("", "+rcc")))]
        nearest = max(names, key=lambda known_name: SequenceMatcher(None, name, known_name).ratio())
        raise UserError(
            f"algorithm: unknown name '{name}'; the nearest is '{nearest}' "
            f"(one of {', '.join(PRESETS)}, with +bicc, +rcc or both; or bicc)"
        )
    return base, "bicc" in additions, "rcc" in additions


def resolve(config: Config) -> Config:
    """A copy of config in which every None comes from the preset, and loss.kl_estimator from loss.kl_in.

    Explicit values win. Where BICC ends up enabled, a dual clip that nobody set is 3. Raises UserError for
    an unknown algorithm and for a loss setting out of its range.
    """
    base, bicc, rcc = parse_algorithm(config.algorithm)
    bicc = bicc if config.bicc.enabled is None else config.bicc.enabled
    rcc = rcc if config.rcc.enabled is None else config.rcc.enabled
    preset = replace(PRESETS[base], dual_clip=BICC_DUAL_CLIP) if bicc else PRESETS[base]
    loss = _filled(config.loss, preset)
    if loss.kl_estimator is None:
        loss = replace(loss, kl_estimator=KL_ESTIMATORS[loss.kl_in])
    _check_ranges(loss)
    return replace(
        config,
        loss=loss,
        rollout=_filled(config.rollout, preset),
        reward=_filled(config.reward, preset),
        bicc=replace(config.bicc, enabled=bicc),
        rcc=replace(config.rcc, enabled=rcc),
    )


def kl_warning(loss: LossConfig) -> str | None:
    """What a user should know of a resolved choice of KL estimator, in one line; None: nothing."""
    exact = KL_ESTIMATORS[loss.kl_in]
    if not loss.kl_coefficient or loss.kl_estimator == exact:
        return None
    found = "KL(ref || policy), the other direction" if loss.kl_in == "loss" else "no KL"
    return (
        f"loss.kl_estimator is {loss.kl_estimator} with loss.kl_in={loss.kl_in}; its expected gradient is "
        f"that of {found}: {exact} has that of KL(policy || ref)"
    )


def _filled(section: Section, preset: Preset) -> Section:
    """The section with the preset's values where it holds None."""
    names = {f.name for f in fields(preset)} & {f.name for f in fields(section)}
    missing = [name for name in names if getattr(section, name) is None]
    return replace(section, **{name: getattr(preset, name) for name in missing})


def _check_ranges(loss: LossConfig) -> None:
    for name in ("clip_low", "clip_high", "kl_coefficient", "entropy_coefficient", "tis_cap"):
        if not getattr(loss, name) >= 0:
            raise UserError(f"loss.{name} is {getattr(loss, name)}; it must be at least 0")
    if loss.kl_coefficient and (loss.kl_in, loss.kl_estimator) == ("loss", "k1"):
        raise UserError(
            "loss.kl_estimator is k1 with loss.kl_in=loss; its expected gradient is 0, whatever the "
            "reference: use k2, or loss.kl_in=reward"
        )
    if loss.objective != "geometric" and loss.clip_low > 1:
        raise UserError(
            f"loss.clip_low is {loss.clip_low}; it must be within 0 and 1: "
            "ratios are clipped at 1 - clip_low, and none is below 0"
        )
    if loss.dual_clip != 0 and not loss.dual_clip > 1:
        raise UserError(f"loss.dual_clip is {loss.dual_clip}; it must be greater than 1, or 0 for off")
