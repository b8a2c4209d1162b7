"""Tests the fill of the bins and the balance of the ranks, for realistic lengths."""

import math

import numpy as np
import pytest
from packing.cases import Group, Rollout, make_batch, make_settings

from megatron_bicc.packing.pack import plan_step
from megatron_bicc.packing.types import StepPlan


def packed(seed: int, dp_size: int) -> StepPlan:
    """Packs 256 prompts with 8 responses each: lognormal lengths of mean 800 with a long tail."""
    random = np.random.default_rng(seed)
    lengths = random.lognormal(math.log(800) - 0.32, 0.8, (256, 8)).astype(int).clip(1, 3800).tolist()
    chances = random.random(256).tolist()
    groups = [
        Group(int(random.integers(50, 250)), [Rollout(n, bool(random.random() < chance)) for n in group])
        for group, chance in zip(lengths, chances, strict=True)
    ]
    settings = make_settings(max_sequence_tokens=4096, max_tokens_per_microbatch=16384, vocab_size=2**31 - 1)
    return plan_step(make_batch(groups), settings, dp_size)


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_97_percent_full(seed):
    assert packed(seed, dp_size=1).stats["fill"] >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_ranks_cost_the_same_to_2_percent(seed):
    plan = packed(seed, dp_size=8)
    assert plan.stats["imbalance"] <= 1.02
    assert len({len(rank) for rank in plan.ranks}) == 1
