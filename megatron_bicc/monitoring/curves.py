"""The curves of a panel: points of one or several runs, with what a legend and a table say of them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from megatron_bicc.monitoring.panels import DASHED, HISTOGRAM, SOLID, Panel
from megatron_bicc.monitoring.runs import Run

TABLE_ROWS = 15
T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    run: int
    run_name: str
    """Empty where there is only one run"""
    key: str
    line_name: str
    """Empty where the panel shows only one metric"""
    color: int
    dash: int
    x: list[float]
    y: list[float]
    """NaN where the value was not finite"""
    error: list[float] = field(default_factory=list)
    """Standard errors of y; empty where they were not recorded"""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.run_name, self.line_name)))


def panel_curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """A curve for every metric of the panel and run in which it was recorded.

    Runs differ in colour, and where there is only one metric in the kind of line too. A single run's metrics
    differ in colour, but for the quantiles of one quantity.
    """
    curves = []
    for i, run in enumerate(runs):
        for j, line in enumerate(panel.lines):
            if not run.values(line.key):
                continue
            x, y = run.series(line.key)
            color = j if len(runs) == 1 and not panel.band else i
            dash = i if len(panel.lines) == 1 else line.dash
            name = run.name if len(runs) > 1 else ""
            errors = dict(zip(*run.series(f"{line.key}_stderr"), strict=True))
            error = [errors.get(step, math.nan) for step in x] if errors else []
            curves.append(Curve(i, name, line.key, line.label, color, dash, list(map(float, x)), y, error))
    return curves


def histogram_curves(runs: Sequence[Run]) -> list[Curve]:
    """Share of groups by share of right rollouts, means over the first and the last quarter of each run."""
    curves = []
    for i, run in enumerate(runs):
        keys = {
            _right_share(key): key for record in run.records for key in record if key.startswith(HISTOGRAM)
        }
        steps = sorted({step for key in keys.values() for step in run.series(key)[0]})
        if not steps:
            continue
        quarter = max(1, len(steps) // 4)
        for label, chosen, dash in (("first", steps[:quarter], DASHED), ("last", steps[-quarter:], SOLID)):
            x = sorted(keys)
            y = [_mean_at(run, keys[share], set(chosen)) for share in x]
            name = run.name if len(runs) > 1 else ""
            curves.append(Curve(i, name, HISTOGRAM + "N_wrong_M", f"{label} quarter", i, dash, x, y))
    return curves


def _right_share(key: str) -> float:
    right, wrong = map(int, re.findall(r"\d+", key))
    return right / (right + wrong)


def _mean_at(run: Run, key: str, steps: set[int]) -> float:
    values = [value for step, value in zip(*run.series(key), strict=True) if step in steps]
    return float(np.mean(values)) if values else 0.0


def moving_average(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred mean over at most `window` finite neighbours; NaN where there is none."""
    half, array = window // 2, np.asarray(values, dtype=float)
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    return [float(np.nanmean(w)) if np.isfinite(w).any() else math.nan for w in windows]


def table(curves: Sequence[Curve], x_name: str) -> list[list[str]]:
    """The points as text, a header first; at most TABLE_ROWS values of x, evenly from end to end."""
    points = [_cells(curve) for curve in curves]
    xs = evenly(sorted({x for point in points for x in point}), TABLE_ROWS)
    header = [x_name, *(f"{curve.label} ({curve.key})" if curve.label else curve.key for curve in curves)]
    return [header, *([f"{x:g}", *(point.get(x, "–") for point in points)] for x in xs)]


def _cells(curve: Curve) -> dict[float, str]:
    errors = [f" ± {number(error)}" for error in curve.error] or [""] * len(curve.x)
    return {x: number(y) + error for x, y, error in zip(curve.x, curve.y, errors, strict=True)}


def describe(curves: Sequence[Curve]) -> str:
    """The chart in words, for who does not see it."""
    return ". ".join(filter(None, map(_describe, curves))) + "."


def _describe(curve: Curve) -> str:
    finite = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    (first, start), (last, end) = finite[0], finite[-1]
    return (
        f"{curve.label or curve.key}: from {number(start)} at {first:g} to {number(end)} at {last:g}, "
        f"between {number(low)} and {number(high)}"
    )


def number(value: float) -> str:
    """Four significant digits; a dash for no value."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly from end to end."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
