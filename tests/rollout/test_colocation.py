"""Tests that two processes hand the GPUs to each other in order: servers, training, servers."""

from pathlib import Path

import pytest
from support.torchrun import torchrun

WORKER = Path(__file__).with_name("colocation_worker.py")


@pytest.fixture
def events(tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    """What both processes did in a scenario, in order: the process's rank, then its action."""
    torchrun(2, WORKER, tmp_path, request.param)
    return (tmp_path / request.param).read_text().splitlines()


@pytest.mark.parametrize("events", ["well"], indirect=True)
def test_the_gpus_change_hands_when_every_process_has_freed_its_memory(events: list[str]) -> None:
    assert set(events[:2]) == {"0 free", "1 free"}
    assert events[2] == "0 release"
    # the processes train, and free their memory, each at its own pace
    for rank in "01":
        own = [event for event in events[3:7] if event.startswith(rank)]
        assert own == [f"{rank} train with 60 bytes", f"{rank} free"]
    assert events[7:] == ["0 take weights"]


@pytest.mark.parametrize("events", ["late"], indirect=True)
def test_training_waits_until_the_memory_is_free(events: list[str]) -> None:
    """Servers may answer before. 12 bytes are not half of what they took; 30 are still growing."""
    assert "1 train with 60 bytes" in events


@pytest.mark.parametrize("events", ["never", "fails"], indirect=True)
def test_memory_that_is_not_released_ends_every_process(events: list[str]) -> None:
    errors = sorted(line for line in events if "error" in line)
    assert len(errors) == 2 and not any("train" in line for line in events)
    assert errors[0].removeprefix("0") == errors[1].removeprefix("1")
    reasons = ("released 0.0 GB of a GPU within 0.5 s", "http://h:1/release_memory_occupation: HTTP 500")
    assert any(reason in errors[0] for reason in reasons)
