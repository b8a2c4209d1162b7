"""Tests that three processes search for groups with contrast together."""

import json
from pathlib import Path

import pytest
from support import warm
from support.scripted import WANTED, drawn

WORKER = Path(__file__).with_name("streaming_sampler_worker.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search")
    done = warm.run([WORKER, directory], timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def ranks_of(out: Path, name: str) -> list[dict]:
    return [json.loads((out / f"{name}_{rank}.json").read_text()) for rank in range(3)]


def test_three_processes_share_a_search(out: Path) -> None:
    ranks = ranks_of(out, "well")
    for name in ("groups", "sampled", "aborted", "next"):
        assert ranks[0][name] == ranks[1][name] == ranks[2][name]
    asked = [prompt for rank in ranks for prompt in rank["asked"]]
    assert len(set(asked)) == len(asked)
    assert sorted(asked) == sorted(drawn(len(asked)))
    assert [rank["asked"][:2] for rank in ranks] == [drawn(WANTED)[r::3] for r in range(3)]
    assert len(ranks[0]["groups"]) == WANTED
    assert ranks[0]["asked"] == drawn(WANTED)[::3] and ranks[0]["own_aborted"] == 2
    assert ranks[0]["aborted"] == sum(rank["own_aborted"] for rank in ranks)
    assert len(ranks[0]["sampled"]) + ranks[0]["aborted"] == len(asked)


def test_all_processes_end_when_one_fails(out: Path) -> None:
    for rank in ranks_of(out, "fails"):
        assert rank["error"] == "no answer after 3 s"


def test_fewer_groups_wanted_than_there_are_processes(out: Path) -> None:
    ranks = ranks_of(out, "few")
    assert ranks[2]["asked"] == []
    for name in ("groups", "sampled", "aborted", "next"):
        assert ranks[0][name] == ranks[1][name] == ranks[2][name]
    assert len(ranks[0]["groups"]) == 2
