"""Tests curves: their points, and how they are drawn."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.runs import REPOSITORY, make_run

from megatron_bicc.report import charts
from megatron_bicc.report.charts import histogram_curves, moving_average, panel_curves
from megatron_bicc.report.panels import SECTIONS, Panel
from megatron_bicc.report.runs import Run, read_run


def panel_of(key: str) -> Panel:
    return next(p for _, panels in SECTIONS for p in panels if key in [line.key for line in p.lines])


def points(key: str, *runs: Path) -> dict[str, list[tuple[float, float]]]:
    """Points of every curve of the panel that shows a metric, by label."""
    curves = panel_curves(panel_of(key), [read_run(run) for run in runs])
    return {curve.label: list(zip(curve.x, curve.y, strict=True)) for curve in curves}


def test_curves_are_the_recorded_points(tmp_path: Path):
    run, other = make_run(tmp_path / "a", steps=10), make_run(tmp_path / "b", steps=20, bicc=False)
    assert points("eval/pass_at_1", run, other) == {
        "a": [(0, 0.5), (10, 0.5 + 10 / 75)],
        "b": [(0, 0.5), (10, 0.5 + 10 / 75), (20, 0.5 + 20 / 75)],
    }
    assert list(points("rcc/cov", run, other)) == ["a"]
    assert points("tokens/packed", run) == {
        "one row per rollout": [(step, 2600) for step in range(1, 11)],
        "packed": [(step, 1000) for step in range(1, 11)],
    }
    assert list(points("tokens/packed", run, other)) == [
        "a packed",
        "a one row per rollout",
        "b packed",
        "b one row per rollout",
    ]


def test_drawn_lines_are_the_curves_and_the_table_their_values(tmp_path: Path):
    runs = [read_run(make_run(tmp_path / name, steps=12)) for name in "ab"]
    panel = panel_of("eval/pass_at_1")
    axes = Figure().add_subplot()
    charts.plot(axes, panel, panel_curves(panel, runs))
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert axes.lines[1].get_xydata().tolist() == [[0, 0.5], [10, 0.5 + 10 / 75]]
    drawing = charts.draw_panel(panel, runs)
    assert drawing.table == [
        ["step", "a (eval/pass_at_1)", "b (eval/pass_at_1)"],
        ["0", "0.5", "0.5"],
        ["10", "0.6333", "0.6333"],
    ]
    assert drawing.description.startswith("a: from 0.5 at 0 to 0.6333 at 10, between 0.5 and 0.6333. b:")
    assert [entry.label for entry in drawing.legend] == ["a", "b"]


def test_small_numbers_keep_their_digits_on_the_axis(tmp_path: Path):
    records = [{"step": step, "train/lr": 0.005 + step * 0.001} for step in (1, 2, 3)]
    drawing = charts.draw_panel(panel_of("train/lr"), [Run("a", records)])
    assert len(set(re.findall(r">(0\.00\d)<", drawing.svg))) > 3


def test_histogram_is_early_and_late_share_of_groups():
    records = [
        {"step": step, "contrast/right_0_wrong_2": 1 - step / 8, "contrast/right_2_wrong_0": step / 8}
        for step in range(1, 9)
    ]
    early, late = histogram_curves([Run("a", records)])
    assert (early.x, early.y) == ([0, 1], [pytest.approx(13 / 16), pytest.approx(3 / 16)])
    assert (late.x, late.y) == ([0, 1], [pytest.approx(1 / 16), pytest.approx(15 / 16)])


def test_a_long_curve_is_smoothed_by_a_centred_mean():
    smooth = moving_average([float(i) for i in range(40)])
    assert smooth[19] == 19 and smooth[0] == 2
    assert moving_average([1.0, float("nan"), 3.0]) == [2, 2, 2]


def test_more_runs_than_colours_are_all_drawn(tmp_path: Path):
    runs = [read_run(make_run(tmp_path / f"run{i}", steps=2)) for i in range(7)]
    drawing = charts.draw_panel(panel_of("reward/mean"), runs)
    assert len({(entry.color, entry.dash_array) for entry in drawing.legend}) == 7


def test_plot_tool_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [str(make_run(tmp_path / name, steps=3)) for name in "ab"]
    tool = [sys.executable, str(REPOSITORY / "tools" / "plot_run.py")]
    subprocess.run([*tool, *runs, str(tmp_path / "out.png")], check=True, cwd=REPOSITORY)
    picture = imread(tmp_path / "out.png")
    assert picture.shape[:2] == (540, 1500)
    assert picture[..., :3].std() > 0.05
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(tool[1])["main"]([*runs, str(tmp_path / "out.png")])
    assert stop.value.code == 2
    complaint = "tools/plot_run.py: error: a: neither reward/mean nor eval/pass_at_1 was recorded\n"
    assert capsys.readouterr().err == complaint
