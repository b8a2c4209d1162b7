"""Tests the attention benchmark at a tiny size: the names of its figures and their relations."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import attention

KEYS = "name P n S ms_shared ms_rows ms_pairs ms_pairs_padded tokens_shared tokens_rows tokens_pairs_padded"


def test_figures_of_a_case(single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # the memory is measured in a process of its own, which would cost more than all the rest
    monkeypatch.setattr(attention, "peak_mb", lambda make, *arguments: make(*arguments)() or 0.0)
    arguments = Namespace(layers=2, hidden=64, repeats=1, peak_tflops=2.0)
    prefix, lengths = 20, (6, 3)
    figures = attention.measure(attention.Case("ragged", prefix, lengths), arguments)
    assert {*KEYS.split(), "peak_mb_shared", "peak_mb_rows", "kernels_time_ratio"} <= figures.keys()
    assert (figures["P"], figures["n"], figures["S"]) == (prefix, 2, 4.5)
    assert (figures["tokens_shared"], figures["tokens_rows"]) == (29, 49)
    assert (figures["tokens_pairs"], figures["tokens_pairs_padded"]) == (4 * 10 + 2 * (6 + 3), 4 * 16)
    assert figures["token_ratio"] == 49 / 29

    # q and o of 64 x 64, k and v of 64 x 64, three matrices of 64 x 160; a forward and a backward pass
    weights, pairs = 2 * (4 * 64 * 64 + 3 * 64 * 160), 20 * 21 / 2 + 6 * 7 / 2 + 3 * 4 / 2 + 20 * 9
    flops = 3 * (2 * weights * 29 + 4 * 64 * 2 * pairs)
    assert figures["mfu_shared"] == pytest.approx(flops / (figures["ms_shared"] / 1e3) / 2e12)
