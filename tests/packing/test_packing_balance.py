"""Tests the fill of the bins and the balance of the ranks, for realistic lengths."""

import math

import numpy as np
import pytest
from packing.cases import Group, Rollout, make_batch, make_settings

from megatron_bicc.packing.pack import plan_step
from megatron_bicc.packing.types import MicroBatchLayout, PackingSettings, StepPlan


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


def packed_on_context_ranks(layout: str, median: int, hidden_size: int) -> StepPlan:
    """Packs 64 prompts with 8 responses each for 4 context ranks: lognormal lengths of up to 32000 tokens."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(math.log(median), 0.8, (64, 8)).astype(int).clip(1, 32000).tolist()
    chances = random.random(64).tolist()
    groups = [
        Group(int(random.integers(50, 400)), [Rollout(n, bool(random.random() < chance)) for n in group])
        for group, chance in zip(lengths, chances, strict=True)
    ]
    settings = make_settings(
        layout=layout,
        max_sequence_tokens=32768,
        max_tokens_per_microbatch=16384,
        vocab_size=2**31 - 1,
        token_cost=6 * hidden_size,
        alignment=8,
        context_ranks=4,
    )
    return plan_step(make_batch(groups), settings, dp_size=2)


@pytest.mark.parametrize("hidden_size", [2560, 8192], ids=["4B", "70B"])
@pytest.mark.parametrize("median", [2000, 4000])
@pytest.mark.parametrize("layout", ["plain", "bilateral"])
def test_context_ranks_cost_the_same_to_5_percent(layout, median, hidden_size):
    plan = packed_on_context_ranks(layout, median, hidden_size)
    costs = np.array([costs_of_context_ranks(m, plan.settings) for rank in plan.ranks for m in rank])
    # ranks wait for each other in every layer: what counts is the costliest rank of each micro-batch
    assert costs.max(axis=1).sum() <= 1.05 * costs.mean(axis=1).sum()
    totals = [sum(costs_of_context_ranks(m, plan.settings) for m in rank) for rank in plan.ranks]
    assert plan.stats["imbalance"] == pytest.approx(np.max(totals) / np.mean(totals))


def costs_of_context_ranks(micro_batch: MicroBatchLayout, settings: PackingSettings) -> np.ndarray:
    """Returns token_cost * rows + attention pairs of each context rank."""
    prefix_D = np.diff(micro_batch.cu_prefix)
    side_S = np.searchsorted(micro_batch.cu_response_side, micro_batch.cu_response[:-1], side="right") - 1
    seen = np.concatenate([0 * prefix_D, prefix_D[side_S]])
    costs = []
    for rank in micro_batch.chunks:
        first, stop = rank.start_W.astype(int), (rank.start_W + rank.length_W).astype(int)
        pairs = (stop * (stop + 1) - first * (first + 1)) // 2
        costs.append(((settings.token_cost + seen[rank.segment_W]) * rank.length_W + pairs).sum())
    return np.array(costs, float)


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_97_percent_full(seed):
    assert packed(seed, dp_size=1).stats["fill"] >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_ranks_cost_the_same_to_2_percent(seed):
    plan = packed(seed, dp_size=8)
    assert plan.stats["imbalance"] <= 1.02
    assert len({len(rank) for rank in plan.ranks}) == 1
