"""Tests the benchmark of rewards: every workload is scored, and half of its responses are right."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks import rewards


def test_it_measures_every_workload(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rewards, "PROMPTS", 2)
    figures = rewards.run(Namespace(repeats=1, workers=0))
    assert figures.keys() == rewards.WORKLOADS.keys() and min(figures.values()) > 0
    assert capsys.readouterr().out.count("| 16 | 8 |") == len(figures)
