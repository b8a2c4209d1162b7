"""Tests the simulation of asynchronous rollouts: their speed beside the synchronous loop, and its servers."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import async_

SMALL = ["--steps=20", "--prompts=16", "--slots=128", "--tokens-per-s=4000", "--longest=8192"]


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    async_.add_arguments(parser)
    return parser.parse_args(given)


def simulated(bound: int, training_s: float, *given: str) -> dict:
    return async_.simulate(bound, training_s, arguments(*SMALL, *given))


def test_staleness_2_is_at_least_1_8_times_as_fast(single_process: None) -> None:
    """Log-normal lengths of sigma 1, and training as long as generation."""
    generation = simulated(0, 0.0)["seconds"]
    loop, ahead = simulated(0, generation), simulated(2, generation)
    assert loop["policy_idle"] == pytest.approx(0.5)
    assert ahead["groups_per_s"] >= 1.8 * loop["groups_per_s"]
    assert ahead["tokens_per_s"] >= 1.8 * loop["tokens_per_s"]
    assert ahead["policy_idle"] < 0.1 and ahead["server_idle"] < loop["server_idle"]
    assert len(ahead["ages"]) == 3 and sum(ahead["ages"]) == pytest.approx(1)


def test_it_is_under_dynamic_sampling_too(single_process: None) -> None:
    settings = ("--contrast=0.5", "--steps=12")
    generation = simulated(0, 0.0, *settings)["seconds"]
    loop, ahead = (simulated(bound, generation, *settings) for bound in (0, 2))
    assert ahead["groups_per_s"] >= 1.8 * loop["groups_per_s"]


def test_servers_decode_as_many_as_they_have_slots() -> None:
    servers = async_.Servers(slots=2, tokens_per_s=10.0, alone=2.0)
    for key, tokens in enumerate((10, 30, 10, 40)):
        servers.submit((key, 0), tokens)
    servers.advance(0.5)
    servers.abort(3)  # it waits
    assert not servers.ended
    servers.advance(float("inf"), stop=True)
    assert (servers.now, list(servers.ended)) == (1.0, [(0, 0)])
    # the third runs from 1 s to 2 s beside the second, which then has 10 tokens left, at twice the speed
    servers.advance(9.0)
    assert list(servers.ended) == [(0, 0), (2, 0), (1, 0)]
    assert servers.now == 10.0 and servers.busy == pytest.approx(2 * 2.0 + 0.5)
