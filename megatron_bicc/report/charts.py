"""Draws the charts of one or several runs with matplotlib: inline SVG for the report, PNG for other pages.

A chart is a set of curves; its legend, table of values and alt text are derived from them.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from megatron_bicc.errors import UserError
from megatron_bicc.report.panels import DASHED, HISTOGRAM, SOLID, STAGES, Line, Panel
from megatron_bicc.report.runs import Run

TABLE_ROWS = 15
T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    run: int
    run_name: str
    """Empty if there is only one run"""
    key: str
    line_name: str
    """Empty if the panel shows only one metric"""
    color: int
    dash: int
    x: list[float]
    y: list[float]
    """NaN if the value was not finite"""
    error: list[float] = field(default_factory=list)
    """Standard errors of y; empty if they were not recorded"""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.run_name, self.line_name)))


def panel_curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """Returns a curve for each metric of the panel and run that recorded it.

    Several runs differ in colour and, if the panel has only one metric, in line style too. The metrics of a
    single run differ in colour, except the quantiles of one quantity.
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
    """Returns shares of groups by share of right rollouts, means over each run's first and last quarter."""
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
    """Returns the centred mean over at most `window` finite neighbours; NaN if there is none."""
    half, array = window // 2, np.asarray(values, dtype=float)
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    return [float(np.nanmean(w)) if np.isfinite(w).any() else math.nan for w in windows]


def value_table(curves: Sequence[Curve], x_name: str) -> list[list[str]]:
    """Returns the points as a table of text, a header first; at most TABLE_ROWS evenly spaced rows."""
    points = [_cells(curve) for curve in curves]
    xs = evenly(sorted({x for point in points for x in point}), TABLE_ROWS)
    header = [x_name, *(f"{curve.label} ({curve.key})" if curve.label else curve.key for curve in curves)]
    return [header, *([f"{x:g}", *(point.get(x, "–") for point in points)] for x in xs)]


def _cells(curve: Curve) -> dict[float, str]:
    errors = [f" ± {number(error)}" for error in curve.error] or [""] * len(curve.x)
    return {x: number(y) + error for x, y, error in zip(curve.x, curve.y, errors, strict=True)}


def describe(curves: Sequence[Curve]) -> str:
    """Returns the alt text of a chart."""
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
    """Formats a number with four significant digits; a dash for no value."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


# On the page, colour i is replaced by the property --run-i of report.css, which has a dark variant.
COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#57534e", "#a21caf")
GRID, INK = "#e7e5e4", "#000000"
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# The same as SVG's stroke-dasharray, for the legend.
DASH_ARRAYS = ("", "5 2", "1 1.5", "6 2 1 2")
SVG_TYPE = {"svg.fonttype": "none", "font.size": 11.5, "path.simplify_threshold": 0.3}


@dataclass(frozen=True)
class Entry:
    """An entry of a legend."""

    label: str
    color: str
    """As CSS"""
    dash_array: str


@dataclass(frozen=True)
class Drawing:
    """A chart with everything that the page shows about it."""

    title: str
    caption: str
    svg: Markup
    legend: list[Entry]
    table: list[list[str]]
    description: str


def draw_panel(panel: Panel, runs: Sequence[Run]) -> Drawing | None:
    """Draws a panel for all runs; returns None if no metric of it was recorded."""
    curves = panel_curves(panel, runs)
    if not curves:
        return None
    table = value_table(curves, "step")
    return _drawing(panel.title, panel.caption, curves, table, lambda axes: plot(axes, panel, curves))


def draw_histogram(runs: Sequence[Run]) -> Drawing | None:
    """Draws groups by their share of right rollouts, early and late; returns None if it was not recorded."""
    curves = histogram_curves(runs)
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(curve.x, curve.y, **_style(curve), marker="o", markersize=3.5)
        axes.set_ylim(bottom=0)
        _finish(axes, "right rollouts / all rollouts of a group")

    table = value_table(curves, "right / all")
    caption = (
        "Distribution of groups by share of right rollouts, in the first and the last quarter of the steps."
    )
    return _drawing("Right and wrong in a group", caption, curves, table, draw)


def draw_stages(runs: Sequence[Run]) -> Drawing | None:
    """Draws the mean seconds per step by stage, one bar per run; returns None if none was recorded."""
    means = [[_mean(run.values(f"time/{stage}_s")) for stage in STAGES] for run in runs]
    if not any(map(any, means)):
        return None

    def draw(axes: Axes) -> None:
        for j in range(len(STAGES)):
            left, width = [sum(row[:j]) for row in means], [row[j] for row in means]
            axes.barh(range(len(runs)), width, left=left, color=COLORS[j % len(COLORS)], height=0.6)
        axes.set_yticks(range(len(runs)), [str(i + 1) for i in range(len(runs))])
        axes.set_ylim(len(runs) - 0.4, -0.6)
        _finish(axes, "seconds")

    keys = [f"time/{stage}_s" for stage in STAGES]
    table = [
        ["run", *keys],
        *([r.name, *map(number, row)] for r, row in zip(runs, means, strict=True)),
    ]
    words = [
        f"{run.name}: " + ", ".join(f"{s} {number(v)}" for s, v in zip(STAGES, row, strict=True))
        for run, row in zip(runs, means, strict=True)
    ]
    caption = "Mean seconds of each stage, over the steps that have it" + (
        "; one bar per run, in order." if len(runs) > 1 else "."
    )
    legend = [Entry(stage, f"var(--run-{i})", "") for i, stage in enumerate(STAGES)]
    return Drawing("Where the time goes", caption, _svg(draw, caption), legend, table, ". ".join(words) + ".")


def plot(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    """Draws the curves of a panel."""
    for curve in curves:
        style, values = _style(curve), curve.y
        marker = "o" if len(curve.x) < 12 or curve.key.startswith("eval/") else None
        if panel.smooth and len(curve.x) >= 20:
            axes.plot(curve.x, values, color=style["color"], alpha=0.25, linewidth=1)
            values = moving_average(values)
        axes.plot(curve.x, values, **style, marker=marker, markersize=3.5, label=curve.label)
        if curve.error:
            low, high = np.subtract(curve.y, curve.error), np.add(curve.y, curve.error)
            axes.fill_between(curve.x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    if panel.band:
        _fill(axes, panel.band, curves)
    if panel.log and _spans_a_decade(curves):
        axes.set_yscale("log")
    if panel.zero:
        axes.set_ylim(bottom=0)
    _finish(axes, "step")


def save_png(runs: Sequence[Run], path: str) -> None:
    """Writes reward and pass@1 as a PNG, for pages without SVG.

    Raises UserError, with the run, if a run recorded neither.
    """
    panels = (
        Panel("mean reward of the rollouts", "", (Line("reward/mean"),), smooth=True),
        Panel("pass@1 on held-out prompts", "", (Line("eval/pass_at_1"),)),
    )
    for run in runs:
        if not any(run.values(panel.lines[0].key) for panel in panels):
            raise UserError(f"{run.name}: neither reward/mean nor eval/pass_at_1 was recorded")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), panels, strict=True):
        curves = panel_curves(panel, runs)
        plot(axes, panel, curves)
        # the legend is above the axes, and the title above the legend
        axes.set_title(panel.title, fontsize=11, pad=22)
        _legend(axes, [runs[curve.run].name for curve in curves])
    figure.savefig(path, dpi=150)


def _legend(axes: Axes, names: Sequence[str]) -> None:
    lines = [line for line in axes.lines if line.get_alpha() is None]
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "borderaxespad": 0.2}
    legend = axes.legend(lines, names, frameon=False, fontsize=9, handlelength=1.8, **above)
    for text in legend.get_texts():
        # a run's name is that of its directory and may contain $
        text.set_parse_math(False)


def _drawing(
    title: str,
    caption: str,
    curves: Sequence[Curve],
    table: list[list[str]],
    draw: Callable[[Axes], None],
) -> Drawing:
    return Drawing(title, caption, _svg(draw, title), _legend_of(curves), table, describe(curves))


def _legend_of(curves: Sequence[Curve]) -> list[Entry]:
    """Returns one entry per curve; with several runs and metrics, one per run and one per metric."""
    runs, lines = dict.fromkeys(c.run_name for c in curves), dict.fromkeys(c.line_name for c in curves)
    if len(runs) == 1 or len(lines) == 1:
        return [Entry(c.label, _color(c), _dash(c)) for c in curves if c.label]
    first = {name: next(c for c in curves if c.run_name == name) for name in runs}
    kinds = {name: next(c for c in curves if c.line_name == name) for name in lines}
    return [
        *(Entry(name, _color(curve), "") for name, curve in first.items()),
        *(Entry(name, "currentColor", _dash(curve)) for name, curve in kinds.items()),
    ]


def _color(curve: Curve) -> str:
    return f"var(--run-{curve.color % len(COLORS)})"


def _dash(curve: Curve) -> str:
    return DASH_ARRAYS[curve.dash % len(DASH_ARRAYS)]


def _svg(draw: Callable[[Axes], None], salt: str) -> Markup:
    """Returns the chart as an SVG element without a fixed size. salt: makes its ids unique on the page."""
    with mpl.rc_context(SVG_TYPE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(5.0, 2.9))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.18, 0.17, 0.8, 0.75))
        draw(axes)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    return Markup(_for_page(text[text.index("<svg") :]))


def _for_page(svg: str) -> str:
    """Removes sizes and repeated ids, and replaces colours by properties of the page's style sheet."""
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    # within tags only, so that axis labels keep their digits
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--run-{i})")
    return svg.replace(GRID, "var(--line)").replace(INK, "currentColor")


def _style(curve: Curve) -> dict:
    return {
        "color": COLORS[curve.color % len(COLORS)],
        "linestyle": DASHES[curve.dash % len(DASHES)],
        "linewidth": 1.7,
    }


def _fill(axes: Axes, band: tuple[str, str], curves: Sequence[Curve]) -> None:
    edges = {(curve.run, curve.key): curve for curve in curves}
    for run in {curve.run for curve in curves}:
        low, high = (edges.get((run, key)) for key in band)
        if low and high and low.x == high.x:
            axes.fill_between(
                low.x, low.y, high.y, color=COLORS[low.color % len(COLORS)], alpha=0.13, linewidth=0
            )


def _spans_a_decade(curves: Sequence[Curve]) -> bool:
    values = [value for curve in curves for value in curve.y if math.isfinite(value)]
    return min(values) > 0 and max(values) > 10 * min(values)


def _finish(axes: Axes, x_name: str) -> None:
    axes.set_xlabel(x_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if x_name == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if axes.get_yscale() == "log":
        return
    if max(map(abs, axes.get_ylim())) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif isinstance(axes.yaxis.get_major_formatter(), ScalarFormatter):
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
