"""Tests that two processes decide alike which groups a step trains and what is asked for."""

import json
from pathlib import Path

import pytest
from support import warm
from support.scripted import PROMPTS, WANTED, drawn

WORKER = Path(__file__).with_name("async_collector_worker.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("asynchronous")
    done = warm.run([WORKER, directory], timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def ranks_of(out: Path, name: str) -> list[dict]:
    return [json.loads((out / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def test_both_hold_the_same_groups_and_the_same_state(out: Path) -> None:
    first, second = ranks_of(out, "well")
    assert len(first["steps"]) == 4
    assert first["steps"] == second["steps"]
    assert first["states"] == second["states"]
    taken = [index for step in first["steps"] for index in step[0]]
    assert len(taken) == 4 * WANTED


def test_they_share_the_prompts(out: Path) -> None:
    """By how many each has in flight: equally at first, then more to the one whose engine is faster."""
    ranks = ranks_of(out, "well")
    assert [rank["asked"][0][:WANTED] for rank in ranks] == [drawn(2 * WANTED)[r::2] for r in range(2)]
    before = [rank["asked_before"] for rank in ranks]
    assert sorted(sum(before, [])) == sorted(drawn(sum(map(len, before))))
    assert len(before[0]) > len(before[1])


def test_what_was_in_flight_is_asked_for_again_by_either(out: Path) -> None:
    ranks = ranks_of(out, "well")
    again = [PROMPTS[row].index for row in ranks[0]["again"]]
    assert again and again == [PROMPTS[row].index for row in ranks[1]["again"]]
    asked = [rank["asked"][2] for rank in ranks]
    assert [one[: len(again[r::2])] for r, one in enumerate(asked)] == [again[r::2] for r in range(2)]


def test_each_aborts_its_own_and_nothing_is_left(out: Path) -> None:
    ranks = ranks_of(out, "well")
    assert [rank["left"] for rank in ranks] == [0, 0]
    assert ranks[1]["aborted"] > 0


def test_both_end_when_one_fails(out: Path) -> None:
    for rank in ranks_of(out, "fails"):
        assert rank["error"] == "no answer after 3 s"
