"""Tests that any number of prompts on any number of processes gives the result of one process."""

import json
from pathlib import Path

import pytest
from checkpoint.shares_worker import COUNTS, JOBS
from support import warm

WORKER = Path(__file__).with_name("shares_worker.py")
SAMPLED = ("step", "rollout/", "reward/", "contrast/", "eval/")
"""Metrics of samples, which do not depend on the number of processes at all"""
# the first test starts every process; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
SEVERAL = [name for name in JOBS if name != "one"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shares")
    done = warm.run([WORKER, directory])
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def reports(out: Path, job: str, what: str) -> list:
    """Of every process."""
    ranks = range(JOBS[job][0])
    return [json.loads((out / job / f"{rank}.json").read_text())[what] for rank in ranks]


def metrics(path: Path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


@pytest.mark.parametrize("job", SEVERAL)
def test_groups_and_answers_are_the_same_to_the_bit_on_every_process(out: Path, job: str) -> None:
    for what in ("collected", "evaluated"):
        (one,) = reports(out, "one", what)
        assert all(found == one for found in reports(out, job, what)), what
    assert [len(groups) for groups in reports(out, job, "collected")[0]] == list(COUNTS)
    assert [len(answers) for answers in reports(out, job, "evaluated")[0]] == [5, 2]


@pytest.mark.parametrize(("job", "name"), [(job, name) for job in SEVERAL for name in JOBS[job][2]])
def test_a_run_measures_the_same(out: Path, job: str, name: str) -> None:
    one, several = metrics(out / "one" / name), metrics(out / job / name)
    assert len(one) == len(several) == 3
    assert all("train/loss" in record for record in one[1:])
    for expected, found in zip(one, several, strict=True):
        assert found.keys() == expected.keys()
        sampled = {key for key in expected if key.startswith(SAMPLED)}
        assert {key: found[key] for key in sampled} == {key: expected[key] for key in sampled}
        for key, value in expected.items():
            # of one prompt there is no standard error: null
            assert found[key] == value or found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
