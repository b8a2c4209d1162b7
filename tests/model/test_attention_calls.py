"""Tests a context rank's attention calls: every row attends to its keys once, and to no other."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_reference import (
    Holders,
    Sides,
    cumulative,
    divide,
    lay_out,
    rows_held,
    segment_lengths,
)

from megatron_bicc.model.attention_calls import AttentionCalls
from megatron_bicc.packing.types import MicroBatchLayout

Division = tuple[Sides, Holders, int]


@st.composite
def divisions(draw: st.DrawFn) -> Division:
    """Draws sides and, for any number of context ranks, who holds each segment."""
    side = st.tuples(st.integers(0, 14), st.lists(st.integers(1, 14), min_size=1, max_size=4))
    sides, ranks = draw(st.lists(side, max_size=4)), draw(st.integers(1, 4))
    holders: list[int | list[int]] = []
    for length in segment_lengths(sides):
        if draw(st.booleans()):
            holders.append(draw(st.integers(0, ranks - 1)))
        else:
            inner = sorted(draw(st.lists(st.integers(0, length), min_size=ranks - 1, max_size=ranks - 1)))
            holders.append(np.diff([0, *inner, length]).tolist())
    return sides, holders, ranks


def pairs_of_calls(layout: MicroBatchLayout, lengths: list[int]) -> tuple[Counter, list[AttentionCalls]]:
    """Returns how often every (row, key) is computed, rows of padding as None, and each rank's calls."""
    found: Counter = Counter()
    calls = [AttentionCalls.of(layout, rank) for rank in range(len(layout.chunks))]
    held = [rows_held(chunks, lengths).tolist() for chunks in layout.chunks]
    held = [own + [None] * (c.num_rows - len(own)) for own, c in zip(held, layout.chunks, strict=True)]
    sent = [
        [own[i] for i in c.exchange.sent.tolist()] for own, c in zip(held, calls, strict=True) if c.exchange
    ]
    received = np.array(sum(sent, []))
    for own, call in zip(held, calls, strict=True):
        assert call.causal.bounds_q == call.causal.bounds_k
        assert call.causal.bounds_q[-1] == len(own)
        for rows, _ in call.causal.ranges():
            block = own[rows]
            found.update((row, key) for i, row in enumerate(block) for key in block[: i + 1])
        shared = received[call.exchange.keys.numpy()].tolist() if call.exchange else own
        for part in call.shared:
            q, k = own[part.rows], shared[part.keys]
            assert (part.segments.bounds_q[-1], part.segments.bounds_k[-1]) == (len(q), len(k))
            assert len(set(k)) == len(k)
            found.update((i, j) for rows, keys in part.segments.ranges() for i in q[rows] for j in k[keys])
    return found, calls


@settings(max_examples=120, deadline=None, derandomize=True)
@given(divisions(), st.sampled_from([1, 4]))
def test_every_row_attends_once_to_each_of_its_keys(division: Division, alignment: int) -> None:
    sides, holders, ranks = division
    lengths = segment_lengths(sides)
    layout = lay_out(sides, divide(lengths, holders, ranks, alignment))
    found, calls = pairs_of_calls(layout, lengths)
    first = cumulative(lengths).tolist()
    prefix_of = [*range(len(sides)), *(d for d, (_, responses) in enumerate(sides) for _ in responses)]
    expected = Counter()
    for segment, length in enumerate(lengths):
        side, start = prefix_of[segment], first[segment]
        for row in range(start, start + length):
            keys = [*range(start, row + 1)]
            if segment >= len(sides):
                keys += range(first[side], first[side] + lengths[side])
            expected.update((row, key) for key in keys)
    assert Counter({pair: n for pair, n in found.items() if None not in pair}) == expected
    # a row of padding is a key of padding only
    assert all(pair == (None, None) for pair in found if None in pair)
    # all context ranks exchange, or none does; nothing is sent that nobody needs
    exchanges = [call.exchange for call in calls]
    assert len({exchange is None for exchange in exchanges}) == 1
    if exchanges[0] is not None:
        counts = [exchange.count for exchange in exchanges]
        assert {len(exchange.sent) for exchange in exchanges} == {max(counts)}
        pieces = Counter(s for own in layout.chunks for s in own.segment_W.tolist())
        assert sum(counts) == sum(n for s, n in enumerate(lengths) if s < len(sides) or pieces[s] > 1)


def test_one_context_rank_has_the_calls_of_a_whole_micro_batch() -> None:
    sides = [(21, [4, 7]), (0, [5]), (15, [6])]
    calls = AttentionCalls.of(lay_out(sides), 0)
    (cross,) = calls.shared
    assert calls.exchange is None
    assert calls.causal.bounds_q == cumulative([21, 15, 4, 7, 5, 6]).tolist()
    assert (cross.rows, cross.keys) == (slice(36, 58), slice(0, 36))
    assert cross.segments.bounds_q == cumulative([11, 5, 6]).tolist()
    assert cross.segments.bounds_k == cumulative([21, 0, 15]).tolist()


def test_a_micro_batch_without_shared_rows_sends_nothing() -> None:
    sides = [(0, [5, 2]), (0, [3])]
    layout = lay_out(sides, divide(segment_lengths(sides), [0, 0, 0, 2, 1], 3))
    for rank in range(3):
        calls = AttentionCalls.of(layout, rank)
        assert calls.exchange is None
        assert not calls.shared
