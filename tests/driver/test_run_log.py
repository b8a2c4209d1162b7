"""Tests what a run writes, plots and logs."""

import io
import re
import time
from pathlib import Path

import pytest
from support.pages import Page
from support.runs import REPOSITORY, group, layout, make_run

from megatron_bicc.config import CheckpointConfig, Config, MonitoringConfig, TrainConfig
from megatron_bicc.metrics import ProgressBar, RunLog, phase, waiting_for
from megatron_bicc.report.runs import read_run


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
        monitoring=MonitoringConfig(tensorboard=False, compare_run=compare),
    )


def test_run_log_resumes_reports_and_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path / "run", steps=4)
    log = RunLog(config(run, compare=str(make_run(tmp_path / "other", steps=4))), enabled=True)
    with log.open(first_step=2):
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
    with RunLog(config(run), enabled=True).open(first_step=0):
        assert read_run(run).records == []


class Terminal(io.StringIO):
    """Stands for stderr on a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_an_error_stands_on_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    log = RunLog(config(tmp_path), enabled=True)
    with pytest.raises(KeyboardInterrupt), log.open(first_step=0):
        log.step(1, {"reward/mean": 0.5})
        raise KeyboardInterrupt
    assert "training:" in terminal.getvalue() and terminal.getvalue().endswith("\n")


def test_without_a_terminal_there_is_a_line_per_step(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "megatron_bicc")
    log = RunLog(config(tmp_path), enabled=True)
    with log.open(first_step=0):
        log.step(0, {"eval/pass_at_1": 0.25})
        log.step(1, {"reward/mean": 0.5, "time/step_s": 12.34})
    assert caplog.messages == ["step 0/4: pass@1 0.250", "step 1/4: reward 0.500, 12.3 s"]


def test_run_log_of_another_process_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = RunLog(config(tmp_path / "run"), enabled=False)
    with log.open(first_step=0):
        log.step(1, {"reward/mean": 1.0})
        log.groups(1, [group(1)])
        log.layout(1, layout())
        log.finish(tmp_path, tmp_path)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_long_wait_says_what_it_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level("INFO", "megatron_bicc")
    with waiting_for("nothing that takes long"):
        pass
    monkeypatch.setattr("megatron_bicc.metrics.WAIT_S", 0.05)
    with waiting_for("the other processes"):
        time.sleep(0.5)
    assert caplog.messages == ["process 0: still waiting for the other processes (0 s)"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_phase_says_its_sizes_and_seconds_on_rank_0(
    rank: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level("INFO", "megatron_bicc")
    monkeypatch.setenv("RANK", rank)
    with phase("prompts") as sizes:
        sizes += ["8 for training", "2 held out"]
    with pytest.raises(KeyError), phase("policy"):
        raise KeyError
    assert caplog.messages == (["prompts: 8 for training, 2 held out (0.0 s)"] if rank == "0" else [])


def test_every_metric_is_documented():
    documented = (REPOSITORY / "docs" / "metrics.md").read_text()
    files = [
        path
        for path in (REPOSITORY / "megatron_bicc").rglob("*.py")
        if "report" not in path.parts and path.name not in ("metrics.py",)
    ]
    code = "".join(path.read_text() for path in files)
    families = "clip|contrast|delta|eval|kl|memory|perf|ratio|rcc|reward|rollout|time|tokens|train"
    keys = set(re.findall(rf'"((?:{families})/[a-z_0-9]+)"', code))
    keys |= {f"time/{stage}_s" for stage in re.findall(r'clock\("([a-z]+)"\)', code)}
    assert {"reward/mean", "eval/pass_at_1_stderr", "rcc/cov", "time/rollout_s"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []
