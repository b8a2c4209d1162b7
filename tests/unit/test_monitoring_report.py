"""The page and the picture, drawn from files that the run's own writer wrote."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_bicc import report as command
from megatron_bicc.config import CheckpointConfig, Config, MonitoringConfig, TrainConfig
from megatron_bicc.monitoring import MetricsWriter, ProgressBar, RunLog, charts, write_groups, write_report
from megatron_bicc.monitoring.runs import read_run

HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x00\x1b[2J\u202e\ud800"
)
REPOSITORY = Path(__file__).parents[2]


def rollout(text: str, correct: bool, context: str) -> dict:
    return {
        "text": text,
        "reward": float(correct),
        "advantage": 1.25 if correct else -0.75,
        "correct": correct,
        "context": context,
    }


def group(number: int, context: str = "seen: ") -> dict:
    right = [
        rollout(f"right-{number}-{i}", True, f"{context}wrong ones" if context else "") for i in range(2)
    ]
    wrong = [
        rollout(f"wrong-{number}-{i}", False, f"{context}right ones" if context else "") for i in range(3)
    ]
    return {"prompt": f"prompt-{number}", "ground_truth": "109", "rollouts": right + wrong}


def make_run(directory: Path, steps: int = 30, bicc: bool = True) -> Path:
    writer = MetricsWriter(directory, tensorboard=False, wandb_project="")
    writer.write(0, {"eval/pass_at_1": 0.5})
    for step in range(1, steps + 1):
        metrics = {
            "reward/mean": 0.5 + step / 100,
            "train/grad_norm": 1.5,
            "tokens/packed": 1000.0,
            "tokens/rows": 2600.0,
            "time/step_s": 2.0,
            "time/rollout_s": 1.25,
        }
        if bicc:
            metrics["rcc/cov"] = 0.01 * step
        if step % 10 == 0:
            metrics["eval/pass_at_1"] = 0.5 + step / 75
        writer.write(step, metrics)
        write_groups(directory, step, [group(step, "seen: " if bicc else "")])
    return directory


class Page(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_has_curves_tiles_and_groups(tmp_path: Path):
    run, other = make_run(tmp_path / "bicc"), make_run(tmp_path / "grpo", bicc=False)
    page = Page(write_report(run, other))
    assert page.tags.count("svg") == 6
    assert "0.900" in page.text and "from 0.500; grpo 0.900" in page.text
    assert "2.60× fewer" in page.text and "30,000 instead of 78,000" in page.text
    assert "1 min 0 s" in page.text
    assert page.tags.count("article") == 6
    for step in (1, 30):
        assert f"prompt-{step}" in page.text and f"wrong-{step}-2" in page.text
    assert "seen: wrong ones" in page.text and "advantage -0.75" in page.text


def test_right_and_wrong_are_on_their_own_sides_under_the_opposite_context(tmp_path: Path):
    html = write_report(make_run(tmp_path / "run", steps=1)).read_text()
    right, wrong = html.split('<div class="side right">')[1].split('<div class="side wrong">')
    assert "right-1-1" in right and "wrong-1-" not in right and "seen: wrong ones" in right
    assert "wrong-1-2" in wrong and "right-1-" not in wrong and "seen: right ones" in wrong
    assert right.count("seen:") == wrong.count("seen:") == 1


def test_contexts_that_differ_stand_beside_each_rollout(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=1)
    pair = group(2)
    for i, each in enumerate(pair["rollouts"]):
        each["context"] = f"own-{i}"
    (run / "groups.jsonl").unlink()
    write_groups(run, 1, [pair])
    page = Page(write_report(run))
    assert all(f"own-{i}" in page.text for i in range(5))


def test_nothing_is_loaded_from_elsewhere_and_rollouts_are_only_text(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=1)
    bad = group(7)
    bad["prompt"] = bad["ground_truth"] = HOSTILE
    for each in bad["rollouts"]:
        each["text"] = each["context"] = HOSTILE
    write_groups(run, 1, [bad])
    path = write_report(run)
    page = Page(path)
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", path.read_text(encoding="utf-8"))
    assert "default-src 'none'" in path.read_text(encoding="utf-8")


def test_a_run_directory_may_be_called_anything(tmp_path: Path):
    run = make_run(tmp_path / "_$x^{<b>&$", steps=2)
    page = Page(write_report(run, make_run(tmp_path / "other", steps=2)))
    assert "b" not in page.tags
    assert page.text.count("$x^{<b>&$") >= 3


def test_groups_are_spread_over_the_run_and_without_contrast_left_out(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=9)
    only_right = group(100)
    only_right["rollouts"] = only_right["rollouts"][:2]
    write_groups(run, 9, [only_right])
    page = Page(write_report(run, max_groups=3))
    assert re.findall(r"prompt-\d+", page.text) == ["prompt-1", "prompt-5", "prompt-9"]
    assert Page(write_report(run, max_groups=0)).tags.count("article") == 0


@pytest.mark.parametrize(
    ("metrics", "curves"),
    [
        ([], 0),
        ([{}], 0),
        ([{"reward/mean": 0.5}], 1),
        ([{"tokens/packed": 5.0}], 0),
        ([{"rcc/cov": float("nan")}], 0),
    ],
)
def test_missing_keys_leave_gaps_not_errors(tmp_path: Path, metrics: list[dict], curves: int):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb_project="")
    (tmp_path / "metrics.jsonl").touch()
    for step, record in enumerate(metrics):
        writer.write(step, record)
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == curves
    assert page.text.count("Not recorded in this run.") == 6 - curves


def test_run_without_groups_has_no_such_section(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "groups.jsonl").unlink()
    assert "side by side" not in Page(write_report(run)).text


def curve(chart: charts.Chart, *runs: Path) -> dict[str, list[tuple[float, float]]]:
    """Points of every labelled line of a chart."""
    axes = Figure().add_subplot()
    assert chart(axes, [read_run(run) for run in runs])
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in labelled}


def test_curves_show_the_recorded_points(tmp_path: Path):
    run, other = make_run(tmp_path / "a", steps=10), make_run(tmp_path / "b", steps=20, bicc=False)
    assert curve(charts.pass_at_1, run, other) == {
        "a": [(0, 0.5), (10, 0.5 + 10 / 75)],
        "b": [(0, 0.5), (10, 0.5 + 10 / 75), (20, 0.5 + 20 / 75)],
    }
    assert list(curve(charts.covariance, run, other)) == ["a"]
    assert curve(charts.tokens, run, other) == {
        "one row a rollout": [(step, 2600) for step in range(1, 11)],
        "packed": [(step, 1000) for step in range(1, 11)],
    }
    assert list(curve(charts.step_time, run, other)) == ["b"]


def test_a_long_curve_is_smoothed_by_a_centred_mean(tmp_path: Path):
    points = curve(charts.reward, make_run(tmp_path / "a", steps=40))["a"]
    assert points[19] == (20, pytest.approx(0.7))
    assert points[0] == (1, pytest.approx(0.53))


def test_more_runs_than_colours_are_all_drawn(tmp_path: Path):
    runs = [make_run(tmp_path / f"run{i}", steps=2) for i in range(7)]
    assert len(curve(charts.reward, *runs)) == 7


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    run, other = make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b", steps=2)
    command.main([str(run), "--compare", str(other)])
    assert capsys.readouterr().out == f"{run}/report.html\n"
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


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
    log.finish(run / "checkpoints" / "3", run / "hf")
    assert read_run(run).series("reward/mean")[1][-1] == 0.125
    page = Page(run / "report.html")
    assert "prompt-33" in page.text and "compared with other" in page.text
    printed = capsys.readouterr().out
    for name in ("report.html", "metrics.jsonl", "checkpoints/3", "hf"):
        assert str(run / name) in printed


def test_run_log_from_the_start_forgets_an_earlier_step_0(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=2)
    RunLog(config(run), first_step=0, enabled=True)
    assert read_run(run).records == []


def test_run_log_of_another_process_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = RunLog(config(tmp_path / "run"), first_step=0, enabled=False)
    log.step(1, {"reward/mean": 1.0})
    log.groups(1, [group(1)])
    log.finish(tmp_path, tmp_path)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_every_metric_is_documented():
    documented = (REPOSITORY / "docs" / "metrics.md").read_text()
    code = "".join(path.read_text() for path in (REPOSITORY / "megatron_bicc").rglob("*.py"))
    families = "clip|contrast|delta|eval|kl|ratio|rcc|reward|rollout|time|tokens|train"
    keys = set(re.findall(rf'"((?:{families})/[a-z_0-9]+)"', code))
    keys |= {f"time/{stage}_s" for stage in re.findall(r'clock\("([a-z]+)"\)', code)}
    assert {"reward/mean", "eval/pass_at_1", "rcc/cov", "time/rollout_s"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []
