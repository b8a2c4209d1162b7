"""Tests the learning rate of every update of a run against the formula in the settings' help."""

import math
from types import SimpleNamespace

import pytest

from megatron_bicc.config import Config
from megatron_bicc.model.optimizer import make_scheduler

PEAK, LOW = 3e-4, 2e-5


def formula(update: int, warmup: int, total: int, schedule: str) -> float:
    """Of update 1, 2, ..; where the schedule decays it is at the peak at the warm-up's last update."""
    if update < warmup:
        return PEAK * update / warmup
    if schedule == "constant":
        return PEAK
    start = max(warmup, 1)
    done = min((update - start) / (total + 1 - start), 1.0)
    falling = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return LOW + (PEAK - LOW) * falling


def run(warmup: int, schedule: str, stop: int | None = None) -> list[float]:
    """Learning rates of the 12 updates of a run, and the one after it; stopped and resumed at `stop`."""
    config = Config()
    config.train.steps, config.train.updates_per_step = 6, 2
    config.optimizer.lr, config.optimizer.min_lr = PEAK, LOW
    config.optimizer.warmup_steps, config.optimizer.schedule = warmup, schedule

    def start() -> tuple[SimpleNamespace, object]:
        optimizer = SimpleNamespace(param_groups=[{}])
        return optimizer, make_scheduler(config, optimizer)

    optimizer, scheduler = start()
    found = []
    for update in range(13):
        if update == stop:
            state = scheduler.state_dict()
            optimizer, scheduler = start()
            scheduler.load_state_dict(state)
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 12, 40])
def test_every_update_of_a_run(warmup: int, schedule: str) -> None:
    found = run(warmup, schedule)
    total = max(12, warmup + 1)
    assert found == pytest.approx([formula(u, warmup, total, schedule) for u in range(1, 14)], rel=1e-12)
    assert found[0] > 0
    if schedule != "constant" and warmup < 12:
        assert found[12] == pytest.approx(LOW, rel=1e-12) and found[11] > LOW
    for stop in (1, 4, 9):
        assert run(warmup, schedule, stop) == found
