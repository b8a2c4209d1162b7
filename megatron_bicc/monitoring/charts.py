"""Curves of one or several runs, drawn on matplotlib axes.

A chart that finds nothing to draw returns False and leaves its axes empty.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_bicc.monitoring.runs import Run

Chart = Callable[[Axes, Sequence[Run]], bool]

COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#57534e")
STAGES = {
    "rollout": "#93c5fd",
    "logprob": "#c4b5fd",
    "pack": "#f472b6",
    "train": "#3b5fc0",
    "sync": "#fdba74",
    "eval": "#a7f3d0",
}
SVG_TYPE = {"svg.fonttype": "none", "svg.hashsalt": "megatron_bicc", "font.size": 10.5}


def reward(axes: Axes, runs: Sequence[Run]) -> bool:
    """Mean reward of each step's rollouts and its moving average."""
    return _curves(axes, runs, "reward/mean", smooth=True)


def pass_at_1(axes: Axes, runs: Sequence[Run]) -> bool:
    """pass@1 on the held-out prompts."""
    return _curves(axes, runs, "eval/pass_at_1", marker="o")


def covariance(axes: Axes, runs: Sequence[Run]) -> bool:
    """Cov(R, delta): how far the policy's confidence already follows the reward."""
    drawn = _curves(axes, runs, "rcc/cov", smooth=True)
    if drawn:
        axes.axhline(0, color="#a8a29e", linewidth=0.8, zorder=0)
    return drawn


def gradient_norm(axes: Axes, runs: Sequence[Run]) -> bool:
    """Global gradient norm before clipping."""
    drawn = _curves(axes, runs, "train/grad_norm", smooth=True)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


def tokens(axes: Axes, runs: Sequence[Run]) -> bool:
    """Rows that the first run computed, against one row a rollout for the same responses and contexts."""
    packed, rows = runs[0].series("tokens/packed"), runs[0].series("tokens/rows")
    if not packed[0] or not rows[0]:
        return False
    axes.plot(*rows, color=COLORS[4], linewidth=1.4, label="one row a rollout")
    axes.plot(*packed, color=COLORS[0], linewidth=1.6, label="packed")
    axes.fill_between(*packed, color=COLORS[0], alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _finish(axes)


def step_time(axes: Axes, runs: Sequence[Run]) -> bool:
    """Seconds a step of the first run by stage, and the totals of the others."""
    staged = _stages(axes, runs[0])
    totals = [Run(run.name, []) if staged and run is runs[0] else run for run in runs]
    drawn = _curves(axes, totals, "time/step_s") or staged
    if drawn:
        _finish(axes)
        axes.set_ylim(bottom=0)
    return drawn


def _stages(axes: Axes, run: Run) -> bool:
    steps, _ = run.series("time/step_s")
    seconds = {stage: dict(zip(*run.series(f"time/{stage}_s"), strict=True)) for stage in STAGES}
    heights = {stage: np.nan_to_num([s.get(step, 0.0) for step in steps]) for stage, s in seconds.items()}
    shown = [stage for stage in STAGES if heights[stage].any()]
    if not shown:
        return False
    colors = [STAGES[stage] for stage in shown]
    axes.stackplot(steps, *(heights[s] for s in shown), colors=colors, labels=shown, step="mid", linewidth=0)
    return True


def svg(chart: Chart, runs: Sequence[Run]) -> str | None:
    """The chart as an SVG element that scales to its container; None if there is nothing to draw."""
    figure = Figure(figsize=(5.0, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    with mpl.rc_context(SVG_TYPE):
        if not chart(figure.add_subplot(), runs):
            return None
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return re.sub(r' (?:width|height)="[^"]*pt"', "", text[text.index("<svg") :], count=2)


def save_png(runs: Sequence[Run], path: str) -> None:
    """A still picture of reward and pass@1, for a page that shows no SVG.

    Raises ValueError that names the run in which neither was recorded.
    """
    for run in runs:
        if not run.values("reward/mean") and not run.values("eval/pass_at_1"):
            raise ValueError(f"{run.name}: neither reward/mean nor eval/pass_at_1 was recorded")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, chart, title in zip(
        figure.subplots(1, 2),
        (reward, pass_at_1),
        ("mean reward of the rollouts", "pass@1 on held-out prompts"),
        strict=True,
    ):
        chart(axes, runs)
        # the legend stands above the axes: the title goes over it
        axes.set_title(title, fontsize=11, pad=22)
    figure.savefig(path, dpi=150)


def _curves(
    axes: Axes, runs: Sequence[Run], key: str, smooth: bool = False, marker: str | None = None
) -> bool:
    drawn = False
    for run, color in zip(runs, itertools.cycle(COLORS), strict=False):
        steps, values = run.series(key)
        if not run.values(key):
            continue
        drawn = True
        if smooth and len(steps) >= 20:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            values = _moving_average(values)
        # matplotlib leaves labels that begin with an underscore out of the legend.
        label = run.name.lstrip("_")
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)
    return drawn and _finish(axes)


def _moving_average(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred mean over at most `window` finite neighbours; NaN where there is none."""
    half, array = window // 2, np.asarray(values, dtype=float)
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    return [float(np.nanmean(w)) if np.isfinite(w).any() else float("nan") for w in windows]


def _finish(axes: Axes) -> bool:
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "borderaxespad": 0.2}
    legend = axes.legend(frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.2, **above)
    for text in legend.get_texts():
        # A run's name is whatever its directory is called: no formula is meant.
        text.set_parse_math(False)
    return True
