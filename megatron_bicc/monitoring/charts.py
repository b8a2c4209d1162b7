"""Charts of one or several runs, drawn by matplotlib: inline SVG for the report, PNG for other pages."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from megatron_bicc.monitoring import curves as points
from megatron_bicc.monitoring.curves import Curve
from megatron_bicc.monitoring.panels import STAGES, Line, Panel
from megatron_bicc.monitoring.runs import Run

# Beside each: the custom property of report.css that takes its place, so that the page can be dark too.
COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#57534e", "#a21caf")
GRID, INK = "#e7e5e4", "#000000"
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# As SVG's stroke-dasharray, for the legend.
DASH_ARRAYS = ("", "5 2", "1 1.5", "6 2 1 2")
SVG_TYPE = {"svg.fonttype": "none", "font.size": 11.5, "path.simplify_threshold": 0.3}


@dataclass(frozen=True)
class Entry:
    """A line of a legend."""

    label: str
    color: str
    """As CSS"""
    dash_array: str


@dataclass(frozen=True)
class Drawing:
    """A chart as the page shows it."""

    title: str
    caption: str
    svg: Markup
    legend: list[Entry]
    table: list[list[str]]
    description: str


def draw_panel(panel: Panel, runs: Sequence[Run]) -> Drawing | None:
    """The panel's curves of all runs; None where none was recorded."""
    curves = points.panel_curves(panel, runs)
    if not curves:
        return None
    table = points.table(curves, "step")
    return _drawing(panel.title, panel.caption, curves, table, lambda axes: plot(axes, panel, curves))


def draw_histogram(runs: Sequence[Run]) -> Drawing | None:
    """Groups by their share of right rollouts, early and late in each run; None where it was not recorded."""
    curves = points.histogram_curves(runs)
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(curve.x, curve.y, **_style(curve), marker="o", markersize=3.5)
        axes.set_ylim(bottom=0)
        _finish(axes, "right rollouts / all rollouts of a group")

    table = points.table(curves, "right / all")
    caption = (
        "Share of groups by how many rollouts are right, in the first and the last quarter of the steps."
    )
    return _drawing("Right and wrong in a group", caption, curves, table, draw)


def draw_stages(runs: Sequence[Run]) -> Drawing | None:
    """Mean seconds a step by stage, a bar a run; None where none was recorded."""
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
        *([r.name, *map(points.number, row)] for r, row in zip(runs, means, strict=True)),
    ]
    words = [
        f"{run.name}: " + ", ".join(f"{s} {points.number(v)}" for s, v in zip(STAGES, row, strict=True))
        for run, row in zip(runs, means, strict=True)
    ]
    caption = "Mean seconds by stage over the steps that have it" + (
        "; the runs from the top." if len(runs) > 1 else "."
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
            values = points.moving_average(values)
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
    """A still picture of reward and pass@1, for a page that shows no SVG.

    Raises ValueError that names the run in which neither was recorded.
    """
    panels = (
        Panel("mean reward of the rollouts", "", (Line("reward/mean"),), smooth=True),
        Panel("pass@1 on held-out prompts", "", (Line("eval/pass_at_1"),)),
    )
    for run in runs:
        if not any(run.values(panel.lines[0].key) for panel in panels):
            raise ValueError(f"{run.name}: neither reward/mean nor eval/pass_at_1 was recorded")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), panels, strict=True):
        # Where there is one run, its name is what the legend has to say.
        curves = points.panel_curves(panel, runs)
        plot(axes, panel, curves)
        # the legend stands above the axes: the title goes over it
        axes.set_title(panel.title, fontsize=11, pad=22)
        _legend(axes, [runs[curve.run].name for curve in curves])
    figure.savefig(path, dpi=150)


def _legend(axes: Axes, names: Sequence[str]) -> None:
    lines = [line for line in axes.lines if line.get_alpha() is None]
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "borderaxespad": 0.2}
    legend = axes.legend(lines, names, frameon=False, fontsize=9, handlelength=1.8, **above)
    for text in legend.get_texts():
        # A run's name is whatever its directory is called: no formula is meant.
        text.set_parse_math(False)


def _drawing(
    title: str,
    caption: str,
    curves: Sequence[Curve],
    table: list[list[str]],
    draw: Callable[[Axes], None],
) -> Drawing:
    return Drawing(title, caption, _svg(draw, title), _legend_of(curves), table, points.describe(curves))


def _legend_of(curves: Sequence[Curve]) -> list[Entry]:
    """An entry a curve; one a run and one a metric where runs differ in colour and metrics in their line."""
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
    """The chart as an SVG element without a size of its own; salt: makes the ids in it its own."""
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
    """Leaves out what would stand twice on the page, and gives colours over to its style sheet."""
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    # Within tags only: the labels of an axis keep their digits.
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
