"""Computes confidence intervals over seeds, and paired tests of one arm against another."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_bicc.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval by Student's t."""

    mean: float
    half_width: float

    @property
    def text(self) -> str:
        """The interval, with two significant digits of the half width."""
        digits = 3 if self.half_width == 0 else max(0, 1 - math.floor(math.log10(self.half_width)))
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


@dataclass(frozen=True)
class Paired:
    """The difference between two arms over their common seeds."""

    difference: Interval
    p_t: float
    """Two-sided paired t test"""
    p_permutation: float
    """Two-sided exact test by flipping the signs of the differences: at least 2 / 2^n"""
    seeds: int

    @property
    def text(self) -> str:
        p = "< 0.001" if self.p_t < 0.001 else f"{self.p_t:.3f}"
        return f"{self.difference.text}, p {p} ({self.p_permutation:.3f}): {self.verdict}"

    @property
    def verdict(self) -> str:
        """The result of the t test at 5 %."""
        if not self.p_t < 0.05:
            return "no difference shown"
        return "higher" if self.difference.mean > 0 else "lower"


def interval(values: list[float]) -> Interval:
    """Returns the interval of at least two finite values."""
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return Interval(float(np.mean(values)), float(spread))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Paired:
    """Tests ours minus theirs, by seed. Raises UserError if they share fewer than two seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        raise UserError(f"{len(seeds)} seeds in common; a paired test needs at least two")
    difference = np.array([ours[seed] - theirs[seed] for seed in seeds])
    if not difference.any():
        return Paired(Interval(0.0, 0.0), 1.0, 1.0, len(seeds))
    flipped = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf)
    p_t = float(stats.ttest_1samp(difference, 0.0).pvalue)
    return Paired(interval(list(difference)), p_t, float(flipped.pvalue), len(seeds))
