"""Tests the context-parallel benchmark's balance; its other figures are tests/model/test_attention.py's."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import context


@pytest.mark.parametrize("mean_length", context.MEAN_LENGTHS[:2])
def test_four_context_ranks_have_the_same_cost(mean_length: int) -> None:
    figures = context.balance(mean_length)
    assert 1.0 <= figures["imbalance"] <= figures["worst"]
    assert figures["imbalance"] <= 1.05
