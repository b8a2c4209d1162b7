"""The page and the picture, drawn from files that the run's own writer wrote."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.runs import REPOSITORY, documented_metrics, group, layout, make_full_run, make_run

from megatron_bicc import report as command
from megatron_bicc.config import CheckpointConfig, Config, MonitoringConfig, TrainConfig
from megatron_bicc.monitoring import (
    MetricsWriter,
    ProgressBar,
    RunLog,
    charts,
    group_browser,
    write_groups,
    write_report,
)
from megatron_bicc.monitoring.curves import histogram_curves, moving_average, panel_curves
from megatron_bicc.monitoring.panels import SECTIONS, Panel
from megatron_bicc.monitoring.runs import Run, read_run
from megatron_bicc.monitoring.summary import differing_settings, sentences

HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x00\x1b[2J\u202e\ud800"
)


class Page(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def browser_data(page: Page) -> dict:
    """What report.js reads."""
    return json.loads(re.search(r'id="group-data">(.*?)</script>', page.html)[1])


def panel_of(key: str) -> Panel:
    return next(p for _, panels in SECTIONS for p in panels if key in [line.key for line in p.lines])


def test_report_has_a_summary_curves_and_groups(tmp_path: Path):
    run = make_run(tmp_path / "bicc")
    page = Page(write_report([run]))
    assert page.tags.count("figure") == 7
    assert "bicc trained 30 steps; held-out pass@1 rose from 0.500 to 0.900." in page.text
    assert "2.60× fewer" in page.text and "30,000 instead of 78,000" in page.text
    assert "1 min 0 s" in page.text
    groups = browser_data(page)["groups"]
    assert [g["step"] for g in groups] == list(range(1, 31))
    assert groups[29]["prompt"] == "prompt-30" and (groups[29]["right"], groups[29]["wrong"]) == (2, 3)
    assert groups[29]["rollouts"][4] == {
        "text": "wrong-30-2",
        "count": 1,
        "correct": False,
        "reward": "0",
        "advantage": "-0.75",
        "context": 1,
    }
    assert groups[29]["contexts"] == ["seen: wrong ones", "seen: right ones"]


def test_every_documented_metric_is_on_the_page(tmp_path: Path):
    page = Page(write_report([make_full_run(tmp_path / "full", 4, [], {})]))
    keys = [
        k for k in documented_metrics() if not k.startswith("contrast/right") and not k.endswith("_stderr")
    ]
    assert len(keys) > 40
    assert [key for key in keys if f"{key})" not in page.text and f">{key}<" not in page.html] == []
    assert "contrast/right_N_wrong_M" in page.text and " ± " in page.text


def test_a_metric_that_nobody_planned_for_is_drawn_too(tmp_path: Path):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb_project="")
    for step in (1, 2):
        writer.write(step, {"eval/aime/avg_at_32": 0.25 * step, "eval/aime/avg_at_32_stderr": 0.125})
    page = Page(write_report([tmp_path]))
    assert page.tags.count("figure") == 1
    assert "Other metrics" in page.text and "0.5 ± 0.125" in page.text


def test_alike_rollouts_stand_once_and_groups_know_their_outcome(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=1)
    same = group(2, right=3, wrong=1)
    for each in same["rollouts"][:3]:
        each["text"] = "same"
    write_groups(run, 1, [same, group(3, right=2, wrong=0), group(4, right=0, wrong=2)])
    groups = browser_data(Page(write_report([run])))["groups"]
    assert [(g["outcome"], g["right"], g["wrong"]) for g in groups] == [
        ("mixed", 2, 3),
        ("mixed", 3, 1),
        ("right", 2, 0),
        ("wrong", 0, 2),
    ]
    assert [(r["text"], r["count"]) for r in groups[1]["rollouts"]] == [("same", 3), ("wrong-2-0", 1)]


def test_nothing_is_loaded_from_elsewhere_and_rollouts_are_only_text(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=1)
    bad = group(7)
    bad["prompt"] = bad["ground_truth"] = HOSTILE
    for each in bad["rollouts"]:
        each["text"] = each["context"] = HOSTILE
    write_groups(run, 1, [bad])
    page = Page(write_report([run]))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "<script>alert(1)</script>" in browser_data(page)["groups"][1]["prompt"]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page.html)
    assert "default-src 'none'" in page.html


def test_a_run_directory_may_be_called_anything(tmp_path: Path):
    run = make_run(tmp_path / "_$x^{<b>&$", steps=2)
    page = Page(write_report([run, make_run(tmp_path / "other", steps=2)]))
    assert "b" not in page.tags
    assert page.text.count("$x^{<b>&$") >= 3
    twins = [make_run(tmp_path / parent / "same", steps=1) for parent in "ab"]
    assert "same (1) against same (2)" in Page(write_report(twins)).text


def test_too_many_groups_are_thinned_over_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", steps=9)
    monkeypatch.setattr(group_browser, "MAX_CHARACTERS", 450)
    page = Page(write_report([run]))
    steps = [g["step"] for g in browser_data(page)["groups"]]
    assert len(steps) < 9 and (steps[0], steps[-1]) == (1, 9)
    assert f"Left out for size: {9 - len(steps)} groups" in page.text
    monkeypatch.setattr(group_browser, "MAX_CHARACTERS", 1)
    assert "side by side" not in Page(write_report([run])).text


@pytest.mark.parametrize(
    ("metrics", "figures"),
    [
        ([], 0),
        ([{}], 0),
        ([{"reward/mean": 0.5}], 1),
        ([{"tokens/packed": 5.0}], 1),
        ([{"rcc/cov": float("nan")}], 0),
        ([{"ratio/right/q50": 0.0, "ratio/right/max": 50.0}], 1),
    ],
)
def test_what_was_not_recorded_is_left_out(tmp_path: Path, metrics: list[dict], figures: int):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb_project="")
    (tmp_path / "metrics.jsonl").touch()
    for step, record in enumerate(metrics, 1):
        writer.write(step, record)
    page = Page(write_report([tmp_path]))
    assert page.tags.count("figure") == figures
    assert "side by side" not in page.text and "Packed layout" not in page.text


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
        "one row a rollout": [(step, 2600) for step in range(1, 11)],
        "packed": [(step, 1000) for step in range(1, 11)],
    }
    assert list(points("tokens/packed", run, other)) == [
        "a packed",
        "a one row a rollout",
        "b packed",
        "b one row a rollout",
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


def scored(name: str, scores: dict[int, float], error: float = 0.01, **last: float) -> Run:
    records = [
        {"step": step, "eval/pass_at_1": score, "eval/pass_at_1_stderr": error, **last}
        for step, score in scores.items()
    ]
    return Run(name, records, {"algorithm": name})


def test_the_summary_says_what_happened():
    far, near = scored("far", {0: 0.5, 4: 0.9}), scored("near", {0: 0.5, 4: 0.5, 8: 0.95})
    assert sentences([far, near]) == [
        "far trained 4 steps with algorithm far; held-out pass@1 rose from 0.500 to 0.900.",
        "near trained 8 steps with algorithm near; held-out pass@1 rose from 0.500 to 0.950.",
        "far was ahead of near by 0.400 in held-out pass@1 at step 4, the last that both evaluated; that is "
        "more than twice the standard error of the difference, 0.014, which knows of the evaluation's "
        "samples only, not of other seeds.",
    ]
    close = scored("close", {4: 0.92}, error=0.02)
    assert "close was ahead of far by 0.020" in sentences([far, close])[-1]
    assert "that is not more than twice" in sentences([far, close])[-1]
    ill = scored(
        "ill", {0: 0.5, 1: 0.4}, **{"contrast/share": 0.1, "rollout/truncated": 0.5, "train/loss": None}
    )
    assert [said.removeprefix("ill: ") for said in sentences([ill])[1:]] == [
        "only 10% of the last step's groups had both right and wrong rollouts; the others taught nothing.",
        "50% of the last step's responses were cut at rollout.max_new_tokens.",
        "train/loss was not finite at step 0.",
    ]
    assert "fell from 0.500 to 0.400" in sentences([ill])[0]


def test_settings_that_differ():
    runs = [
        Run("a", [], {"output_dir": "x", "seed": 1, "bicc.weight": 1.0}),
        Run("b", [], {"output_dir": "y", "seed": 1, "bicc.weight": 0.5, "new": None}),
        Run("c", []),
    ]
    assert differing_settings(runs) == [
        ["setting", "a", "b", "c"],
        ["bicc.weight", "1.0", "0.5", "not recorded"],
    ]
    assert differing_settings(runs[::2]) == []


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    run, other = make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b", steps=2)
    command.main([str(run), str(other), str(run)])
    assert capsys.readouterr().out == f"{run}/report.html\n"
    command.main([str(run), "--output", str(tmp_path / "page.html")])
    assert "a trained 2 steps" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    (other / "config.yaml").write_text("[")
    for arguments, named in (
        ([str(tmp_path)], "metrics.jsonl"),
        ([str(run), str(other)], "config.yaml: not the settings of a run"),
        ([str(run), "--output", str(tmp_path / "no" / "page.html")], "page.html: cannot write it"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and named in said


def test_plot_tool_draws_a_picture(tmp_path: Path):
    runs = [str(make_run(tmp_path / name, steps=3)) for name in "ab"]
    tool = [sys.executable, str(REPOSITORY / "tools" / "plot_run.py")]
    subprocess.run([*tool, *runs, str(tmp_path / "out.png")], check=True, cwd=REPOSITORY)
    picture = imread(tmp_path / "out.png")
    assert picture.shape[:2] == (540, 1500)
    assert picture[..., :3].std() > 0.05
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    failed = subprocess.run(
        [*tool, *runs, str(tmp_path / "out.png")], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert failed.returncode == 2
    assert (
        failed.stderr == "tools/plot_run.py: error: a: neither reward/mean nor eval/pass_at_1 was recorded\n"
    )


def test_progress_bar_keeps_the_last_pass_at_1(capfd: pytest.CaptureFixture):
    bar = ProgressBar(steps=4, done=1)
    bar.show({"eval/pass_at_1": 0.75})
    bar.advance()
    bar.show({"reward/mean": 0.625})
    bar.close()
    shown = capfd.readouterr().err
    assert re.search(r"2/4 .*reward=0\.625", shown) and "pass@1=0.750" in shown.splitlines()[-1]


def config(directory: Path, compare: str = "") -> Config:
    return Config(
        output_dir=str(directory),
        train=TrainConfig(steps=4),
        checkpoint=CheckpointConfig(resume=True),
        monitoring=MonitoringConfig(tensorboard=False, compare=compare),
    )


def test_run_log_resumes_reports_and_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path / "run", steps=4)
    log = RunLog(config(run, compare=str(make_run(tmp_path / "other", steps=4))), first_step=2, enabled=True)
    assert [record["step"] for record in read_run(run).records] == [0, 1, 2]
    log.step(3, {"reward/mean": 0.125})
    log.groups(3, [group(33)])
    log.layout(3, layout())
    log.finish(run / "checkpoints" / "3", run / "hf")
    assert read_run(run).series("reward/mean")[1][-1] == 0.125
    page = Page(run / "report.html")
    assert "prompt-33" in page.html
    assert "run against other" in page.text and "step 3, with context" in page.text
    assert read_run(run).settings["train.steps"] == 4
    printed = capsys.readouterr().out
    for name in ("report.html", "metrics.jsonl", "checkpoints/3", "hf"):
        assert str(run / name) in printed


def test_run_log_from_the_start_forgets_an_earlier_step_0(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=2)
    RunLog(config(run), first_step=0, enabled=True)
    assert read_run(run).records == []


def test_what_ends_a_run_stands_on_a_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(KeyboardInterrupt), RunLog(config(tmp_path), first_step=0, enabled=True) as log:
        log.step(1, {"reward/mean": 0.5})
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert "training:" in err and err.endswith("\n")


def test_run_log_of_another_process_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = RunLog(config(tmp_path / "run"), first_step=0, enabled=False)
    log.step(1, {"reward/mean": 1.0})
    log.groups(1, [group(1)])
    log.layout(1, layout())
    log.finish(tmp_path, tmp_path)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_every_metric_is_documented():
    documented = (REPOSITORY / "docs" / "metrics.md").read_text()
    files = [path for path in (REPOSITORY / "megatron_bicc").rglob("*.py") if "monitoring" not in path.parts]
    code = "".join(path.read_text() for path in files)
    families = "clip|contrast|delta|eval|kl|ratio|rcc|reward|rollout|time|tokens|train"
    keys = set(re.findall(rf'"((?:{families})/[a-z_0-9]+)"', code))
    keys |= {f"time/{stage}_s" for stage in re.findall(r'clock\("([a-z]+)"\)', code)}
    assert {"reward/mean", "eval/pass_at_1_stderr", "rcc/cov", "time/rollout_s"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []
