"""Tests metrics.jsonl and groups.jsonl: contents, after a kill, and cut back at a resume."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bicc.errors import UserError
from megatron_bicc.files import append_jsonl
from megatron_bicc.metrics import MetricsWriter, write_groups
from megatron_bicc.report.runs import read_groups, read_run

GROUP = {"prompt": "1+1=", "ground_truth": "2", "rollouts": []}


@pytest.fixture
def writer(tmp_path: Path) -> MetricsWriter:
    return MetricsWriter(tmp_path, tensorboard=False, wandb_project="")


def lines(path: Path) -> list[str]:
    return (path / "metrics.jsonl").read_text().splitlines()


def test_one_plain_json_object_a_line(writer: MetricsWriter, tmp_path: Path):
    writer.write(0, {"eval/pass_at_1": 0.5})
    writer.write(
        1, {"train/loss": np.float32(0.25), "train/grad_norm": torch.tensor(2.0), "tokens/packed": 7}
    )
    assert lines(tmp_path) == [
        '{"step": 0, "eval/pass_at_1": 0.5}',
        '{"step": 1, "train/loss": 0.25, "train/grad_norm": 2.0, "tokens/packed": 7}',
    ]


def test_not_finite_becomes_null_and_reads_as_nan(writer: MetricsWriter, tmp_path: Path):
    writer.write(1, {"train/loss": math.nan, "kl/old_new": -math.inf, "rcc/cov": torch.tensor(math.nan)})
    assert lines(tmp_path) == ['{"step": 1, "train/loss": null, "kl/old_new": null, "rcc/cov": null}']
    steps, values = read_run(tmp_path).series("train/loss")
    assert steps == [1] and math.isnan(values[0])
    assert read_run(tmp_path).values("train/loss") == []


def test_what_is_no_number_is_named(writer: MetricsWriter, tmp_path: Path):
    with pytest.raises(TypeError, match="metric train/loss is 'high'"):
        writer.write(1, {"train/loss": "high"})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_is_on_disk_when_write_returns(writer: MetricsWriter, tmp_path: Path, monkeypatch):
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda fd: (synced.append((tmp_path / "metrics.jsonl").read_text()), real(fd))
    )
    writer.write(3, {})
    assert synced == ['{"step": 3}\n']


@settings(deadline=None)
@given(cut=st.integers(min_value=0, max_value=60))
def test_a_line_cut_anywhere_costs_that_line_only(tmp_path_factory: pytest.TempPathFactory, cut: int):
    directory = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(directory, tensorboard=False, wandb_project="")
    writer.write(1, {"reward/mean": 0.5})
    first = (directory / "metrics.jsonl").read_bytes()
    second = json.dumps({"step": 2, "reward/mean": 0.6}).encode()
    (directory / "metrics.jsonl").write_bytes(first + second[:cut])
    survivors = [1, 2] if cut >= len(second) else [1]
    assert [r["step"] for r in read_run(directory).records] == survivors
    writer.write(3, {"reward/mean": 0.7})
    assert [json.loads(line)["step"] for line in lines(directory)] == [*survivors, 3]


def test_truncate_keeps_the_steps_up_to_it(writer: MetricsWriter, tmp_path: Path):
    for step in range(6):
        writer.write(step, {"reward/mean": step / 10})
        write_groups(tmp_path, step, [GROUP, GROUP])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "rew')
    before = lines(tmp_path)
    writer.truncate_after(3)
    assert lines(tmp_path) == before[:4]
    assert [group["step"] for group in read_groups(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["groups.jsonl", "metrics.jsonl"]


def test_truncating_nothing_is_fine(writer: MetricsWriter, tmp_path: Path):
    writer.truncate_after(3)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_left_by_a_killed_process_is_not_used(writer: MetricsWriter, tmp_path: Path):
    (tmp_path / "metrics.jsonl.new").write_text('{"step": 99}\n')
    writer.write(1, {})
    writer.truncate_after(5)
    assert lines(tmp_path) == ['{"step": 1}']


@pytest.mark.parametrize("bad", ['{"step": 2, "rew', "[1]", "\x00\x00"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, bad: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: not a JSON object"):
        read_run(tmp_path)


def test_a_line_without_a_step_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"reward/mean": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line without a step"):
        read_run(tmp_path)


def test_missing_metrics_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read it: No such file"):
        read_run(tmp_path)


def test_the_later_of_two_lines_of_a_step_counts(tmp_path: Path):
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 2, "a": 1}, {"step": 1, "a": 5}, {"step": 2, "a": 3}])
    assert read_run(tmp_path).series("a") == ([1, 2], [5, 3])


def test_any_rollout_text_comes_back(tmp_path: Path):
    text = 'quote " newline \n nul \x00 surrogate \ud800 line \u2028 end'
    rollout = {"text": text, "reward": 1.0, "advantage": 0.5, "correct": True, "context": ""}
    write_groups(tmp_path, 4, [GROUP | {"rollouts": [rollout]}])
    assert read_groups(tmp_path) == [{"step": 4, **GROUP, "rollouts": [rollout]}]


def scalars(directory: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(key)]


def test_tensorboard_has_every_scalar_and_forgets_on_truncation(tmp_path: Path):
    writer = MetricsWriter(tmp_path, tensorboard=True, wandb_project="")
    for step in range(4):
        writer.write(step, {"reward/mean": step / 10})
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
    writer.truncate_after(1)
    writer.write(2, {"reward/mean": 0.9})
    writer.close()
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.1), (2, 0.9)]


def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append(("finish",))
    )
    package = SimpleNamespace(init=lambda **settings: (calls.append(("init", settings["project"])), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", package)
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb_project="mine")
    writer.write(2, {"reward/mean": 0.5})
    writer.close()
    assert calls == [("init", "mine"), (2, {"reward/mean": 0.5}), ("finish",)]


def test_weights_and_biases_not_installed_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb_project is mine.*pip install wandb"):
        MetricsWriter(tmp_path, tensorboard=False, wandb_project="mine")
