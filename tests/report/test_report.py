"""Tests the page, from files written by the run's own writer."""

import re
from pathlib import Path

import pytest
from support.pages import Page, browser_data
from support.runs import documented_metrics, group, make_full_run, make_run

from megatron_bicc.metrics import MetricsWriter, write_groups
from megatron_bicc.report import __main__ as command
from megatron_bicc.report import groups as group_browser
from megatron_bicc.report.page import write_report

HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x00\x1b[2J\u202e\ud800"
)


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


def test_metrics_by_staleness_and_by_layer_share_a_chart(tmp_path: Path):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb_project="")
    for step in (1, 2):
        metrics = {f"correction/mean/staleness_{n}": n / 16 for n in (0, 2, 10)} | {"correction/mean": 0.5}
        metrics |= {"rollout/staleness_mean": 0.75, "rollout/staleness_1": 0.75}
        writer.write(step, metrics | {f"moe/load/layer_{n}": 1.0 + n for n in (0, 1)})
    page = Page(write_report([tmp_path]))
    # one of them for the mean, which is no share
    assert page.tags.count("figure") == 5
    assert "correction/mean/staleness_N" in page.text and "moe/load/layer_N" in page.text
    places = [page.text.index(f"staleness {n}") for n in (0, 2, 10)]
    assert places == sorted(places) and "layer 1" in page.text


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
    shown = browser_data(page)["groups"][1]
    assert "<script>alert(1)</script>" in shown["prompt"]
    texts = [
        shown["prompt"],
        shown["truth"],
        *shown["contexts"],
        *(r["text"] for r in shown["rollouts"]),
    ]
    for text in (page.html, *texts):
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", text)
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
        ([str(run), "--output", str(tmp_path / "no" / "page.html")], "page.html: cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and named in said
