"""Draws the pictures of docs/results.md from the curves of all runs."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiment.arms import MAIN, VARIANTS
from experiment.figures import Curve
from experiment.paired import interval

COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#57534e", "#be185d", "#0e7490")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "megatron_bicc", "font.size": 10}
SVG_DATE = {"Date": None}


def draw_all(curves: list[Curve], folder: Path) -> None:
    """Writes pass_at_1.svg, variants.svg and gradients.svg."""
    main = [arm.name for arm in MAIN]
    _save(folder / "pass_at_1.svg", curves, [(main, "pass_at_1", "step"), (main, "pass_at_1", "tokens")])
    small = [curve for curve in curves if curve.seed <= 4]
    of_bicc = [name for name in _variants() if "bicc" in name and "context" not in name]
    shares = [name for name in _variants() if "context" in name]
    panels = [
        (["bicc", "bicc+rcc", *of_bicc], "pass_at_1", "step"),
        (["bicc+rcc", *shares], "pass_at_1", "step"),
    ]
    _save(folder / "variants.svg", small, panels)
    panels = [(main, "gradient_variance", "step"), (main, "gradient_noise", "step"), (main, "cov", "step")]
    _save(folder / "gradients.svg", curves, panels)


def _variants() -> list[str]:
    return [arm.name for arm in VARIANTS]


def _save(path: Path, curves: list[Curve], panels: Sequence[tuple[list[str], str, str]]) -> None:
    names = list(dict.fromkeys(name for arms, _, _ in panels for name in arms))
    colors = dict(zip(names, COLORS, strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
        for axes, (arms, column, x) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for name in arms:
                _curve(axes, [c for c in curves if c.arm == name], column, x, colors[name], name)
            _label(axes, column, x)
        handles = {h.get_label(): h for axes in figure.axes for h in axes.get_lines()}
        figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=4, frameon=False)
        FigureCanvasSVG(figure).print_svg(path, metadata=SVG_DATE)


def _curve(axes: Axes, curves: list[Curve], column: str, x: str, color: str, name: str) -> None:
    """Draws the mean over seeds with its 95 % interval, at the mean over seeds of x."""
    of_runs = np.stack([curve.columns[column] for curve in curves])
    counted = np.isfinite(of_runs).sum(0) >= 2
    intervals = [interval(list(values[np.isfinite(values)])) for values in of_runs[:, counted].T]
    mean = np.array([i.mean for i in intervals])
    half = np.array([i.half_width for i in intervals])
    at = np.stack([curve.columns[x] for curve in curves]).mean(0)[counted]
    marker = "o" if column == "pass_at_1" else None
    dashes = "--" if "rcc" in name else "-"
    axes.plot(at, mean, dashes, color=color, linewidth=1.6, marker=marker, markersize=3, label=name)
    axes.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def _label(axes: Axes, column: str, x: str) -> None:
    titles = {
        "pass_at_1": "held-out pass@1",
        "gradient_variance": "gradient variance",
        "gradient_noise": "gradient noise (variance / squared norm)",
        "cov": "Cov(R, δ)",
    }
    axes.set_title(titles[column], fontsize=10)
    axes.set_xlabel("step" if x == "step" else "training tokens")
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if column == "gradient_variance":
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 * min(min(line.get_ydata()) for line in axes.get_lines()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e7e5e4", linewidth=0.8)
